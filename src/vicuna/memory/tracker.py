"""Follow every storage of a computation: when it comes to be, when it is freed, what it is for.

Runs over tensors without data (`meta`) as well as over real ones. A storage is counted when an
operation returns the first tensor on it and subtracted when Python frees it. What an operation
allocates and frees inside itself is invisible here.

The peak of a deep model's step follows from the traces of two shallow ones: all layers are alike,
so what is held at a given moment (so many events after the pass began, or before it ended) is a
linear function of the number of layers, and the peak is the largest of these. Nothing is
approximated: if the two traces do not agree event by event around those moments, `extrapolate`
says so, and the caller traces the whole depth.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vicuna.memory.allocator import rounded

# What a storage is for. `loss` is known by its shape: rows of logits over the vocabulary.
KINDS = ("activations", "loss", "gradients", "optimizer", "base", "adapters")

_ATEN = torch.ops.aten
# Operations in place that may change what memory a tensor has.
_RESIZING = {_ATEN.resize_.default, _ATEN.set_.source_Storage, _ATEN.set_.source_Tensor}


@dataclass
class Trace:
    """What happened to memory, in order.

    events: (storage's number, its bytes or minus them when freed, index of its kind).
    marks: places in `events` by name.
    """

    events: list[tuple[int, int, int]] = field(default_factory=list)
    marks: dict[str, int] = field(default_factory=dict)

    def mark(self, name: str) -> None:
        """Note this place in the order of events."""
        self.marks[name] = len(self.events)


class Tracker(TorchDispatchMode):
    """A mode in which every storage that comes to be on one kind of device is written down.

    Values that are asked for from tensors without data (`.item()`, `.cpu()`) are zeros, so that a
    step that looks at its loss runs through.

    Args:
        device: `meta`, `cpu`, `cuda`: storages elsewhere are left out.
        vocabulary: size of the vocabulary; 0 if logits need not be told apart.
    """

    def __init__(self, device: str, vocabulary: int = 0) -> None:
        super().__init__()
        self.device, self.vocabulary = device, vocabulary
        self.trace = Trace()
        self._numbers: dict[int, tuple[int, int, int]] = {}
        self._next = 0

    def begin(self, **kinds: Iterable[Tensor]) -> None:
        """Start the trace anew with the storages that are alive: those of the tensors given under
        a kind's name, and all others, seen so far, as the base."""
        for tensors in kinds.values():
            for tensor in tensors:
                self._add(tensor)
        named = {
            t.untyped_storage()._cdata: KINDS.index(kind)
            for kind, tensors in kinds.items()
            for t in tensors
        }
        base = KINDS.index("base")
        for key, (number, nbytes, _) in self._numbers.items():
            self._numbers[key] = (number, nbytes, named.get(key, base))
        self.trace = Trace(list(self._numbers.values()))

    def _add(self, tensor: Tensor, kind: int | None = None) -> None:
        if tensor.device.type != self.device or tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        nbytes = storage.nbytes()
        if key in self._numbers or not nbytes:
            return
        event = (self._next, nbytes, self._kind(tensor) if kind is None else kind)
        self._next += 1
        self._numbers[key] = event
        self.trace.events.append(event)
        weakref.finalize(storage, self._drop, key).atexit = False

    def _drop(self, key: int) -> None:
        number, nbytes, kind = self._numbers.pop(key)
        self.trace.events.append((number, -nbytes, kind))

    def _kind(self, tensor: Tensor) -> int:
        wide = tensor.dim() > 1 and self.vocabulary and tensor.shape[-1] == self.vocabulary
        return 1 if wide else 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # types: unused, the interface's
        kwargs = kwargs or {}
        result = _value_of_nothing(func, args, kwargs)
        if result is None and self.device == "meta":
            result = _written(func, args, kwargs)
        if result is None:
            result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return result


def _value_of_nothing(func: Any, args: Any, kwargs: Any) -> Any:
    """What stands for the values of a tensor without data where a host asks for them; else None."""
    if func is _ATEN._local_scalar_dense.default and args[0].device.type == "meta":
        return torch.zeros((), dtype=args[0].dtype).item()
    if func is _ATEN.copy_.default and args[1].device.type == "meta" != args[0].device.type:
        return args[0]
    if func is _ATEN._to_copy.default and args[0].device.type == "meta":
        target = kwargs.get("device")
        if target is not None and torch.device(target).type != "meta":
            # Not zeroed, so that the pages of a large one are never touched.
            kept = {k: v for k, v in kwargs.items() if k in ("dtype", "device")}
            make = torch.zeros if args[0].numel() == 1 else torch.empty
            return make(args[0].shape, **{"dtype": args[0].dtype, **kept})
    return None


def _written(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation returns that only writes into what it is given, and so takes no memory:
    no need to work out its shapes, which costs more than all else in a trace. None for others."""
    schema = func._schema
    if func.namespace != "aten" or not schema.is_mutable or func in _RESIZING:
        return None
    if schema.name.endswith("_") and len(schema.returns) <= 1:
        given = args[0]
    elif len(schema.returns) == 1 and "out" in kwargs:
        given = kwargs["out"]
    else:
        return None
    if not isinstance(given, Tensor) or given.device.type != "meta" or not given.numel():
        return None
    return given


_tracing = 0  # traces under way, in all threads
_collected = True
_counting = threading.Lock()


@contextmanager
def without_collection() -> Iterator[None]:
    """Without garbage collection: what only a collection would free counts as held, since when it
    comes depends on everything else a process does. Makes traces repeatable. It comes back when the
    last of several threads is done."""
    global _tracing, _collected
    with _counting:
        if not _tracing:
            _collected = gc.isenabled()
            gc.disable()
        _tracing += 1
    try:
        yield
    finally:
        with _counting:
            _tracing -= 1
            if not _tracing and _collected:
                gc.enable()


# -- peaks -----------------------------------------------------------------------------------------

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


def extrapolate(short: Trace, long: Trace, layers: int, device: str) -> np.ndarray | None:
    """`full_peak` of a deep model from the traces of two shallow ones.

    Args:
        short, long: traces of the same model with some layers, and with one more.
        layers: beyond those of `short`, counted in differences of the two traces.

    Returns: int64 (kinds,), or None if the traces do not agree.
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
    """Aligned event indices of the two traces: a pass's first half counted from its
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
