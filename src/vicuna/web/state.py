"""What all tabs know: the settings, and the one model with its queue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vicuna import config, untrusted
from vicuna.config import AnswerSettings, ModelSettings, WebSettings
from vicuna.errors import UserError
from vicuna.serve.registry import AdapterRegistry
from vicuna.web.sessions import Sessions

if TYPE_CHECKING:
    from vicuna.serve.worker import ModelWorker
    from vicuna.web.gate import Gate


PATH = 4096  # characters
Event = tuple[Callable[..., Any], Any, Any]


@dataclass
class App:
    """The state behind the page; one for the whole server.

    settings: of the command. Whether anything may be written: `settings.read_only`.
    tab: the hidden component that holds the name of the browser's tab (`Sessions.get`); an input of
        every event that belongs to somebody.
    opening: (function, inputs, outputs) of what is done when a browser opens the page, and each
        time it opens the tab; tabs add to it.
    loading: the same of what is done only when it opens the page.
    arriving: the same of what is done when an adapter appeared or went while the page is open.
    kept: components whose values a reload brings back (`kept_values.py`).
    of_session: components whose values the session has: the page sends them only once it has been
        told its session.
    gate: what decides who may ask; None while no server is open.
    """

    settings: WebSettings
    tab: Any = None
    opening: list[Event] = field(default_factory=list)
    loading: list[Event] = field(default_factory=list)
    arriving: list[Event] = field(default_factory=list)
    kept: list[Any] = field(default_factory=list)
    of_session: list[Any] = field(default_factory=list)
    gate: Gate | None = None

    @cached_property
    def worker(self) -> ModelWorker:
        """The model and its queue; opened where it is first asked for.

        Raises: UserError where it cannot be opened.
        """
        from vicuna.generate.load import open_model
        from vicuna.serve.worker import ModelWorker

        given = self.settings.model_fields_set & ModelSettings.model_fields.keys()
        values = {name: getattr(self.settings, name) for name in given}
        # Room for the beams and answers that the page may ask for, where a cache is one block.
        values |= {"num_beams": 4, "max_new_tokens": 512}
        if self.settings.engine != "vllm":  # which takes adapters only where it is opened with one
            values["adapter"] = ""
        values["model"] = self.settings.model or self._base_of_adapter()
        answering = config.build(AnswerSettings, values)
        worker = ModelWorker(lambda: open_model(answering))
        if self.settings.adapter:
            self.default_adapter = self.registry.add(self.settings.adapter)
            worker.choose("", {self.default_adapter: 1.0}).wait()
        return worker

    def _base_of_adapter(self) -> str:
        from vicuna.generate.load import base_of
        from vicuna.model.adapter import read_adapter

        return base_of(read_adapter(self.settings.adapter) if self.settings.adapter else None)

    def close(self) -> None:
        """End the model's thread, if there is one."""
        worker = self.__dict__.pop("worker", None)
        if worker is not None:
            worker.close()

    @cached_property
    def sessions(self) -> Sessions:
        """The conversations of all browsers."""
        return Sessions()

    @cached_property
    def registry(self) -> AdapterRegistry:
        """The adapters there are."""
        return AdapterRegistry(self.adapter_folders)

    # The path of the adapter that new conversations begin with; "" for the base alone.
    default_adapter: str = ""

    @property
    def adapter_folders(self) -> list[Path]:
        """Where adapters and runs are; a new run goes into the first."""
        return [Path(p).expanduser().resolve() for p in self.settings.adapters]

    @property
    def data_folders(self) -> list[Path]:
        """Where data sets are; what is saved on the page goes into the first."""
        return [Path(p).expanduser().resolve() for p in self.settings.data]

    def inside(self, path: str | Path) -> Path:
        """A path that a browser named, if it lies in one of the folders; links are followed first.

        Raises: UserError where it does not.
        """
        found = _path(path)
        if any(found.is_relative_to(folder) for folder in self.adapter_folders + self.data_folders):
            return found
        raise UserError(
            "this is outside of the folders that the page may use",
            where=str(path),
            fix="Start vicuna web with --adapters or --data and the folder's name.",
        )

    def exists(self, path: str) -> bool:
        """Whether there is such a path. Raises: UserError where no path can be like that."""
        return _path(path).exists()

    def listened(self, session: str | None) -> bool:
        """Whether a browser takes what is answered in one of gradio's sessions."""
        return self.gate is None or self.gate.listened(session)

    def may_write(self) -> None:
        """Raises: UserError where the server was started with --read-only."""
        if self.settings.read_only:
            raise UserError(
                "the server is read-only: training, saving, fetching and deleting are disabled",
                fix="Restart vicuna web without --read-only.",
            )


def _path(path: str | Path) -> Path:
    """A path with its links followed. Raises: UserError where none can be like that."""
    text = str(path)
    try:
        if "\0" in text or len(text) > PATH:
            raise ValueError
        text.encode()
        found = Path(text).expanduser().resolve()
        found.exists()  # a part of it may be too long
        return found
    except (OSError, ValueError, RuntimeError):  # a circle of links, a home that is none
        raise UserError("no path can be like this", where=untrusted.text(text, 80)) from None
