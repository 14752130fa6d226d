"""A base and perhaps an adapter, ready to answer, from the settings of a command."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from vicuna.config import AnswerSettings
from vicuna.data.encode import Encoder, Vocabulary
from vicuna.data.template import Renderer, Template, find, from_dict
from vicuna.errors import UserError
from vicuna.generate.engines.base import Engine
from vicuna.generate.openers import open_engine
from vicuna.generate.settings import OF_SAMPLING, Settings, biases_of
from vicuna.model import adapter as adapters
from vicuna.model.base import EMBEDDED
from vicuna.model.vocabulary import load_vocabulary


@dataclass
class Loaded:
    """What answers.

    model: torch's, where torch computes.
    notes: what the user should know about base and adapter.
    about: what computes, in words; "" where there is nothing to tell.
    adapter: the engine's name of the adapter; "" where there is none.
    """

    engine: Engine
    renderer: Renderer
    model: Any
    notes: list[str]
    about: str = ""
    adapter: str = ""

    def set_adapter(self, on: bool, strength: float = 1.0) -> None:
        """Answer with the adapter from now on, or with the base alone. What was computed before is
        forgotten.

        Args:
            strength: multiplies what the adapter adds.

        Raises: UserError where no adapter was loaded, or the engine cannot scale it so.
        """
        if not self.adapter:
            raise UserError(
                "there is no adapter to switch",
                where="adapter",
                fix="Name one when the model is loaded: --adapter RUN, vicuna.load(adapter=...).",
            )
        if not math.isfinite(strength):
            raise UserError(f"a strength is a number, not {strength}", where="adapter")
        engine: Any = self.engine  # every engine that has loaded an adapter can switch it
        engine.set_adapter(self.adapter if on else None, strength)


def open_model(settings: AnswerSettings) -> Loaded:
    """Load what the settings ask for.

    Raises: UserError where base and adapter do not belong together, or something is missing.
    """
    files = adapters.read_adapter(settings.adapter) if settings.adapter else None
    opened = open_engine(settings, settings.model or base_of(files), files)
    vocabulary = load_vocabulary(opened.vocabulary)
    template = template_of(settings.template, files, vocabulary)
    renderer = Renderer(template, Encoder(vocabulary))
    return Loaded(opened.engine, renderer, opened.model, opened.notes, opened.about, opened.adapter)


def base_of(files: adapters.AdapterFiles | None) -> str:
    """The base an adapter names, else the embedded one.

    Raises: UserError where the adapter names none.
    """
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


def template_of(
    asked: str, files: adapters.AdapterFiles | None, vocabulary: Vocabulary
) -> Template:
    """The adapter's own template; the one asked for, where there is one, only if it renders alike.

    Raises: UserError where it does not.
    """
    saved = files.meta.get("template") if files else None
    if not saved:
        return find(asked or "auto", vocabulary)
    own = from_dict(saved)
    if asked and find(asked, vocabulary).digest != own.digest:
        raise UserError(
            f"the adapter was trained with template {own.name}, not {asked}",
            where="template",
            fix="Leave out --template: the adapter brings its own.",
        )
    return own


def decoding(settings: AnswerSettings) -> Settings:
    """The decoder's settings among a command's.

    What was given is passed on, so that it is refused where it has no effect. The command's own
    defaults of sampling count only where something is sampled.

    Raises: SettingsError naming every mistake.
    """
    given = settings.model_fields_set
    samples = settings.do_sample and settings.temperature > 0
    names = Settings.model_fields.keys() & type(settings).model_fields.keys()
    names = {n for n in names if samples or n in given or n not in OF_SAMPLING}
    values = {name: getattr(settings, name) for name in names}
    early = {"true": True, "false": False, "never": "never"}[settings.early_stopping]
    biases = biases_of(settings.logit_bias)
    return Settings(**{**values, "early_stopping": early, "logit_bias": biases})
