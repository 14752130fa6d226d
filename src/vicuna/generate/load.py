"""A base and perhaps an adapter, ready to answer, from the settings of a command."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vicuna.config import AnswerSettings
from vicuna.data.encode import Encoder, Vocabulary
from vicuna.data.template import Renderer, Template, find, from_dict
from vicuna.errors import UserError
from vicuna.generate.engines.torch import TorchEngine
from vicuna.generate.settings import Settings
from vicuna.model import adapter as adapters
from vicuna.model import fused, load
from vicuna.model.base import EMBEDDED, locate
from vicuna.model.vocabulary import load_vocabulary


@dataclass
class Loaded:
    """What answers. notes: what the user should know about how it was loaded."""

    engine: TorchEngine
    renderer: Renderer
    model: Any
    notes: list[str]


def open_model(settings: AnswerSettings) -> Loaded:
    """Load what the settings ask for.

    Raises: UserError where base and adapter do not belong together, or something is missing.
    """
    if settings.engine != "torch":
        raise UserError(
            f"engine {settings.engine} is not part of this version yet",
            where="engine",
            fix="Leave out --engine: torch runs on any CPU or GPU.",
        )
    notes: list[str] = []
    files = adapters.read_adapter(settings.adapter) if settings.adapter else None
    folder = locate(settings.model or _base_of(files))
    if files is not None:
        notes += files.notes
        identity = adapters.identify(folder)
        warning = adapters.check_base(files, identity, settings.allow_other_base)
        notes += [warning] if warning else []
    vocabulary = load_vocabulary(folder)
    template = _template(settings, files, vocabulary)
    device = load.pick_device()
    chosen = load.choose(settings.precision, device)
    model = load.load_base(folder, chosen, device)
    if files is not None:
        model = adapters.attach_saved(model, files)
        model.to(device)
        fused.install(model)
    model.eval()
    engine = TorchEngine(model, load.context_length(model))
    return Loaded(engine, Renderer(template, Encoder(vocabulary)), model, notes)


def _base_of(files: adapters.AdapterFiles | None) -> str:
    """The base an adapter names, else the embedded one."""
    if files is None:
        return EMBEDDED
    name = files.meta.get("base", {}).get("name") or files.base_name
    if not name:
        raise UserError(
            "this adapter does not say which base it belongs to",
            where=f"adapter {files.path}",
            fix="Name it: --model FOLDER_OR_HUB_ID.",
        )
    return str(name)


def _template(
    settings: AnswerSettings, files: adapters.AdapterFiles | None, vocabulary: Vocabulary
) -> Template:
    """The adapter's own template; another one only where it renders alike."""
    saved = files.meta.get("template") if files else None
    if not saved:
        return find(settings.template or "auto", vocabulary)
    own = from_dict(saved)
    if settings.template and find(settings.template, vocabulary).digest != own.digest:
        raise UserError(
            f"the adapter was trained with template {own.name}, not {settings.template}",
            where="template",
            fix="Leave out --template: the adapter brings its own.",
        )
    return own


def decoding(settings: AnswerSettings) -> Settings:
    """The decoder's settings among a command's."""
    return Settings(
        max_new_tokens=settings.max_new_tokens,
        min_new_tokens=settings.min_new_tokens,
        do_sample=settings.do_sample,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        repetition_penalty=settings.repetition_penalty,
        stop=tuple(settings.stop),
        seed=settings.seed,
        num_beams=settings.num_beams,
    )
