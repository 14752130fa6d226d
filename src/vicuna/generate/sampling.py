"""From scores to the next token: penalty, temperature, filters, and the draw.

Each function takes and returns scores (V,), float32 before softmax; what is filtered out becomes
-inf. Order and meaning are those of transformers' `generate`, so that its settings carry over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from vicuna.errors import UserError
from vicuna.generate.settings import Settings

# Nucleus sampling sorts; among so many of the likeliest tokens the nucleus nearly always lies.
_NUCLEUS = 1024


def penalise(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Repetition penalty of CTRL (Keskar et al. 2019, arXiv 1909.05858).

    Args:
        seen: bool (V,), the tokens of the prompt and of the answer so far.
        penalty: positive scores are divided by it, negative ones multiplied.
    """
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def temper(scores: Tensor, temperature: float) -> Tensor:
    """Temperature (Ackley, Hinton and Sejnowski 1985). The maximum becomes 0 first: the same
    distribution, and no overflow however small the temperature is."""
    return (scores - scores.max()) / temperature


def top_k(scores: Tensor, k: int) -> Tensor:
    """Keep the k likeliest (Fan, Lewis and Dauphin 2018, arXiv 1805.04833)."""
    least = torch.topk(scores, min(k, scores.numel())).values[-1]
    return scores.masked_fill(scores < least, -math.inf)


def top_p(scores: Tensor, p: float) -> Tensor:
    """Nucleus sampling (Holtzman et al. 2019, arXiv 1904.09751): the fewest of the likeliest that
    have at least the probability p together."""
    total = scores.logsumexp(0)
    size = min(_NUCLEUS, scores.numel())
    values, ids = torch.topk(scores, size)
    if size < scores.numel() and (values - total).exp().sum() < p:
        values, ids = torch.sort(scores, descending=True, stable=True)
    probabilities = (values - total).exp()
    before = probabilities.cumsum(0) - probabilities
    kept = before < p
    kept[0] = True
    return torch.full_like(scores, -math.inf).scatter(0, ids[kept], values[kept])


def min_p(scores: Tensor, p: float) -> Tensor:
    """Min-p (Nguyen et al. 2024, arXiv 2407.01082): drop what is less likely than p times the
    likeliest."""
    return scores.masked_fill(scores < scores.max() + math.log(p), -math.inf)


def draw(scores: Tensor, generator: torch.Generator) -> int:
    """Draw a token from softmax(scores) with one random number, by the inverse of its cumulative
    distribution. In float64, so that rounding over a large vocabulary favours nobody; on the CPU,
    so that a seed means the same on every device."""
    cumulative = scores.cpu().double().softmax(0).cumsum(0)
    at = torch.rand(1, generator=generator, dtype=torch.float64)
    drawn = int(torch.searchsorted(cumulative, at * cumulative[-1], right=True))
    # A product rounded up to the very end of the distribution lies behind the last token.
    return drawn if drawn < scores.numel() else int(scores.argmax())


class Chooser:
    """Chooses the next token by the settings; remembers what was said.

    Args:
        prompt_ids: count as said, for the repetition penalty.
        stop_ids: what `min_new_tokens` forbids at first.
    """

    def __init__(
        self, settings: Settings, prompt_ids: Sequence[int], stop_ids: Collection[int]
    ) -> None:
        self.settings = settings
        self._prompt = list(prompt_ids)
        self._stops = torch.tensor(sorted(stop_ids), dtype=torch.long)
        self._chosen = 0
        self._seen: Tensor | None = None
        self._filters = _filters(settings)
        self._generator = torch.Generator()
        if settings.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(settings.seed)

    def __call__(self, scores: Tensor) -> tuple[int, float]:
        """The chosen token and its log-probability under the scores as the model gave them.

        Raises: UserError where the model computes no numbers.
        """
        total = float(scores.logsumexp(0))
        if not math.isfinite(total):
            raise UserError(
                "the model's scores are not finite numbers",
                fix="Half precision may be too narrow for this model: try --precision bf16 or "
                "fp32. If it still happens, the weights or the adapter are damaged.",
            )
        wanted = self._forbid_end(self._penalise(scores))
        if self.settings.samples:
            for narrow in self._filters:
                wanted = narrow(wanted)
            token = draw(wanted, self._generator)
        else:
            token = int(wanted.argmax())
        self._chosen += 1
        if self._seen is not None:
            self._seen[token] = True
        return token, float(scores[token]) - total

    def _penalise(self, scores: Tensor) -> Tensor:
        if self.settings.repetition_penalty == 1.0:
            return scores
        if self._seen is None:
            self._seen = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
            self._seen[self._prompt] = True
        return penalise(scores, self._seen, self.settings.repetition_penalty)

    def _forbid_end(self, scores: Tensor) -> Tensor:
        if self._chosen >= self.settings.min_new_tokens:
            return scores
        return scores.index_fill(0, self._stops.to(scores.device), -math.inf)


def _filters(settings: Settings) -> list[Callable[[Tensor], Tensor]]:
    """What narrows the distribution before a draw, in order; only what does something."""
    s = settings
    steps: list[Callable[[Tensor], Tensor]] = []
    if s.temperature != 1:
        steps.append(lambda scores: temper(scores, s.temperature))
    if s.top_k:
        steps.append(lambda scores: top_k(scores, s.top_k))
    if s.top_p < 1:
        steps.append(lambda scores: top_p(scores, s.top_p))
    if s.min_p:
        steps.append(lambda scores: min_p(scores, s.min_p))
    return steps
