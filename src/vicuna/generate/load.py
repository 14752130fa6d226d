"""A base and its adapters, loaded from the settings of a command and ready to answer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vicuna.config import AnswerSettings
from vicuna.data.templates.base import Template
from vicuna.data.templates.registry import find_template, template_from_dict
from vicuna.data.templates.renderer import Renderer
from vicuna.data.tokenizer import Tokenizer, TokenizerData
from vicuna.errors import UserError
from vicuna.generate.engines.base import Engine, check_adapter, load_engine
from vicuna.generate.settings import OF_SAMPLING, Settings, biases_of
from vicuna.model import adapter as adapters
from vicuna.model.adapter import AdapterFiles
from vicuna.model.adapter_base import named_base
from vicuna.model.base import EMBEDDED, locate_vocabulary
from vicuna.model.config_files import read_config
from vicuna.model.vocabulary import check_embedding_rows, load_vocabulary

FIRST = adapters.FIRST  # the name of the adapter that a model is opened with


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter that is loaded beside the base.

    engine_name: the name that the engine knows it by.
    renderer: of the template that it was trained with.
    """

    engine_name: str
    files: AdapterFiles
    renderer: Renderer


class ChatModel:
    """An engine over a base, the adapters beside it, and the prompt template.

    base: its name.
    renderer: of the next answer: that of the heaviest adapter; if the base answers alone, that of
        the model as it was opened.
    adapters: by name. mix: the strengths of those in use.
    notes: what the user should know about base and adapters.
    """

    def __init__(self, engine: Engine, settings: AnswerSettings, base: str, folder: Path) -> None:
        """folder: as from `load_engine`."""
        self.engine, self._settings, self.base, self._folder = engine, settings, base, folder
        self.vocabulary = load_vocabulary(folder)
        self.adapters: dict[str, LoadedAdapter] = {}
        self.mix: dict[str, float] = {}
        self.notes: list[str] = []
        self._count = 0
        self._plain = self.renderer = self.render_with("")

    @property
    def about(self) -> str:
        """What computes, for the user; "" if there is nothing to tell."""
        return self.engine.about

    def render_with(self, template: str) -> Renderer:
        """A renderer of a template, by name; "" for the one of the settings, else the tokenizer's.

        Raises: UserError where there is no such template.
        """
        name = template or self._settings.template or "auto"
        chosen = find_template(name, self.vocabulary).asked(self._settings.thinking)
        return Renderer(chosen, Tokenizer(self.vocabulary))

    def open_with(self, name: str) -> None:
        """Answer with this adapter; its template is that of the base alone, too."""
        self._plain = self.adapters[name].renderer
        self.set_adapter(name)

    def load_adapter(self, name: str, adapter: str) -> list[str]:
        """Load an adapter beside the base, under a name. Who answers does not change, unless it is
        the name of one that answers now, which is replaced.

        Args:
            adapter: an adapter's or a run's folder, or a hub id.

        Returns: what the user should know about it.

        Raises: UserError where it does not belong to the base.
        """
        return self.attach(name, adapters.read_adapter(adapter))

    def attach(self, name: str, files: AdapterFiles) -> list[str]:
        """The same, of an adapter that was read."""
        notes = check_adapter(files, self.base, self._folder, self._settings)
        template = template_of(self._settings.template, files, self.vocabulary)
        template = template.asked(self._settings.thinking)
        renderer = Renderer(template, Tokenizer(self.vocabulary))
        self._count += 1
        engine_name = FIRST if self._count == 1 else f"{FIRST}{self._count}"
        try:
            self.engine.load_adapter(engine_name, files)
        finally:
            self._apply()
        old = self.adapters.pop(name, None)
        self.adapters[name] = LoadedAdapter(engine_name, files, renderer)
        self._free(old)
        self.notes += [n for n in notes if n not in self.notes]
        return notes

    def drop_adapter(self, name: str) -> None:
        """Free an adapter. If it answers now, the others of the mix go on without it.

        Raises: UserError where there is none of this name.
        """
        self._known([name])
        self.mix.pop(name, None)
        self._free(self.adapters.pop(name))

    def _free(self, old: LoadedAdapter | None) -> None:
        if old is not None:
            self.engine.drop_adapter(old.engine_name)
        self._apply()

    def set_adapter(
        self, which: bool | str | Mapping[str, float] = True, strength: float = 1.0
    ) -> None:
        """Answer with adapters from now on, or with the base alone. Where that is a change, what
        was computed before is forgotten.

        Args:
            which: true for the one that the model was opened with, false for the base alone; a
                name; or several with the strength of each.
            strength: multiplies what the adapter adds.

        Raises: UserError where no such adapter is loaded, or the engine cannot scale it so.
        """
        if isinstance(which, Mapping):
            mix = {name: float(weight) * strength for name, weight in which.items()}
        else:
            name = FIRST if isinstance(which, bool) else which
            self._known([name])
            mix = {name: strength} if which else {}
        self._known(mix)
        for weight in mix.values():
            if not math.isfinite(weight):
                raise UserError(
                    "a strength is a number, not {weight}", weight=weight, where="adapter"
                )
        if mix == self.mix:
            return
        before, self.mix = self.mix, mix
        try:
            self._apply()
        except UserError:
            self.mix = before
            raise

    def renderer_of(self, mix: Mapping[str, float], template: str = "") -> Renderer:
        """The renderer of an answer of these adapters; of this template where one is named.

        Raises: UserError where there is no such template.
        """
        if template:
            return self.render_with(template)
        heaviest = max(mix, key=lambda name: abs(mix[name]), default=None)
        if heaviest is None or heaviest not in self.adapters:
            return self._plain
        return self.adapters[heaviest].renderer

    def _known(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self.adapters:
                continue
            if name == FIRST:
                raise UserError(
                    "there is no adapter to switch",
                    where="adapter",
                    fix="Name one when the model is loaded: --adapter RUN, "
                    "vicuna.load(adapter=...).",
                )
            known = ", ".join(self.adapters) or "none"
            raise UserError(
                "no adapter {name!r} is loaded", name=name, known=known, fix="Loaded: {known}."
            )

    def _apply(self) -> None:
        """Let the engine and the template follow the mix."""
        self.engine.use_adapters({self.adapters[n].engine_name: w for n, w in self.mix.items()})
        self.renderer = self.renderer_of(self.mix)


def open_model(settings: AnswerSettings) -> ChatModel:
    """Load what the settings ask for.

    Raises: UserError where base and adapter do not belong together, or something is missing.
    """
    files = adapters.read_adapter(settings.adapter) if settings.adapter else None
    base = settings.model or base_of(files)
    _check_rows(settings, base, files)
    engine, folder = load_engine(base, settings, files)
    model = ChatModel(engine, settings, base, folder)
    if files is None:
        return model
    try:
        model.attach(FIRST, files)
        model.open_with(FIRST)
    except UserError:
        engine.close()
        raise
    return model


def _check_rows(settings: AnswerSettings, base: str, files: adapters.AdapterFiles | None) -> None:
    """Raises: UserError where a token has no row in the embedding; no weights are read."""
    folder = locate_vocabulary(base)
    vocabulary = load_vocabulary(folder)
    template = template_of(settings.template, files, vocabulary)
    check_embedding_rows(Renderer(template, Tokenizer(vocabulary)), read_config(folder), folder)


def base_of(files: adapters.AdapterFiles | None) -> str:
    """The base an adapter names, else the embedded one.

    Raises: UserError where the adapter names none, or one that is not to be had here.
    """
    if files is None:
        return EMBEDDED
    return named_base(files)


def template_of(
    asked: str, files: adapters.AdapterFiles | None, vocabulary: TokenizerData
) -> Template:
    """The adapter's own template; the one asked for, where there is one, only if it renders alike.

    Raises: UserError where it does not.
    """
    saved = files.meta.get("template") if files else None
    if not saved:
        return find_template(asked or "auto", vocabulary)
    own = template_from_dict(saved)
    if asked and find_template(asked, vocabulary).digest != own.digest:
        raise UserError(
            "the adapter was trained with template {name}, not {asked}",
            name=own.name,
            asked=asked,
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
