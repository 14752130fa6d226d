"""How long the examples are, and what a cutoff would lose of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

CUTOFFS = (256, 512, 1024, 2048, 4096)


class Lost(NamedTuple):
    """What a cutoff loses: shares of examples, and tokens.

    longer: examples beyond the cutoff. answer_lost: of whose answer nothing is left where they are
    cut. tokens_dropped: left out with `overlong: drop`. tokens_cut: with `overlong: cut`.
    """

    longer: float
    answer_lost: float
    tokens_dropped: int
    tokens_cut: int


@dataclass(frozen=True)
class Lengths:
    """Of each example: its tokens, and where the first that is learned stands."""

    tokens: np.ndarray
    first_target: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def lost(self, cutoff: int) -> Lost:
        """What a cutoff loses of these examples."""
        if not len(self):
            return Lost(0.0, 0.0, 0, 0)
        beyond = self.tokens > cutoff
        long = self.tokens[beyond].astype(np.int64)
        return Lost(
            float(beyond.mean()),
            float((self.first_target >= cutoff).mean()),
            int(long.sum()),
            int((long - cutoff).sum()),
        )

    def quantile(self, percent: float) -> int:
        return int(np.percentile(self.tokens, percent)) if len(self) else 0

    @property
    def longest(self) -> int:
        return int(self.tokens.max()) if len(self) else 0

    def histogram(self, limit: int, bars: int) -> list[int]:
        """Examples in bars of equal width from 0 to `limit`; the last holds all longer ones too."""
        width = limit / bars
        places = np.minimum((np.maximum(self.tokens - 1, 0) / width).astype(np.int64), bars - 1)
        counted: list[int] = np.bincount(places, minlength=bars).tolist()
        return counted
