"""The chip's matrix-product rate at a model's own shapes: what 100 % would be.

Each frozen product of the step, forward and backward, is timed alone, with the rows that a pack
has; layers that share an input also as one product, and the better way counts. The shapes take
turns over several rounds and each keeps its best round, so that a disturbance hits none for good.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchkit.operations import GROUPS, HEAD, Shape, Work

ROUNDS = 5
ROUND_SECONDS = 0.05
# (rows, inner size, outer size, direction): a product of the model.
Product = tuple[int, int, int, str]


@dataclass(frozen=True)
class Rates:
    """Operations a second by (group, direction), and of the single best product."""

    by_group: dict[tuple[str, str], float]
    best: float
    products: dict[str, float]

    def weighted(self, work: Work) -> float:
        """The rate at which this work's frozen products could be done, one after another."""
        seconds = sum(n / self.by_group[key] for key, n in work.by_group.items())
        return sum(work.by_group.values()) / seconds


def measure(
    shape: Shape, rows: int, head_rows: int, dtype: str, device: str = "cpu", rounds: int = ROUNDS
) -> Rates:
    """Time the products of a model.

    Args:
        rows: rows of a pack. head_rows: rows whose logits exist at a time.
        dtype: torch's name of a type: float32, bfloat16, float16.
    """
    import torch

    kind = getattr(torch, dtype)
    ways = _ways(shape, rows, head_rows)
    wanted = {p for candidates in ways.values() for way in candidates for p in way}
    calls = {p: _call_of(torch, p, kind, device) for p in sorted(wanted)}
    seconds = _best_of(calls, rounds, torch, device)
    by_group = {}
    for key, candidates in ways.items():
        operations = sum(2 * t * k * n for t, k, n, _ in candidates[0])
        by_group[key] = operations / min(sum(seconds[p] for p in way) for way in candidates)
    named = {
        f"{t} x {k} x {n} {direction}": 2 * t * k * n / s
        for (t, k, n, direction), s in seconds.items()
    }
    return Rates(by_group, max(named.values()), named)


def _ways(s: Shape, rows: int, head_rows: int) -> dict[tuple[str, str], list[list[Product]]]:
    """For each (group, direction), the ways to compute it: lists of products."""
    ways: dict[tuple[str, str], list[list[Product]]] = {}
    for group in (*GROUPS, (HEAD,)):
        t = head_rows if group == (HEAD,) else rows
        sizes = [s.linear(name) for name in group]
        inputs, together = sizes[0][0], sum(n for _, n in sizes)
        ahead: list[list[Product]] = [[(t, k, n, "forward") for k, n in sizes]]
        back: list[list[Product]] = [[(t, n, k, "backward") for k, n in sizes]]
        if len(group) > 1:
            ahead.append([(t, inputs, together, "forward")])
            back.append([(t, together, inputs, "backward")])
        ways[group[0], "forward"], ways[group[0], "backward"] = ahead, back
    return ways


def _call_of(torch: Any, product: Product, dtype: Any, device: str) -> Callable[[], Any]:
    """x W' forward, g W backward, with W (outputs, inputs) as linear layers hold it."""
    t, k, n, direction = product
    x = torch.randn(t, k, device=device).to(dtype)
    if direction == "forward":
        weight = torch.randn(n, k, device=device).to(dtype)
        return lambda: torch.nn.functional.linear(x, weight)
    weight = torch.randn(k, n, device=device).to(dtype)
    return lambda: x @ weight


def _best_of(
    products: dict[Product, Callable[[], Any]], rounds: int, torch: Any, device: str
) -> dict[Product, float]:
    """Seconds of one call of each product, in its best round."""

    def timed(call: Callable[[], Any], times: int) -> float:
        _wait(torch, device)
        began = time.perf_counter()
        for _ in range(times):
            call()
        _wait(torch, device)
        return (time.perf_counter() - began) / times

    with torch.no_grad():
        first = {size: min(timed(call, 1) for _ in range(2)) for size, call in products.items()}
        times = {size: max(1, int(ROUND_SECONDS / max(s, 1e-7))) for size, s in first.items()}
        best = dict(first)
        for _ in range(rounds):
            for size, call in products.items():
                best[size] = min(best[size], timed(call, times[size]))
    return best


def _wait(torch: Any, device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
