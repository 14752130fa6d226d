"""Which examples make up step k: a function of the seed and k alone.

An epoch takes `weight * n` examples of each data set, drawn from the data set's own endless stream
of permutations, and shuffles them together; the epochs laid end to end, cut every `batch_size`
examples, are the steps. Permutations come from an integer hash, not from a library's generator, so
they are the same on every machine and in every version.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_U64 = np.uint64


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al., OOPSLA 2014): uint64 (...) to well-mixed uint64."""
    with np.errstate(over="ignore"):
        x = x + _U64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
        return x ^ (x >> _U64(31))


def permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of range(n) decided by the key: int64 (n,)."""
    state = np.zeros(1, _U64)
    for part in key:
        state = mix(state ^ _U64(part & 0xFFFFFFFFFFFFFFFF))
    return np.argsort(mix(np.arange(n, dtype=_U64) ^ state), kind="stable")


@dataclass(frozen=True)
class WeightedIndices:
    """The examples of one data set and how many times an epoch sees each of them."""

    indices: np.ndarray
    weight: float = 1.0


class Sampler:
    """The endless sequence of examples.

    Args:
        groups: at least one, none empty.
        batch_size: examples in a step.
        seed: decides every permutation.
    """

    def __init__(self, groups: Sequence[WeightedIndices], batch_size: int, seed: int) -> None:
        self.groups = list(groups)
        self.batch_size = batch_size
        self.seed = seed
        self._per_epoch = [max(1, round(g.weight * len(g.indices))) for g in self.groups]
        self.epoch_size = sum(self._per_epoch)
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def steps(self, epochs: float) -> int:
        """Steps that see every example at least `epochs` times."""
        examples = round(self.epoch_size * epochs)
        return max(1, -(-examples // self.batch_size))

    def step(self, k: int) -> np.ndarray:
        """Indices of the examples of step k (0-based): int64 (batch_size,)."""
        start = k * self.batch_size
        taken: list[np.ndarray] = []
        need = self.batch_size
        while need:
            epoch, offset = divmod(start, self.epoch_size)
            part = self._epoch(epoch)[offset : offset + need]
            taken.append(part)
            start += len(part)
            need -= len(part)
        return np.concatenate(taken)

    def _make_epoch(self, epoch: int) -> np.ndarray:
        parts = [
            self._stream(g, group.indices, epoch * m, m)
            for g, (group, m) in enumerate(zip(self.groups, self._per_epoch))
        ]
        together = np.concatenate(parts)
        return together[permutation(len(together), self.seed, 1, epoch)]

    def _stream(self, g: int, indices: np.ndarray, start: int, count: int) -> np.ndarray:
        """`count` examples of group g's endless stream of permutations, from `start` on."""
        n = len(indices)
        taken: list[np.ndarray] = []
        while count:
            lap, offset = divmod(start, n)
            part = indices[permutation(n, self.seed, 2, g, lap)][offset : offset + count]
            taken.append(part)
            start += len(part)
            count -= len(part)
        return np.concatenate(taken)


def split_validation(
    question_hashes: np.ndarray, val_size: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split examples into (training, validation) indices.

    The hash of a record's question decides, so all answers to one question fall on the same side
    and adding data does not move what was already there.

    Args:
        question_hashes: uint64 (n,).
        val_size: a count where >= 1, else a fraction.
    """
    n = len(question_hashes)
    want = int(val_size) if val_size >= 1 else round(val_size * n)
    order = np.argsort(mix(question_hashes ^ mix(np.array([seed], _U64))), kind="stable")
    last = want
    while 0 < last < n and question_hashes[order[last]] == question_hashes[order[last - 1]]:
        last += 1
    return np.sort(order[last:]), np.sort(order[:last])
