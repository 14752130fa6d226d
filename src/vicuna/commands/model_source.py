"""What a command ships: a base, perhaps an adapter, and the template they are talked to with."""

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
from vicuna.verify.scorers import FolderScorer, Scorer


class _Asked(Protocol):
    model: str
    adapter: str
    template: str
    allow_other_base: bool


@dataclass
class Source:
    """A base in a folder and perhaps an adapter of it.

    name: of the base, as the user wrote it. own_way: whether it is talked to as the adapter or the
    user says, not only as the base's tokenizer does. notes: what was found, in words.
    """

    name: str
    folder: Path
    adapter: AdapterFiles | None
    renderer: Renderer
    own_way: bool
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

    def scorer(self) -> Scorer:
        """The scores that what is made of it should have."""
        return FolderScorer(
            self.folder, adapters=[(self.adapter, 1.0)] if self.adapter is not None else []
        )

    def about(self) -> dict[str, Any]:
        """For report.json."""
        return {
            "model": self.name,
            "adapter": str(self.adapter.path) if self.adapter else None,
            "template": self.renderer.template.name,
        }


def open_source(asked: _Asked) -> Source:
    """Find base and adapter, and check that they belong together.

    Raises: UserError where they do not, or one is missing.
    """
    files = adapters.read_adapter(asked.adapter) if asked.adapter else None
    name = asked.model or base_of(files)
    folder = locate(name)
    notes = []
    if files is not None:
        found = adapters.check_belongs(files, folder, asked.allow_other_base)
        notes += [*files.notes, *found]
    vocabulary = load_vocabulary(folder)
    template = template_of(asked.template, files, vocabulary)
    own_way = bool(asked.template or (files and files.meta.get("template")))
    return Source(name, folder, files, Renderer(template, Tokenizer(vocabulary)), own_way, notes)


def check_target(target: Path, force: bool, what: str) -> None:
    """Raises: UserError where something is there that was not to be replaced."""
    if target.exists() and not force:
        raise UserError(
            f"{what} exists already",
            where=str(target),
            fix="Replace it with --force, or choose another name.",
        )


def counter(label: str) -> Callable[[int, int], None]:
    """A line on the terminal that counts up; nothing where there is no terminal."""
    import sys
    import time

    last = 0.0

    def tell(done: int, of: int) -> None:
        nonlocal last
        now = time.monotonic()
        if sys.stderr.isatty() and (done == of or now - last > 0.2):
            last = now
            recount(f"{label} {done}/{of}", last=done == of)

    return tell
