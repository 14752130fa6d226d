"""Attention of one segment in bf16 on a CPU: our blocks against PyTorch's flash attention.

    python bench/attention.py --write-docs

Both through what training calls, at the embedded base's heads, forward and backward; each length
several rounds in turn, the best of each. Errors are those of the gradient against float64.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchkit import machine, report
from vicuna.data.pack import PackSegment
from vicuna.model import attention_cpu
from vicuna.model.attention_layout import AttentionShape, PackLayout

HEADS = AttentionShape(9, 3, 64, 0.125, None)
LENGTHS = (64, 128, 212, 400, 512, 1024)
ROUNDS, CALLS = 5, 5
WAYS = (attention_cpu.FlashSegments, attention_cpu.BlockSegments)


def gradient(
    way: type[torch.autograd.Function], qkv: Tensor, given: Tensor, layout: PackLayout
) -> Tensor:
    """Forward and backward of a segment: the gradient of qkv (T, O), given that of the result. The
    layout is made before, as all layers of a model share it."""
    x = qkv.clone().requires_grad_()
    result: Tensor = way.apply(x, HEADS, layout)  # type: ignore
    result.backward(given)
    assert x.grad is not None
    return x.grad


def seconds(work: Callable[[], object]) -> float:
    """Of one call, on average over a few."""
    began = time.perf_counter()
    for _ in range(CALLS):
        work()
    return (time.perf_counter() - began) / CALLS


def measure(length: int) -> list[str]:
    """A row of the table."""
    qkv = torch.randn(length, HEADS.width).bfloat16()
    given = torch.randn(length, HEADS.query * HEADS.size).bfloat16()
    # Flash attention takes float64, too: the reference.
    layout = PackLayout([PackSegment(0, length)])
    exact = gradient(WAYS[0], qkv.double(), given.double(), PackLayout(layout.segments))
    errors = [(gradient(w, qkv, given, layout) - exact).norm() / exact.norm() for w in WAYS]
    best = [float("inf")] * len(WAYS)
    for _ in range(ROUNDS):
        for i, way in enumerate(WAYS):
            best[i] = min(best[i], seconds(lambda way=way: gradient(way, qkv, given, layout)))  # type: ignore
    times = [f"{1e3 * s:.2f}" for s in best]
    return [f"{length:,}", *times, f"{best[0] / best[1]:.2f} x", *(f"{e:.4f}" for e in errors)]


def main() -> None:
    """Measure, print, and perhaps write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=machine.physical_threads())
    parser.add_argument("--write-docs", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    head = ["rows", "PyTorch's, ms", "ours, ms", "faster", "error, PyTorch's", "error, ours"]
    table = report.table(head, [measure(length) for length in LENGTHS])
    text = f"{report.machine_words(machine.describe(options.threads))}\n\n{table}"
    print(text)
    if options.write_docs:
        report.write("attention", text)


if __name__ == "__main__":
    main()
