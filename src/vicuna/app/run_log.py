"""What a run has said of itself so far: its `log.jsonl`, read as it grows.

Numbers of steps lie in arrays, because a long run has hundreds of thousands of them; whatever a
page asks for is answered from here without reading the file again.
"""

from __future__ import annotations

import json
import math
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The numbers of a step that are kept, by their names in the log.
COLUMNS = ("step", "loss", "learning_rate", "tokens_per_second", "memory_gib", "time")
# The time left is told from so many steps: evaluations and checkpoints between them count, too.
RECENT = 30
BLOCK = 1 << 20


@dataclass
class RunLog:
    """The events of a run. `read` takes in what is new; the rest only looks.

    steps: a column for each of COLUMNS, NaN where a step has none (a loss that is not finite).
    began: the last `start`. end: the `end` after it, if the run came so far. last: the newest
    event. first_time: when the first one was written.
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
                found = False
                while block := file.read(BLOCK):
                    found = True
                    self._at += len(block)
                    self._take(block)
                return found
        except FileNotFoundError:
            found = bool(self._at)
            self._forget()
            return found

    def _forget(self) -> None:
        self.steps = {name: array("d") for name in COLUMNS}
        self.evaluations, self.samples, self.warnings = [], [], []
        self.began, self.end, self.last = {}, {}, {}
        self.first_time = 0.0
        self._at, self._file, self._rest = 0, 0, b""

    def _take(self, block: bytes) -> None:
        """Whole lines become events; what follows the last one waits for the rest of its line."""
        *lines, self._rest = (self._rest + block).split(b"\n")
        for line in lines:
            try:
                event = json.loads(line.decode("utf-8", "replace"))
            except ValueError:
                continue
            if isinstance(event, dict):
                self._add(event)

    def _add(self, event: dict[str, Any]) -> None:
        kind = event.get("event")
        if kind == "step":
            for name in COLUMNS:
                value = event.get(name)
                self.steps[name].append(math.nan if value is None else float(value))
        elif kind == "eval":
            self.evaluations.append(event)
        elif kind == "sample":
            self.samples.append(event)
        elif kind == "warning":
            self.warnings.append(event)
        elif kind == "start":
            self.began, self.end = event, {}
        elif kind == "end":
            self.end = event
        self.last = event
        self.first_time = self.first_time or float(event.get("time", 0.0))

    # What it says.

    @property
    def step(self) -> int:
        """Updates done."""
        done = [int(e.get("step", 0)) for e in (self.began, self.end) if e]
        if self.steps["step"]:
            done.append(int(self.steps["step"][-1]))
        return max(done, default=0)

    @property
    def total(self) -> int:
        """Updates of the whole run; 0 while it is not known."""
        return int(self.began.get("total_steps", 0))

    def now(self, name: str) -> float | None:
        """The newest number of a column that is one."""
        for value in reversed(self.steps[name]):
            if not math.isnan(value):
                return value
        return None

    def seconds_left(self) -> float | None:
        """Until the last update, at the pace of the newest ones; None while nobody can tell."""
        began = float(self.began.get("time", 0.0))
        times = [t for t in self.steps["time"][-RECENT:] if t >= began]
        steps = self.steps["step"][-len(times) :] if times else array("d")
        missing = self.total - self.step
        if len(times) < 2 or missing <= 0 or steps[-1] <= steps[0]:
            return None
        return missing * (times[-1] - times[0]) / (steps[-1] - steps[0])
