"""The model that `vicuna export` and `quantize` read: base, adapter if any, chat template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from vicuna.data.templates.renderer import Renderer
from vicuna.data.tokenizer import Tokenizer
from vicuna.errors import UserError
from vicuna.generate.load import base_of, template_of
from vicuna.model import adapter as adapters
from vicuna.model.adapter import AdapterFiles
from vicuna.model.base import locate
from vicuna.model.config_files import read_config
from vicuna.model.vocabulary import load_vocabulary
from vicuna.terminal import recount
from vicuna.verify.logits import FolderLogits, LogitSource


class _ModelSettings(Protocol):
    model: str
    adapter: str
    template: str
    allow_other_base: bool


@dataclass
class ModelSource:
    """A base in a folder, and perhaps an adapter of it.

    Attributes:
        name: of the base, as the user wrote it.
        has_own_template: whether the template is the adapter's or the user's, not only the base
            tokenizer's.
        notes: what the user should know.
    """

    name: str
    folder: Path
    adapter: AdapterFiles | None
    renderer: Renderer
    has_own_template: bool
    notes: list[str] = field(default_factory=list)

    @property
    def config(self) -> dict[str, Any]:
        """The base's config.json."""
        return read_config(self.folder)

    @property
    def title(self) -> str:
        """A name for what is made of it."""
        base = Path(self.name).stem if self.name.endswith(".gguf") else Path(self.name).name
        if self.adapter is None:
            return base
        path = self.adapter.path
        return f"{base}-{path.parent.name if path.name == 'adapter' else path.name}"

    def logit_source(self) -> LogitSource:
        """The logits that the result should have."""
        return FolderLogits(
            self.folder, adapters=[(self.adapter, 1.0)] if self.adapter is not None else []
        )

    def about(self) -> dict[str, Any]:
        """For report.json."""
        return {
            "model": self.name,
            "adapter": str(self.adapter.path) if self.adapter else None,
            "template": self.renderer.template.name,
        }


def open_source(settings: _ModelSettings) -> ModelSource:
    """Find base and adapter, and check that they belong together.

    Raises: UserError if they do not, or one is missing.
    """
    files = adapters.read_adapter(settings.adapter) if settings.adapter else None
    name = settings.model or base_of(files)
    folder = locate(name)
    notes = []
    if files is not None:
        found = adapters.check_belongs(files, folder, settings.allow_other_base)
        notes += [*files.notes, *found]
    vocabulary = load_vocabulary(folder)
    template = template_of(settings.template, files, vocabulary)
    has_own_template = bool(settings.template or (files and files.meta.get("template")))
    renderer = Renderer(template, Tokenizer(vocabulary))
    return ModelSource(name, folder, files, renderer, has_own_template, notes)


def check_target(target: Path, force: bool, what: str) -> None:
    """Raises: UserError if the target exists and `force` is not set."""
    if target.exists() and not force:
        raise UserError(
            "{details} exists already",
            details=what,
            where=str(target),
            fix="Replace it with --force, or choose another name.",
        )


def progress_counter(label: str) -> Callable[[int, int], None]:
    """A line on the terminal that counts up; nothing if there is no terminal."""
    import sys
    import time

    last = 0.0

    def show(done: int, of: int) -> None:
        nonlocal last
        now = time.monotonic()
        if sys.stderr.isatty() and (done == of or now - last > 0.2):
            last = now
            recount(f"{label} {done}/{of}", last=done == of)

    return show
