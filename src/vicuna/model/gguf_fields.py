"""The metadata of a GGUF file, read in one pass.

The layout is specified in ggml's `docs/gguf.md` (versions 2 and 3). The `gguf` package's own reader
makes a NumPy view of every string, which takes half a minute for a vocabulary of 128,000 tokens.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from vicuna.errors import UserError

_MAGIC = b"GGUF"
# Value types by number; 8 is a string, 9 an array.
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_LEAST_FIELD = 8 + 4 + 1  # the length of its key, its type, its value


def read_fields(gguf: Path) -> dict[str, Any]:
    """The metadata of a GGUF file, by key: numbers, truth values, strings, and lists of these.

    Every length is checked against the file's end before anything is made of it.

    Raises: UserError where it is damaged or no GGUF file.
    """
    with gguf.open("rb") as f:
        if f.read(4) != _MAGIC:
            raise UserError("not a GGUF file", where=str(gguf))
        with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Reader(data).fields()
            except (struct.error, ValueError, RecursionError) as e:
                raise UserError(
                    f"the metadata is damaged: {e}", where=str(gguf), fix="Fetch the file again."
                ) from e


class _Reader:
    """A position in a file, and what comes next there."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, len(_MAGIC)

    def fields(self) -> dict[str, Any]:
        (version,) = self._take("I")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not known (or its bytes are in reverse order)")
        _, count = self._take("QQ")
        self._check(count, _LEAST_FIELD)
        return {self._string(): self._value(*self._take("I")) for _ in range(count)}

    def _take(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{form}", self._data, self._at)
        self._at += struct.calcsize(f"<{form}")
        return found

    def _string(self) -> str:
        (length,) = self._take("Q")
        end = self._at + length
        if end > len(self._data):
            raise ValueError(f"a text of {length} bytes at {self._at} goes past the end")
        text = self._data[self._at : end].decode()
        self._at = end
        return text

    def _check(self, length: int, least: int) -> None:
        """Refuse a list of elements, each of `least` bytes or more, that goes past the end."""
        if length * least > len(self._data) - self._at:
            raise ValueError(f"a list of {length} at {self._at} goes past the end")

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
