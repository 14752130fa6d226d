"""Greedy decoding and sampling: each row goes its own way until it ends."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vicuna.generate.hypotheses import Grower, Logprobs, Pool, log_softmax, nothing_allowed
from vicuna.generate.processors import Processors
from vicuna.generate.sampling import draw, filters, generators, top
from vicuna.generate.settings import Settings
from vicuna.generate.tree import Node


class Rows:
    """A `Strategy` without beams: one row for each answer, all from the same prompt.

    A branch's score is the sum of its log-probabilities under the model itself.
    """

    def __init__(self, settings: Settings, grower: Grower, processors: Processors) -> None:
        self._settings, self._grower, self._process = settings, grower, processors
        self._filters = filters(settings)
        self._generators = generators(settings.seed, settings.num_return_sequences)
        self.pool = Pool(settings.num_return_sequences, self.final)

    def final(self, node: Node) -> float:
        """See `Strategy.final`."""
        return node.score

    @torch.inference_mode()
    def choose(self, scores: Tensor, live: Sequence[Node]) -> list[Node]:
        """See `Strategy.choose`."""
        logprobs = log_softmax(scores)
        wanted = self._process(scores)
        if self._settings.samples:
            for narrow in self._filters:
                wanted = narrow(wanted)
            # All rows begin with the one of the prompt.
            rows = list(range(len(live))) if live[0].parent else [0] * len(self._generators)
            tokens = [draw(wanted[row], g) for row, g in zip(rows, self._generators)]
        else:
            rows = [0]
            tokens = [int(top(wanted, 1)[1])]
        if any(wanted[row, token] == -math.inf for row, token in zip(rows, tokens)):
            raise nothing_allowed()
        report = Logprobs(self._settings.logprobs, logprobs)
        grown = [
            self._grower.grow(
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
        """See `Strategy.done`."""
        return not live
