"""From logits to sampled tokens: temperature, filters (logits warpers), and sampling.

Filters take and return logits (n, V), float32 before softmax, a row for each branch; what is
filtered out becomes -inf. Order and meaning are those of transformers' `generate`, so that its
settings carry over. `keep` is the number of tokens that a filter leaves at least: with beams one
more than there are end tokens, so that no beam runs dry.
"""

from __future__ import annotations

import hashlib
import math
from bisect import insort
from collections.abc import Callable

import torch
from torch import Tensor

from vicuna.generate.settings import Settings

# Nucleus sampling sorts; among so many of the likeliest tokens the nucleus is looked for first.
_NUCLEI = (64, 1024)
# `top` finds the highest logits through the highest of each block of so many.
_BLOCK = 64
# Tokens of each row that get a random number of their own where beams are drawn.
_HEAD = 128

Warper = Callable[[Tensor], Tensor]


def top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of each row and their places, (n, k), highest first.

    On the CPU several times faster than `torch.topk` over a whole vocabulary: the k highest lie in
    the k blocks whose maxima are highest. For k = 1 the first of equal ones is taken.
    """
    n, size = logits.shape
    k = min(k, size)
    blocks = size // _BLOCK
    if logits.device.type != "cpu" or blocks < 4 * k:
        return torch.topk(logits, k, dim=1)
    blocked = logits[:, : blocks * _BLOCK].view(n, blocks, _BLOCK)
    maxima = blocked.amax(2)
    if k == 1:
        chosen = maxima.argmax(1, keepdim=True)
    else:
        chosen = torch.topk(maxima, k, dim=1, sorted=False).indices
    values = blocked.gather(1, chosen[:, :, None].expand(-1, -1, _BLOCK)).reshape(n, -1)
    inside = torch.arange(_BLOCK, device=logits.device)
    places = (chosen[:, :, None] * _BLOCK + inside).reshape(n, -1)
    if blocks * _BLOCK < size:
        rest = torch.arange(blocks * _BLOCK, size, device=logits.device)
        values = torch.cat([values, logits[:, blocks * _BLOCK :]], 1)
        places = torch.cat([places, rest.expand(n, -1)], 1)
    if k == 1:
        best = values.argmax(1, keepdim=True)
        return values.gather(1, best), places.gather(1, best)
    found = torch.topk(values, k, dim=1)
    return found.values, places.gather(1, found.indices)


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Temperature (Ackley, Hinton and Sejnowski 1985)."""
    return logits / temperature


def apply_temperature_shifted(logits: Tensor, temperature: float) -> Tensor:
    """The same distribution as `apply_temperature`, shifted to a maximum of 0, so that it does not
    overflow at any temperature. For sampling only: beams add log-probabilities up."""
    return (logits - logits.amax(1, keepdim=True)) / temperature


def top_k(logits: Tensor, k: int, keep: int = 1) -> Tensor:
    """Keep the k likeliest (Fan, Lewis and Dauphin 2018, arXiv 1805.04833)."""
    least = top(logits, max(k, keep))[0][:, -1:]
    return logits.masked_fill(logits < least, -math.inf)


def top_p(logits: Tensor, p: float, keep: int = 1) -> Tensor:
    """Nucleus sampling (Holtzman et al. 2019, arXiv 1904.09751): the fewest of the likeliest that
    have at least the probability p together."""
    total = logits.logsumexp(1, keepdim=True)
    for size in _NUCLEI:
        values, ids = top(logits, max(size, keep))
        probabilities = (values - total).exp()
        if bool((probabilities.sum(1) > p).all()):
            break
    else:
        values, ids = torch.sort(logits, dim=1, descending=True, stable=True)
        probabilities = (values - total).exp()
    before = probabilities.cumsum(1) - probabilities
    kept = before < p
    kept[:, :keep] = True
    kept_values = values.masked_fill(~kept, -math.inf)
    return torch.full_like(logits, -math.inf).scatter(1, ids, kept_values)


def min_p(logits: Tensor, p: float, keep: int = 1) -> Tensor:
    """Min-p (Nguyen et al. 2024, arXiv 2407.01082): drop what is less likely than p times the
    likeliest."""
    best = top(logits, keep)[0]
    least = torch.minimum(best[:, :1] + math.log(p), best[:, -1:])
    return logits.masked_fill(logits < least, -math.inf)


def typical_p(logits: Tensor, p: float, keep: int = 1) -> Tensor:
    """Locally typical sampling (Meister et al. 2022, arXiv 2202.00666): of the tokens whose
    information is nearest to the expected one, the fewest that have the probability p together."""
    logprobs = logits.log_softmax(1)
    probabilities = logprobs.exp()
    entropy = -(logprobs * probabilities).nansum(1, keepdim=True)
    distance = (logprobs + entropy).abs()
    ordered, ids = torch.sort(distance, dim=1)
    mass = probabilities.gather(1, ids).cumsum(1)
    last = (mass < p).sum(1, keepdim=True).clamp(max=logits.shape[1] - 1)
    dropped = ordered > ordered.gather(1, last)
    dropped[:, :keep] = False
    return logits.masked_fill(torch.zeros_like(dropped).scatter(1, ids, dropped), -math.inf)


