"""The metadata of a GGUF file and its table of tensors, read in one pass.

The layout is specified in ggml's `docs/gguf.md` (versions 2 and 3). The `gguf` package's own reader
makes a NumPy view of every string, which takes half a minute for a vocabulary of 128,000 tokens.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from vicuna.errors import UserError

_MAGIC = b"GGUF"
# Value types by number; 8 is a string, 9 an array.
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_LEAST_FIELD = 8 + 4 + 1  # the length of its key, its type, its value
_LEAST_TENSOR = 8 + 4 + 4 + 8  # the length of its name, of its shape, its type, its place


def read_fields(gguf: Path) -> dict[str, Any]:
    """The metadata of a GGUF file, by key: numbers, truth values, strings, and lists of these.

    Every length is checked against the file's end before anything is made of it.

    Raises: UserError where it is damaged or no GGUF file.
    """
    with _opened(gguf) as reader:
        return reader.fields()


def read_tensors(gguf: Path) -> tuple[dict[str, Any], list[TensorInfo], int]:
    """(metadata, tensors, where the table of tensors ends) of a GGUF file.

    Only that the table itself lies within the file is checked here; see `headers.check_gguf`.

    Raises: UserError where it is damaged or no GGUF file.
    """
    with _opened(gguf) as reader:
        fields = reader.fields()
        return fields, reader.tensors(), reader.at


class TensorInfo(NamedTuple):
    """What the table says of a tensor: dimensions, fastest first; type by number; its place."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@contextmanager
def _opened(gguf: Path) -> Iterator[_Reader]:
    """A reader at the file's beginning; what it finds damaged is told in words."""
    with gguf.open("rb") as f:
        if f.read(4) != _MAGIC:
            raise UserError("not a GGUF file", where=str(gguf))
        with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                yield _Reader(data)
            except (struct.error, ValueError, RecursionError, TypeError) as e:
                raise UserError(
                    "the metadata is damaged: {error}",
                    error=e,
                    where=str(gguf),
                    fix="Download the file again.",
                ) from e


class _Reader:
    """A position in a file, and what comes next there."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self.at = data, len(_MAGIC)
        self._tensors = 0

    def fields(self) -> dict[str, Any]:
        (version,) = self._take("I")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not known (or its bytes are in reverse order)")
        self._tensors, count = self._take("QQ")
        self._check(count, _LEAST_FIELD)
        return {self._string(): self._value(*self._take("I")) for _ in range(count)}

    def tensors(self) -> list[TensorInfo]:
        """The table of tensors, which stands behind the metadata."""
        self._check(self._tensors, _LEAST_TENSOR)
        return [self._tensor() for _ in range(self._tensors)]

    def _tensor(self) -> TensorInfo:
        name = self._string()
        (dimensions,) = self._take("I")
        self._check(dimensions, 8)
        shape = self._take(f"{dimensions}Q")
        return TensorInfo(name, shape, *self._take("IQ"))

    def _take(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{form}", self._data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return found

    def _string(self) -> str:
        (length,) = self._take("Q")
        end = self.at + length
        if end > len(self._data):
            raise ValueError(f"a text of {length} bytes at {self.at} goes past the end")
        text = self._data[self.at : end].decode()
        self.at = end
        return text

    def _check(self, length: int, least: int) -> None:
        """Refuse a list of elements, each of `least` bytes or more, that goes past the end."""
        if length * least > len(self._data) - self.at:
            raise ValueError(f"a list of {length} at {self.at} goes past the end")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(*self._take("IQ"))
        return self._take(_form(kind))[0]

    def _array(self, kind: int, length: int) -> list[Any]:
        # Each element takes a byte at least, a string or an array eight.
        self._check(length, 8 if kind in (_STRING, _ARRAY) else struct.calcsize(f"<{_form(kind)}"))
        if kind in (_STRING, _ARRAY):
            return [self._value(kind) for _ in range(length)]
        return list(self._take(f"{length}{_form(kind)}"))


def _form(kind: int) -> str:
    form = _SCALARS.get(kind)
    if form is None:
        raise ValueError(f"values of type {kind} are not known")
    return form
