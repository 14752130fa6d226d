"""Follow every storage of a computation: when it comes to be, when it is freed, what it is for.

Runs over tensors without data (`meta`) as well as over real ones. A storage is counted when an
operation returns the first tensor on it and subtracted when Python frees it. What an operation
allocates and frees inside itself is invisible here; `HIDDEN` lists the cases that matter.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What a storage is for. `loss` is known by its shape: rows of scores over the vocabulary.
KINDS = ("activations", "loss", "gradients", "optimizer", "base", "adapters")

_ATEN = torch.ops.aten
# Operations that hold a temporary of their input's size while they run (as PyTorch computes them
# on CPU and GPU), so that the sum of their outputs is not all they need.
HIDDEN = {_ATEN.logsumexp.default}


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
        vocabulary: size of the vocabulary; 0 where scores need not be told apart.
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

    def hold(self, nbytes: int, kind: str = "activations") -> Callable[[], None]:
        """Write down memory that no tensor stands for; call what is returned when it is freed."""
        event = (self._next, nbytes, KINDS.index(kind))
        self._next += 1
        self.trace.events.append(event)
        return lambda: self.trace.events.append((event[0], -nbytes, event[2]))

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
            freed = None
            if func in HIDDEN and args[0].device.type == self.device:
                kind = KINDS[self._kind(args[0])]
                freed = self.hold(args[0].numel() * args[0].element_size(), kind)
            result = func(*args, **kwargs)
            if freed is not None:
                freed()
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


@contextmanager
def without_collection() -> Iterator[None]:
    """Without garbage collection: what only a collection would free counts as held, since when it
    comes depends on everything else a process does. Makes traces repeatable."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
