"""How far the reading of a file is, in words: records, records a second, time left."""

from __future__ import annotations

import time
from collections.abc import Callable

_WIDTH = 12  # characters of the bar


class Pace:
    """Says how far one file is.

    say: given a line at each call. clock: seconds, from any beginning.
    """

    def __init__(
        self, name: str, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._name, self._say, self._clock = name, say, clock
        self._began = clock()

    def __call__(self, records: int, share: float) -> None:
        """Say a line: `my.jsonl ━━━━━━────── 48%  336,000 records, 3,100/s, 2 min left`.

        Args:
            records: done so far.
            share: of the file that they take, from 0 to 1; 0 if nobody knows.
        """
        seconds = max(self._clock() - self._began, 1e-9)
        text = f"{records:,} records, {records / seconds:,.0f}/s"
        if not 0 < share <= 1:
            self._say(f"{self._name}: {text}")
            return
        done = round(share * _WIDTH)
        bar = "━" * done + "─" * (_WIDTH - done)
        left = _left(seconds / share - seconds)
        self._say(f"{self._name} {bar} {share:4.0%}  {text}, {left} left")


def _left(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
