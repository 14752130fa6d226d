"""Beam search and beam-sample, with the results of transformers' `generate`.

Of all continuations of all beams the best `num_beams` that do not end go on; those that end and
stand among the first `num_beams` become finished branches, of which the best `num_beams` are kept.
Beam-sample draws the continuations without replacement, in place of taking the best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vicuna.generate.hypotheses import Grower, Logprobs, Pool, log_softmax, nothing_allowed
from vicuna.generate.processors import Processors
from vicuna.generate.sampling import draw_distinct, filters, generators, top
from vicuna.generate.settings import Settings
from vicuna.generate.tree import Node

Grow = Callable[[int, int, float], Node]  # row, token, score


class Chosen(NamedTuple):
    """What a step makes of the beams: branches that go on, best first, and those that ended."""

    open: list[Node]
    ended: list[Node]


class Beams:
    """A `Strategy` with beams.

    A branch's score is the sum of its log-probabilities as penalties and filters left them; at the
    end it is divided by length ** length_penalty.

    Args:
        ends: how many tokens end an answer; decides how many continuations are drawn.
    """

    def __init__(
        self, settings: Settings, grower: Grower, processors: Processors, ends: int
    ) -> None:
        self._settings, self._grower, self._process = settings, grower, processors
        self._beams = settings.num_beams
        self._draws = max(2, 1 + ends) * self._beams
        self._filters = filters(settings, keep=1 + ends) if settings.samples else []
        self._generator = generators(settings.seed, 1)[0]
        self.pool = Pool(self._beams, self.final)

    def final(self, node: Node) -> float:
        """See `Strategy.final`."""
        return node.score / max(node.length, 1) ** self._settings.length_penalty

    @torch.inference_mode()
    def choose(self, scores: Tensor, live: Sequence[Node]) -> list[Node]:
        """See `Strategy.choose`."""
        logprobs = log_softmax(scores)
        wanted = self._process(logprobs)
        for narrow in self._filters:
            wanted = narrow(wanted)
        report = Logprobs(self._settings.logprobs, logprobs)

        def grow(row: int, token: int, score: float) -> Node:
            return self._grower.grow(live[row], row, token, score, report.of(row, token))

        pick = self._drawn if self._settings.samples else self._best
        chosen = pick(wanted, live, grow)
        self.pool.add(chosen.ended)
        if not chosen.open and not self.pool.ranked:
            raise nothing_allowed()
        return chosen.open

    def done(self, live: Sequence[Node]) -> bool:
        """See `Strategy.done`. Whether no open beam is expected to beat the worst finished one.

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
        length = self._grower.limit if longest else live[0].length
        return live[0].score / length**s.length_penalty <= self.pool.worst

    def _best(self, wanted: Tensor, live: Sequence[Node], grow: Grow) -> Chosen:
        """The branches among the best continuations."""
        last = live[0].length + 1 >= self._grower.limit  # all continuations end there
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
            draws = draw_distinct(total, count, self._generator)
            nodes = [grow(row, token, float(total[row, token])) for row, token in draws]
            open_ = [n for n in nodes[: self._draws] if not n.reason]
            more = [n for n in nodes[self._draws :] if not n.reason]
            open_ += more[: max(0, self._beams - len(open_))]
            last = live[0].length + 1 >= self._grower.limit
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

    At first the `depth` best of each beam are looked at. Behind the last of them of any beam the
    order is not known, and more are.
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