def logits_warpers(settings: Settings, keep: int = 1) -> list[Warper]:
    """What narrows the distribution before a draw, in order; only what does something."""
    s = settings
    tempered = apply_temperature if s.num_beams > 1 else apply_temperature_shifted
    steps: list[Warper] = []
    if s.temperature != 1:
        steps.append(lambda logits: tempered(logits, s.temperature))
    if s.top_k:
        steps.append(lambda logits: top_k(logits, s.top_k, keep))
    if s.top_p < 1:
        steps.append(lambda logits: top_p(logits, s.top_p, keep))
    if s.min_p:
        steps.append(lambda logits: min_p(logits, s.min_p, keep))
    if s.typical_p < 1:
        steps.append(lambda logits: typical_p(logits, s.typical_p, keep))
    return steps


def generators(seed: int | None, count: int) -> list[torch.Generator]:
    """A source of random numbers for each of several answers, on the CPU, so that a seed means the
    same on every device. The first has the seed itself; no answer depends on how many there are."""
    made = []
    for i in range(count):
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        elif i == 0:
            generator.manual_seed(seed)
        else:
            digest = hashlib.sha256(f"{seed}:{i}".encode()).digest()
            generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        made.append(generator)
    return made


def sample(logits: Tensor, generator: torch.Generator) -> int:
    """Draw a token from softmax(logits) (V,) with one random number, by the inverse of its
    cumulative distribution. In float64, so that rounding over a large vocabulary favours nobody."""
    cumulative = logits.cpu().double().softmax(0).cumsum(0)
    at = torch.rand(1, generator=generator, dtype=torch.float64)
    drawn = int(torch.searchsorted(cumulative, at * cumulative[-1], right=True))
    # A product rounded up to the very end of the distribution lies behind the last token.
    return drawn if drawn < logits.numel() else int(logits.argmax())


def sample_without_replacement(
    logits: Tensor, count: int, generator: torch.Generator
) -> list[tuple[int, int]]:
    """Draw from softmax over all of `logits` (n, V) without replacement, as (row, token) in the
    order drawn; fewer than `count` where not so many are finite.

    Exponential race (Efraimidis and Spirakis 2006): each token arrives after a time drawn from an
    exponential distribution with its probability as the rate; the first to arrive are drawn. The
    likeliest of each row get a time each. All others together are one Poisson process, followed
    only for as long as it may still matter: random numbers for a whole vocabulary would cost more
    than the rest of a step.
    """
    size = logits.shape[1]
    values, ids = top(logits, max(count, _HEAD))
    values = values - values.max()
    rows = torch.arange(len(logits), device=logits.device)[:, None]
    places = (rows * size + ids).flatten().cpu()
    waits = -torch.rand(places.shape, generator=generator, dtype=torch.float64).log()
    times = waits.log() - values.flatten().cpu()  # logarithms of the times
    order = times.argsort()[:count]
    arrived = [
        (time, place)
        for time, place in zip(times[order].tolist(), places[order].tolist())
        if time < math.inf
    ]
    if ids.shape[1] < size and bool((values[:, -1] > -math.inf).any()):
        head = float(values.double().exp().sum())
        total = float((logits.logsumexp(1) - logits.amax()).double().exp().sum())
        # Above the exact rate, whatever is lost in the difference.
        rate = max(total - head, 0) + 1e-5 * total
        _let_rest_arrive(arrived, count, logits, places, rate, generator)
    return [divmod(place, size) for _, place in arrived[:count]]


def _let_rest_arrive(
    arrived: list[tuple[float, int]],
    count: int,
    logits: Tensor,
    head: Tensor,
    rate: float,
    generator: torch.Generator,
) -> None:
    """Merge into `arrived` (log time, place), sorted, those of the tokens that are not in `head`
    which come in time. A token that comes again does not count again.

    Args:
        rate: at least that of all these tokens together; what it is more, comes for nothing.
    """
    cumulative: Tensor | None = None
    seen: set[int] = set()
    now = 0.0
    while True:
        wait, where = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        now -= math.log(wait or 5e-324) / rate
        if len(arrived) >= count and math.log(now) > arrived[count - 1][0]:
            return
        if cumulative is None:
            rates = (logits - logits.amax()).flatten().cpu().double().exp_()
            cumulative = rates.index_fill_(0, head, 0).cumsum(0)
        at = torch.tensor([where * rate], dtype=torch.float64)
        place = int(torch.searchsorted(cumulative, at, right=True))
        if place < len(cumulative) and place not in seen:
            seen.add(place)
            insort(arrived, (math.log(now), place))
