"""`.pth` files as `torch.save` writes them, one tensor at a time.

Such a file is a zip archive of stored records: a pickle that says which tensor lies in which
record, and a record for each tensor. torch itself writes only what is in memory as a whole.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from vicuna.errors import UserError

_STORAGES = {
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float64: torch.DoubleStorage,
}
_ROOT = "consolidated"
_ALIGN = 64  # as torch does: mapped tensors begin where vector instructions like it
_ZIP64 = 20  # bytes of the extra field that zipfile adds for sizes beyond 4 GiB
_PAD = 0x4246  # "FB", the id of torch's own padding
# Any fixed time, so that the same tensors give the same file.
_TIME = (1980, 1, 1, 0, 0, 0)


class _Storage:
    """Stands for a record in the pickle."""

    def __init__(self, key: str, dtype: torch.dtype, numel: int) -> None:
        self.key, self.dtype, self.numel = key, dtype, numel


class _Reference:
    """Stands for a tensor: pickled as torch pickles one, without its data."""

    def __init__(self, storage: _Storage, shape: tuple[int, ...]) -> None:
        self._storage, self._shape = storage, shape

    def __reduce__(self) -> tuple[Any, ...]:
        strides = torch.empty(self._shape, device="meta").stride()
        given: tuple[Any, ...] = (self._storage, 0, self._shape, strides, False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, given


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Storage):
            return ("storage", _STORAGES[obj.dtype], obj.key, "cpu", obj.numel)
        return None


class PthWriter:
    """A file that is told its tensors first, and then given each in turn.

    Args:
        tensors: (name, type, shape) of each.

    Raises: UserError where a type has no place in such a file.
    """

    def __init__(
        self, path: Path, tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]
    ) -> None:
        self._tensors, self._next = list(tensors), 0
        odd = [(name, dtype) for name, dtype, _ in tensors if dtype not in _STORAGES]
        if odd:
            raise UserError(
                "{name} is of type {dtype}, which is not written as .pth",
                name=odd[0][0],
                dtype=odd[0][1],
            )
        self._archive = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True)
        self._record("data.pkl", self._pickle())
        self._record("byteorder", b"little")

    def __enter__(self) -> PthWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is None:
            if self._next != len(self._tensors):
                raise ValueError(f"{len(self._tensors) - self._next} tensors were not written")
            self._record("version", b"3\n")
        self._archive.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor, in the order that was told."""
        if (name, tensor.dtype, tuple(tensor.shape)) != self._tensors[self._next]:
            raise ValueError(f"expected {self._tensors[self._next]}, not {name}")
        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
        self._record(f"data/{self._next}", flat.numpy().data)
        self._next += 1

    def _pickle(self) -> bytes:
        table = OrderedDict()
        for number, (name, dtype, shape) in enumerate(self._tensors):
            storage = _Storage(str(number), dtype, torch.Size(shape).numel())
            table[name] = _Reference(storage, shape)
        out = io.BytesIO()
        _Pickler(out, protocol=2).dump(table)
        return out.getvalue()

    def _record(self, name: str, data: bytes | memoryview) -> None:
        info = zipfile.ZipInfo(f"{_ROOT}/{name}", _TIME)
        start = self._archive.start_dir + 30 + len(info.filename) + _ZIP64 + 4
        padding = -start % _ALIGN
        info.extra = struct.pack("<HH", _PAD, padding) + b"\0" * padding
        with self._archive.open(info, "w", force_zip64=True) as record:
            record.write(data)
