"""The peak of a deep model's step from the traces of two shallow ones.

All layers are alike, so what is held at a given moment (so many events after the pass began, or
before it ended) is a linear function of the number of layers, and the peak is the largest of these.
Nothing is approximated: where the two traces do not agree event by event around those moments,
`peak` says so, and the caller traces the whole depth.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vicuna.memory.allocator import rounded
from vicuna.memory.tracker import KINDS, Trace

# The parts of a step, each a pass through all layers but `loss`: from one mark to the next.
_PASSES = (("begin", "hidden"), ("hidden", "loss"), ("loss", "update"))


def timeline(trace: Trace, device: str) -> np.ndarray:
    """Bytes held after each event, by kind: int64 (events + 1, kinds), from nothing."""
    live = np.zeros((len(trace.events) + 1, len(KINDS)), np.int64)
    for i, (_, nbytes, kind) in enumerate(trace.events, 1):
        size = rounded(abs(nbytes), device)
        live[i, kind] = size if nbytes > 0 else -size
    result: np.ndarray = live.cumsum(0)
    return result


def full_peak(trace: Trace, device: str) -> np.ndarray:
    """Bytes held at the moment of a step's peak, by kind: int64 (kinds,)."""
    live = timeline(trace, device)[trace.marks["begin"] :]
    highest: np.ndarray = live[live.sum(1).argmax()]
    return highest


def peak(short: Trace, long: Trace, layers: int, device: str) -> np.ndarray | None:
    """`full_peak` of a model with so many layers.

    Args:
        short, long: traces of the same model with some layers, and with one more.
        layers: beyond those of `short`, counted in differences of the two traces.

    Returns: int64 (kinds,), or None where the traces do not agree.
    """
    a, b = timeline(short, device), timeline(long, device)
    best: np.ndarray | None = None
    for at_a, at_b in _moments(short, long):
        if not _alike(short, long, at_a, at_b):
            return None
        grown = a[at_a] + (b[at_b] - a[at_a]) * layers
        highest: np.ndarray = grown[grown.sum(1).argmax()]
        if best is None or highest.sum() > best.sum():
            best = highest
    # The optimiser's temporaries are proportional to its parameters, so their peak is linear, too.
    tops = [t[trace.marks["update"] :] for t, trace in ((a, short), (b, long))]
    low, high = (t[t.sum(1).argmax()] for t in tops)
    last: np.ndarray = low + (high - low) * layers
    return last if best is None or last.sum() > best.sum() else best


def _moments(short: Trace, long: Trace) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indices into the two timelines that belong together: a pass's first half counted from its
    beginning, its second half from its end."""
    for first, last in _PASSES:
        start_a, stop_a = short.marks[first], short.marks[last]
        start_b, stop_b = long.marks[first], long.marks[last]
        half = (stop_a - start_a) // 2
        yield np.arange(start_a, start_a + half), np.arange(start_b, start_b + half)
        rest = stop_a - start_a - half
        yield np.arange(stop_a - rest, stop_a + 1), np.arange(stop_b - rest, stop_b + 1)


def _alike(short: Trace, long: Trace, at_a: np.ndarray, at_b: np.ndarray) -> bool:
    """Whether the events between these moments are the same, up to the storages' numbers."""
    a = [short.events[i][1:] for i in at_a[:-1]]
    return a == [long.events[i][1:] for i in at_b[:-1]]
