"""How far the reading of a file is, in words: records, records a second, time left."""

from __future__ import annotations

import time
from collections.abc import Callable

_WIDTH = 24  # characters of the bar


class Pace:
    """Words for the progress of one file.

    clock: seconds, from any beginning.
    """

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._name, self._clock = name, clock
        self._began = clock()

    def words(self, records: int, share: float) -> str:
        """A line: `my.jsonl ━━━━━━──────  48%  336,000 records, 3,100 a second, 2 min left`.

        Args:
            records: done so far.
            share: of the file that they take, from 0 to 1; 0 if nobody knows.
        """
        seconds = max(self._clock() - self._began, 1e-9)
        text = f"{records:,} records, {records / seconds:,.0f} a second"
        if not 0 < share <= 1:
            return f"{self._name}: {text}"
        done = round(share * _WIDTH)
        bar = "━" * done + "─" * (_WIDTH - done)
        return f"{self._name} {bar} {share:4.0%}  {text}, {_left(seconds / share - seconds)} left"


def _left(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
