"""The log of a run, `log.jsonl`, read while it grows.

The numbers of steps are kept in arrays, because a long run has hundreds of thousands of them; a
page is answered from here without reading the file again.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vicuna import untrusted
from vicuna.messages import restored

# The numbers of a step that are kept, by their names in the log.
COLUMNS = ("step", "loss", "learning_rate", "tokens_per_second", "memory_gib", "time")
# The time left is told from so many steps: evaluations and checkpoints between them count, too.
RECENT = 30
BLOCK = 1 << 20
LINE = 16 << 20  # bytes of an event
KEPT = 10_000  # of evaluations, samples and warnings, the newest each
_LATEST = 2.0**33  # seconds since 1970: the year 2242
# What an event must be made of: what is told from it relies on that.
_COUNTS = ("step", "total_steps", "time")
_NUMBERS = ("loss", *COLUMNS)
_TEXTS = ("event", "prompt", "answer", "message", "reason")


@dataclass
class RunLog:
    """The events of a run. `read` takes in what is new; the rest only looks.

    steps: a column for each of COLUMNS, NaN where a step has none (a loss that is not finite).
    began: the last `start`. end: the `end` after it, if the run came so far. last: the newest
    event. first_time: when the first one was written. odd: lines that no run writes.
    """

    path: Path
    steps: dict[str, array[float]] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[dict[str, Any]] = field(default_factory=list)
    began: dict[str, Any] = field(default_factory=dict)
    end: dict[str, Any] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    first_time: float = 0.0
    odd: int = 0
    _at: int = 0
    _file: int = 0
    _rest: bytes = b""

    def __post_init__(self) -> None:
        self._forget()

    def read(self) -> bool:
        """Take in what was written since; whether there was anything.

        A log that was replaced (a resumed run begins a new one) is read from its beginning.
        """
        try:
            with self.path.open("rb") as file:
                about = self.path.stat()
                if about.st_ino != self._file or about.st_size < self._at:
                    self._forget()
                    self._file = about.st_ino
                file.seek(self._at)
                grown = False
                while block := file.read(BLOCK):
                    grown = True
                    self._at += len(block)
                    self._take(block)
                return grown
        except FileNotFoundError:
            grown = bool(self._at)
            self._forget()
            return grown

    def _forget(self) -> None:
        self.steps = {name: array("d") for name in COLUMNS}
        self.evaluations, self.samples, self.warnings = [], [], []
        self.began, self.end, self.last = {}, {}, {}
        self.first_time, self.odd = 0.0, 0
        self._at, self._file, self._rest = 0, 0, b""

    def _take(self, block: bytes) -> None:
        """Whole lines become events; what follows the last one waits for the rest of its line."""
        *lines, self._rest = (self._rest + block).split(b"\n")
        if len(self._rest) > LINE:
            self._rest = b"x"  # what follows belongs to no event
        for line in lines:
            if not line.strip():
                continue
            try:
                self._add(_event(line))
            except (ValueError, TypeError, OverflowError):
                self.odd += 1

    def _add(self, event: dict[str, Any]) -> None:
        event_type = event.get("event")
        if event_type == "step":
            for name in COLUMNS:
                value = event.get(name)
                self.steps[name].append(math.nan if value is None else value)
        elif event_type == "eval":
            _keep(self.evaluations, event)
        elif event_type == "sample":
            _keep(self.samples, event)
        elif event_type == "warning":
            _keep(self.warnings, event)
        elif event_type == "start":
            self.began, self.end = event, {}
        elif event_type == "end":
            self.end = event
        self.last = event
        self.first_time = self.first_time or float(event.get("time", 0.0))

    # What it says.

    @property
    def step(self) -> int:
        """Steps done."""
        done = [int(e.get("step", 0)) for e in (self.began, self.end) if e]
        if self.steps["step"]:
            done.append(int(self.steps["step"][-1]))
        return max(done, default=0)

    @property
    def total(self) -> int:
        """Steps of the whole run; 0 while it is not known."""
        return int(self.began.get("total_steps", 0))

    def now(self, name: str) -> float | None:
        """The newest number of a column that is one."""
        for value in reversed(self.steps[name]):
            if not math.isnan(value):
                return value
        return None

    def seconds_left(self) -> float | None:
        """Until the last step, at the pace of the newest ones; None while it is not known."""
        began = float(self.began.get("time", 0.0))
        times = [t for t in self.steps["time"][-RECENT:] if t >= began]
        steps = self.steps["step"][-len(times) :] if times else array("d")
        missing = self.total - self.step
        if len(times) < 2 or missing <= 0 or steps[-1] <= steps[0]:
            return None
        return missing * (times[-1] - times[0]) / (steps[-1] - steps[0])


def _event(line: bytes) -> dict[str, Any]:
    """A line as an event whose numbers are numbers, and whose texts can be shown.

    Raises: ValueError, TypeError, OverflowError if it is not one.
    """
    event = untrusted.parse_json(line.decode("utf-8", "replace"))
    if not isinstance(event, dict):
        raise ValueError("no table")
    checked = dict(event)
    for name in {*_COUNTS, *_NUMBERS} & event.keys():
        value = event[name]
        if name in _COUNTS:
            checked[name] = untrusted.number(value)
            if not 0 <= checked[name] <= untrusted.LARGEST:
                raise ValueError(f"{name} is no count")
        elif value is not None:
            number = untrusted.number(value)
            checked[name] = None if math.isnan(number) else number
    for name in _TEXTS:
        if name in event:
            checked[name] = untrusted.text(event[name])
    checked = restored(checked, untrusted.text)
    if checked.get("event") in ("step", "eval") and "step" not in checked:
        raise ValueError("which step is not said")
    if checked.get("event") in ("start", "end"):
        checked.setdefault("time", 0.0)
    if checked.get("time", 0.0) > _LATEST:
        raise ValueError("no time")
    return checked


def _keep(events: list[dict[str, Any]], event: dict[str, Any]) -> None:
    events.append(event)
    if len(events) > 2 * KEPT:
        del events[:KEPT]
