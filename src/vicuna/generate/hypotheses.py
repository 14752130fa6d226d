"""Branches that grow by a token, end, and are ranked: what all strategies share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from vicuna.errors import UserError
from vicuna.generate.events import FinishReason, TokenLogprob
from vicuna.generate.stream import TextStream
from vicuna.generate.tree import Node


class Grower:
    """Adds tokens to branches, with their text, and says which branches end.

    Args:
        end_ids: tokens that end an answer. Their spelling is no text, even where the vocabulary
            does not mark them special.
        longest: tokens of the longest answer.
        room: tokens that the context has room for.
    """

    def __init__(
        self, stream: TextStream, end_ids: Collection[int], longest: int, room: int
    ) -> None:
        self._stream, self._ends = stream, frozenset(end_ids)
        self.limit = min(longest, room)
        self._at_limit: FinishReason = "length" if longest <= room else "context"

    def grow(
        self, parent: Node, row: int, token_id: int, score: float, logprob: TokenLogprob | None
    ) -> Node:
        """The branch behind a token; its `reason` is set where it ends."""
        node = Node(parent, token_id, row, score, logprob)
        if token_id in self._ends:
            node.reason = "stop"
        else:
            node.piece, node.state = self._stream.push(node.state, token_id)
            if node.state.stopped:
                node.reason = "stop_string"
            elif node.length >= self.limit:
                node.reason = self._at_limit
        if node.reason:
            node.piece += self._stream.finish(node.state)
        return node

    def rest(self, node: Node) -> str:
        """Text of an open branch that was held back, where nothing follows any more."""
        return self._stream.finish(node.state)


class Ranked(NamedTuple):
    """A branch and what it counts."""

    score: float
    node: Node


class Pool:
    """The best finished branches, best first; of equal ones the earlier.

    Args:
        size: how many are kept.
        final: what a branch counts at the end.
    """

    def __init__(self, size: int, final: Callable[[Node], float]) -> None:
        self._size, self._final = size, final
        self.ranked: list[Ranked] = []

    def add(self, nodes: Iterable[Node]) -> None:
        """Take branches that have ended, or that are broken off."""
        self.ranked += [Ranked(self._final(n), n) for n in nodes]
        self.ranked.sort(key=lambda r: -r.score)
        del self.ranked[self._size :]

    @property
    def full(self) -> bool:
        """Whether a further branch only enters where it is better than the worst."""
        return len(self.ranked) == self._size

    @property
    def worst(self) -> float:
        """The score that a branch must beat to enter a full pool."""
        return self.ranked[-1].score


def log_softmax(scores: Tensor) -> Tensor:
    """Log-probabilities (n, V) of scores (n, V).

    Raises: UserError where the model computes no numbers.
    """
    logprobs = scores.log_softmax(1)
    # One bad number makes its whole row NaN; a token of probability 0 does not.
    if bool(torch.isnan(logprobs[:, 0]).any()):
        raise UserError(
            "the model's scores are not finite numbers",
            fix="Half precision may be too narrow for this model: try --precision bf16 or "
            "fp32. If it still happens, the weights or the adapter are damaged.",
        )
    return logprobs


def nothing_allowed() -> UserError:
    """Where the settings leave no token to go on with, and no answer has been finished."""
    return UserError(
        "the settings forbid every token that could come next",
        where="banned_words, logit_bias, no_repeat_ngram_size",
        fix="Loosen them: with a smaller vocabulary less is left to say.",
    )


class Logprobs:
    """Log-probabilities of chosen tokens and of the likeliest ones, where they are asked for.

    Args:
        count: of the likeliest ones; 0: nothing is asked for.
        logprobs: the model's own (n, V).
    """

    def __init__(self, count: int, logprobs: Tensor) -> None:
        self._logprobs = logprobs
        self._tops: list[tuple[tuple[int, float], ...]] = []
        if count:
            found = torch.topk(logprobs, min(count, logprobs.shape[1]), dim=1)
            pairs = zip(found.indices.tolist(), found.values.tolist())
            self._tops = [tuple(zip(ids, values)) for ids, values in pairs]

    def of(self, row: int, token_id: int) -> TokenLogprob | None:
        """That of a token behind a row."""
        if not self._tops:
            return None
        return TokenLogprob(token_id, float(self._logprobs[row, token_id]), self._tops[row])
