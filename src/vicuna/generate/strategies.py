"""Decode strategies: which branches grow by which tokens, and which answers are the best.

`GreedyOrSampling`: each row continues by itself until it ends. `BeamSearch`, which is beam-sample,
too, gives the results of transformers' `generate`: of all continuations of all beams the best
`num_beams` that do not end continue; those that end and are among the first `num_beams` become
finished branches, of which the best `num_beams` are kept. Beam-sample draws the continuations
without replacement instead of taking the best.

To add a strategy, write a class here and choose it in `strategy_for`; name it in
`config.decoding.STRATEGIES`, and give it a label in `web/texts/set.yaml`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vicuna.errors import UserError
from vicuna.generate.events import FinishReason, TokenLogprob
from vicuna.generate.processors import Processors
from vicuna.generate.sampling import (
    generators,
    logits_warpers,
    sample,
    sample_without_replacement,
    top,
)
from vicuna.generate.settings import Settings
from vicuna.generate.stream import TextStream
from vicuna.generate.tree import Node


class Strategy(Protocol):
    """Which branches grow by which tokens. pool: the finished ones."""

    pool: BeamHypotheses

    def choose(self, logits: Tensor, live: Sequence[Node]) -> list[Node]:
        """Go on by one token.

        Args:
            logits: of the next token behind each open branch (n, V), before softmax.
            live: the open branches (n); at first the root alone.

        Returns: the branches that are open now, best first where they compete; those that ended
            are in the pool.

        Raises: UserError if the logits are not finite, or no token is allowed.
        """
        ...

    def done(self, live: Sequence[Node]) -> bool:
        """Whether open branches need not go on."""
        ...

    def final(self, node: Node) -> float:
        """The score that a branch would have if it ended here."""
        ...


class BranchBuilder:
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


class Scored(NamedTuple):
    """A branch and its final score."""

    score: float
    node: Node


class BeamHypotheses:
    """The best finished branches, best first; of equal ones the earlier.

    Args:
        size: how many are kept.
        final: the final score of a branch.
    """

    def __init__(self, size: int, final: Callable[[Node], float]) -> None:
        self._size, self._final = size, final
        self.ranked: list[Scored] = []

    def add(self, nodes: Iterable[Node]) -> None:
        """Take branches that have ended, or that are broken off."""
        self.ranked += [Scored(self._final(n), n) for n in nodes]
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


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities (n, V) of logits (n, V).

    Raises: UserError where the model computes no numbers.
    """
    logprobs = logits.log_softmax(1)
    # One bad number makes its whole row NaN; a token of probability 0 does not.
    if bool(torch.isnan(logprobs[:, 0]).any()):
        raise UserError(
            "the model's logits are not finite numbers",
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


class GreedyOrSampling:
    """A `Strategy` without beams: one row for each answer, all from the same prompt.

    A branch's score is the sum of its log-probabilities under the model itself.
    """

    def __init__(self, settings: Settings, builder: BranchBuilder, processors: Processors) -> None:
        self._settings, self._builder, self._process = settings, builder, processors
        self._warpers = logits_warpers(settings)
        self._generators = generators(settings.seed, settings.num_return_sequences)
        self.pool = BeamHypotheses(settings.num_return_sequences, self.final)

    def final(self, node: Node) -> float:
        return node.score

    @torch.inference_mode()
    def choose(self, logits: Tensor, live: Sequence[Node]) -> list[Node]:
        logprobs = log_softmax(logits)
        wanted = self._process(logits)
        if self._settings.samples:
            for narrow in self._warpers:
                wanted = narrow(wanted)
            # All rows begin with the one of the prompt.
            rows = list(range(len(live))) if live[0].parent else [0] * len(self._generators)
            tokens = [sample(wanted[row], g) for row, g in zip(rows, self._generators)]
        else:
            rows = [0]
            tokens = [int(top(wanted, 1)[1])]
        if any(wanted[row, token] == -math.inf for row, token in zip(rows, tokens)):
            raise nothing_allowed()
        report = Logprobs(self._settings.logprobs, logprobs)
        grown = [
            self._builder.grow(
                live[row],
                row,
                token,
                live[row].score + float(logprobs[row, token]),
                report.of(row, token),
            )
            for row, token in zip(rows, tokens)
        ]
        self._generators = [g for g, node in zip(self._generators, grown) if not node.reason]
        self.pool.add(node for node in grown if node.reason)
        return [node for node in grown if not node.reason]

    def done(self, live: Sequence[Node]) -> bool:
        return not live


Grow = Callable[[int, int, float], Node]  # row, token, score


class Chosen(NamedTuple):
    """What a step makes of the beams: branches that go on, best first, and those that ended."""

    open: list[Node]
    ended: list[Node]


class BeamSearch:
    """A `Strategy` with beams.

    A branch's score is the sum of its log-probabilities as penalties and filters left them; at the
    end it is divided by length ** length_penalty.

    Args:
        ends: how many tokens end an answer; decides how many continuations are drawn.
    """

    def __init__(
        self, settings: Settings, builder: BranchBuilder, processors: Processors, ends: int
    ) -> None:
        self._settings, self._builder, self._process = settings, builder, processors
        self._beams = settings.num_beams
        self._draws = max(2, 1 + ends) * self._beams
        self._warpers = logits_warpers(settings, keep=1 + ends) if settings.samples else []
        self._generator = generators(settings.seed, 1)[0]
        self.pool = BeamHypotheses(self._beams, self.final)

    def final(self, node: Node) -> float:
        return node.score / max(node.length, 1) ** self._settings.length_penalty

    @torch.inference_mode()
    def choose(self, logits: Tensor, live: Sequence[Node]) -> list[Node]:
        logprobs = log_softmax(logits)
        wanted = self._process(logprobs)
        for narrow in self._warpers:
            wanted = narrow(wanted)
        report = Logprobs(self._settings.logprobs, logprobs)

        def grow(row: int, token: int, score: float) -> Node:
            return self._builder.grow(live[row], row, token, score, report.of(row, token))

        pick = self._drawn if self._settings.samples else self._best
        chosen = pick(wanted, live, grow)
        self.pool.add(chosen.ended)
        if not chosen.open and not self.pool.ranked:
            raise nothing_allowed()
        return chosen.open

    def done(self, live: Sequence[Node]) -> bool:
        """Whether no open beam is expected to beat the worst finished one.

        What an open beam may reach is judged by its score so far at its present length. With
        `early_stopping` "never" and a positive length penalty it is judged at the full length,
        where it would count most.
        """
        if not live:
            return True
        if not self.pool.full:
            return False
        s = self._settings
        if s.early_stopping is True:
            return True
        longest = s.early_stopping == "never" and s.length_penalty > 0
        length = self._builder.limit if longest else live[0].length
        return live[0].score / length**s.length_penalty <= self.pool.worst

    def _best(self, wanted: Tensor, live: Sequence[Node], grow: Grow) -> Chosen:
        """The branches among the best continuations."""
        last = live[0].length + 1 >= self._builder.limit  # all continuations end there
        chosen = Chosen([], [])
        for rank, (row, token, score) in enumerate(_best_first(wanted, live, 2 * self._beams)):
            if rank >= self._beams and (last or len(chosen.open) == self._beams):
                break
            node = grow(row, token, score)
            if not node.reason:
                chosen.open.append(node)
            elif rank < self._beams:
                chosen.ended.append(node)
        return chosen

    def _drawn(self, wanted: Tensor, live: Sequence[Node], grow: Grow) -> Chosen:
        """The branches among drawn continuations.

        As in transformers, those that end count if they are among the first `num_beams` drawn, and
        the best of all others go on.
        """
        total = wanted + _running(wanted, live)
        state = self._generator.get_state()
        count = self._draws
        while True:
            draws = sample_without_replacement(total, count, self._generator)
            nodes = [grow(row, token, float(total[row, token])) for row, token in draws]
            open_ = [n for n in nodes[: self._draws] if not n.reason]
            more = [n for n in nodes[self._draws :] if not n.reason]
            open_ += more[: max(0, self._beams - len(open_))]
            last = live[0].length + 1 >= self._builder.limit
            if last or len(open_) >= self._beams or len(draws) < count:
                open_.sort(key=lambda n: -n.score)
                ended = [n for n in nodes[: self._beams] if n.reason]
                return Chosen(open_[: self._beams], ended)
            # Stop strings ended so many that not enough are left: the same draws, and more.
            self._generator.set_state(state)
            count *= 2


def _running(wanted: Tensor, live: Sequence[Node]) -> Tensor:
    """The scores of the beams so far (n, 1)."""
    return torch.tensor([n.score for n in live], device=wanted.device)[:, None]


def _best_first(
    wanted: Tensor, live: Sequence[Node], depth: int
) -> Iterator[tuple[int, int, float]]:
    """All possible continuations of all beams as (row, token, score), best first.

    Takes the top `depth` tokens of each beam; past a beam's last one the order over all beams is
    unknown, so `depth` doubles.
    """
    size = wanted.shape[1]
    told: set[tuple[int, int]] = set()
    while True:
        depth = min(depth, size)
        values, ids = top(wanted, depth)
        totals = (values + _running(wanted, live)).flatten()
        order = totals.argsort(descending=True, stable=True).tolist()
        scores, tokens = totals.tolist(), ids.flatten().tolist()
        for place in order:
            row, rank = divmod(place, depth)
            found = row, tokens[place]
            if scores[place] == -math.inf:
                return
            if found not in told:
                told.add(found)
                yield *found, scores[place]
            if rank == depth - 1 and depth < size:
                break
        else:
            return
        depth *= 2


def strategy_for(
    settings: Settings, builder: BranchBuilder, processors: Processors, ends: int
) -> Strategy:
    """The strategy that the settings ask for.

    Args:
        ends: how many tokens end an answer.
    """
    if settings.num_beams > 1:
        return BeamSearch(settings, builder, processors, ends)
    return GreedyOrSampling(settings, builder, processors)
