"""Compare two models over the same texts: KL divergence, perplexity, agreement."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vicuna.errors import UserError
from vicuna.verify.logits import LogitSource, Texts

_ROWS = 32  # positions compared at a time: over 128,000 tokens each takes a megabyte in float64


@dataclass(frozen=True)
class Distance:
    """What a change did to one kind of text.

    tokens: positions compared. perplexity: of the text itself, before and after. kl: nats from the
    model before to that after, over the next token, its mean and its largest. agreement: fraction
    of positions with the same most likely token.
    """

    tokens: int
    perplexity_before: float
    perplexity_after: float
    mean_kl: float
    largest_kl: float
    largest_logit_difference: float
    agreement: float

    @property
    def perplexity_ratio(self) -> float:
        """Above 1: the text surprises more than before."""
        return self.perplexity_after / self.perplexity_before


@dataclass(frozen=True)
class Comparison:
    """The distances, by kind of text."""

    texts: dict[str, Distance]

    @property
    def mean_kl(self) -> float:
        """The largest mean of the kinds of text: none may hide behind another."""
        return max(d.mean_kl for d in self.texts.values())

    @property
    def perplexity_ratio(self) -> float:
        """The largest of the kinds of text."""
        return max(d.perplexity_ratio for d in self.texts.values())

    @property
    def largest_logit_difference(self) -> float:
        return max(d.largest_logit_difference for d in self.texts.values())

    def to_json(self) -> dict[str, Any]:
        """For report.json."""
        return {
            kind: {**asdict(d), "perplexity_ratio": d.perplexity_ratio}
            for kind, d in self.texts.items()
        }


class _Sums:
    """One kind of text, added up position by position."""

    def __init__(self) -> None:
        self.positions = self.targets = self.agreed = 0
        self.loss_before = self.loss_after = self.kl = 0.0
        self.largest_kl = self.largest_difference = 0.0

    def add(self, before: np.ndarray, after: np.ndarray, ids: Sequence[int]) -> None:
        """Logits (T, V) of both, and the text's ids (T,)."""
        # A file may hold rows for padding that the other lacks; no text has those tokens.
        shared = min(before.shape[1], after.shape[1])
        for start in range(0, len(ids), _ROWS):
            rows = slice(start, start + _ROWS)
            targets = ids[start + 1 : start + _ROWS + 1]
            self._add(before[rows, :shared], after[rows, :shared], targets)

    def _add(self, before: np.ndarray, after: np.ndarray, targets: Sequence[int]) -> None:
        p, q = _log_softmax(before), _log_softmax(after)
        kl = np.maximum((np.exp(p) * (p - q)).sum(axis=1), 0.0)
        self.positions += len(before)
        self.targets += len(targets)
        self.kl += float(kl.sum())
        self.largest_kl = max(self.largest_kl, float(kl.max()))
        self.agreed += int((before.argmax(axis=1) == after.argmax(axis=1)).sum())
        difference = float(np.abs(before.astype(np.float64) - after).max())
        self.largest_difference = max(self.largest_difference, difference)
        at = np.arange(len(targets))
        self.loss_before -= float(p[at, targets].sum())
        self.loss_after -= float(q[at, targets].sum())

    def distance(self) -> Distance:
        return Distance(
            tokens=self.positions,
            perplexity_before=_exp(self.loss_before / self.targets),
            perplexity_after=_exp(self.loss_after / self.targets),
            mean_kl=self.kl / self.positions,
            largest_kl=self.largest_kl,
            largest_logit_difference=self.largest_difference,
            agreement=self.agreed / self.positions,
        )


def compare(before: LogitSource, after: LogitSource, texts: Mapping[str, Texts]) -> Comparison:
    """Both models over all texts, one text's logits in memory at a time.

    Args:
        texts: token ids, two at least in each text, by kind of text.

    Raises: UserError if a model gives NaN or Inf.
    """
    kinds = [(kind, list(ids)) for kind, of_kind in texts.items() for ids in of_kind]
    every = [ids for _, ids in kinds]
    sums = {kind: _Sums() for kind in texts}
    for (kind, ids), a, b in zip(kinds, before.logits(every), after.logits(every)):
        for logits, who in ((a, "the source"), (b, "the result")):
            if not np.isfinite(logits).all():
                raise UserError(
                    "{who} gives logits that are not finite",
                    who=who,
                    fix="Its weights contain NaN or Inf, or overflow in its data type; "
                    "bf16 has a wider range than fp16.",
                )
        sums[kind].add(a, b, ids)
    return Comparison({kind: s.distance() for kind, s in sums.items()})


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64: differences are looked for that float32 would round away."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))
