"""The learning rate at step k: linear, cosine or constant, after a warm-up."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """A learning rate for each of `total` steps.

    The first step already learns (rate peak / warmup), the last one still does.
    """

    kind: str
    peak: float
    total: int
    warmup: int

    def rate(self, k: int) -> float:
        """The learning rate of step k (0-based)."""
        if k < self.warmup:
            return self.peak * (k + 1) / self.warmup
        if self.kind == "constant":
            return self.peak
        progress = (k - self.warmup) / max(1, self.total - self.warmup)
        if self.kind == "cosine":
            return self.peak * 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.peak * (1.0 - progress)


def warmup_steps(total: int, ratio: float, steps: int) -> int:
    """Steps to warm up: as asked, but never more than a fifth of the run.

    With 300 records and 100 warm-up steps the 2023 project never reached its learning rate.
    """
    wanted = steps or math.ceil(total * ratio)
    return min(wanted, total // 5)


def continued_total(old_total: int, old_step: int, new_steps: int) -> int:
    """Length of the schedule when a run goes on with new data (incremental training).

    The 2023 project's rule: the new data's own number of steps where that is larger, else the old
    run's, so that the new data stands directly behind the old on the old schedule. Where nothing
    would be left of that (the old run was finished; the original then trained nothing and said
    nothing), the schedule is stretched by the new data's steps.
    """
    total = max(old_total, new_steps)
    return total if total > old_step else old_step + new_steps
