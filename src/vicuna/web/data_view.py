"""What the page knows of a data set once it has looked at it: report, examples, lengths.

Preparing is what costs time; its result lies in the cache on disk (`data/prepare.py`), so that a
look that was forgotten here comes back at once, and so does the training that follows.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

from vicuna import config
from vicuna.commands.data import renderer_for
from vicuna.config import DatasetEntry, DataSettings
from vicuna.data import dataset
from vicuna.data.conversation import Action, Problem
from vicuna.data.dataset import Dataset, Lengths
from vicuna.data.loss_mask import Example
from vicuna.data.report import DataReport
from vicuna.data.templates.renderer import Renderer
from vicuna.errors import UserError

KEPT = 4  # looks held in memory
ROWS = 20_000  # problems that can be paged through; `vicuna data check --json` has all


@dataclass(frozen=True)
class DatasetQuery:
    """What somebody wants to look at, and as which base and template see it."""

    files: tuple[Path, ...]
    model: str
    template: str = "auto"
    cutoff: int = 2048
    encoding: str = ""

    def settings(self) -> DataSettings:
        """Raises: SettingsError."""
        given = {"model": self.model, "template": self.template, "cutoff_len": self.cutoff}
        given["encoding"] = self.encoding
        return config.build(DataSettings, given)

    def marks(self) -> tuple[object, ...]:
        """Equal for the same files with the same content.

        Raises: UserError where one is gone.
        """
        try:
            about = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in self.files]
        except OSError as e:
            raise UserError("the file is not there any more", where=str(e.filename)) from e
        return (*about, self.model, self.template, self.cutoff, self.encoding)


@dataclass
class DatasetView:
    """A data set that was looked at. whole: all examples, whatever their length."""

    query: DatasetQuery
    report: DataReport
    whole: Dataset
    renderer: Renderer
    _rows: dict[str, list[tuple[str, Problem]]] = field(default_factory=dict)

    @cached_property
    def lengths(self) -> Lengths:
        return self.whole.lengths()

    def rows(self, action: Action | None = None) -> list[tuple[str, Problem]]:
        """(file's name, problem), in the order of the files; the first ROWS of them."""
        key = action or ""
        if key not in self._rows:
            every = chain.from_iterable(
                ((Path(f.path).name, p) for p in f.problems) for f in self.report.files
            )
            wanted = (row for row in every if action is None or row[1].action == action)
            self._rows[key] = list(islice(wanted, ROWS))
        return self._rows[key]

    def example(self, i: int) -> Example:
        return self.whole[i]


class DatasetCache:
    """The newest looks; safe for many threads, and nothing is prepared twice at once."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[object, ...], DatasetView] = OrderedDict()
        self._lock = threading.Lock()
        self._preparing: dict[tuple[object, ...], threading.Lock] = {}

    def get(
        self, query: DatasetQuery, progress: Callable[[str], None] = lambda _: None
    ) -> DatasetView:
        """The look at what is wished for.

        Args:
            progress: told what is being worked on.

        Raises: UserError where a file, the base or the template cannot be used.
        """
        key = query.marks()
        if (found := self._find(key)) is not None:
            return found
        with self._lock:
            preparing = self._preparing.setdefault(key, threading.Lock())
        with preparing:
            found = self._find(key) or _prepare(query, progress)
        with self._lock:
            self._preparing.pop(key, None)
            self._kept[key] = found
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return found

    def _find(self, key: tuple[object, ...]) -> DatasetView | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def watch(self, query: DatasetQuery) -> Iterator[str | DatasetView]:
        """What is being worked on, as it changes, and the look at the end.

        Raises: as `get`.
        """
        steps: list[str] = []
        results: list[DatasetView] = []
        errors: list[BaseException] = []

        def work() -> None:
            try:
                results.append(self.get(query, steps.append))
            except BaseException as e:
                errors.append(e)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        told = 0
        while worker.is_alive():
            worker.join(0.25)
            if len(steps) > told:
                told = len(steps)
                yield steps[-1]
        if errors:
            raise errors[0]
        yield results[0]


def _prepare(query: DatasetQuery, progress: Callable[[str], None]) -> DatasetView:
    settings = query.settings()
    renderer = renderer_for(settings)
    entries = [DatasetEntry(path=str(path)) for path in query.files]
    _, report = dataset.load(entries, settings, renderer, progress)
    # The same stores, now in the cache: every length counts, so nothing is dropped for it.
    whole = settings.model_copy(update={"cutoff_len": 1 << 30})
    found, _ = dataset.load(entries, whole, renderer)
    return DatasetView(query, report, found, renderer)
