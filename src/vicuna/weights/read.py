"""The weights of a base on disk, one tensor at a time: what merging, converting and comparing read.

Tensors are read into memory of their own instead of being mapped, so that what a command holds is
what it asked for, at any size of the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from vicuna.errors import UserError
from vicuna.weights.headers import Entry, check_folder, index_of, read_safetensors
from vicuna.weights.size_limits import check_against
from vicuna.weights.torch_files import load_pickled

TORCH_TYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
    "U16": torch.uint16, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32,
    "U32": torch.uint32, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64,
    "U64": torch.uint64, "C64": torch.complex64, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip
SAFETENSORS_TYPES = {dtype: name for name, dtype in TORCH_TYPES.items()}
ALL = slice(None)  # rows


class Weights(Protocol):
    """Tensors by name, in the order they are stored in.

    by_rows: whether some rows of a tensor are read without the others.
    """

    by_rows: bool

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, rows: slice = ALL) -> Tensor:
        """The tensor, or some of its rows, in memory of its own."""
        ...


class SafetensorsWeights:
    """The tensors of safetensors files, whose headers are checked here.

    Raises: UserError where a header contradicts its file, or two files hold one name.
    """

    by_rows = True

    def __init__(self, files: Iterable[Path]) -> None:
        self._entries: dict[str, tuple[Path, Entry]] = {}
        for path in files:
            for name, entry in read_safetensors(path)[0].items():
                if name in self._entries:
                    first = self._entries[name][0].name
                    raise UserError(
                        "{name} lies in {first} and again here",
                        name=name,
                        first=first,
                        where=str(path),
                    )
                if entry.kind not in TORCH_TYPES:
                    raise UserError(
                        "{name} is of type {type}, which this version of torch lacks",
                        name=name,
                        type=entry.kind,
                        where=str(path),
                    )
                self._entries[name] = (path, entry)

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name][1].shape

    def dtype(self, name: str) -> torch.dtype:
        return TORCH_TYPES[self._entries[name][1].kind]

    def read(self, name: str, rows: slice = ALL) -> Tensor:
        path, entry = self._entries[name]
        shape, start = shape_of(entry.shape, rows), entry.start
        if rows != ALL:
            start += entry.size // entry.shape[0] * rows.start
        tensor = torch.empty(shape, dtype=self.dtype(name))
        data = tensor.reshape(-1).view(torch.uint8).numpy().data
        with path.open("rb") as f:
            f.seek(start)
            if f.readinto(data) != len(data):
                raise UserError(
                    "the file became shorter: {name} is cut off", name=name, where=str(path)
                )
        return tensor


class PickledWeights:
    """The tensors of `.bin` or `.pth` files, mapped, so that only what is read takes memory."""

    by_rows = True

    def __init__(self, files: Iterable[Path]) -> None:
        self._tensors: dict[str, Tensor] = {}
        for path in files:
            self._tensors.update(load_pickled(path))

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str, rows: slice = ALL) -> Tensor:
        tensor = self._tensors[name]
        part = tensor if rows == ALL else tensor[rows]
        return part.clone(memory_format=torch.contiguous_format)


def weight_files(folder: Path) -> tuple[list[Path], bool]:
    """(files that hold a base's weights, whether they are safetensors).

    Raises: UserError where there are none, or a file that the index names is missing.
    """
    for index, pattern, safe in (
        ("model.safetensors.index.json", "model*.safetensors", True),
        ("pytorch_model.bin.index.json", "pytorch_model*.bin", False),
    ):
        if (folder / index).is_file():
            return [folder / f for f in sorted(set(index_of(folder, index).values()))], safe
        if files := sorted(folder.glob(pattern)):
            return files, safe
    others = [p for p in sorted(folder.glob("*.safetensors")) if not p.stem.startswith("adapter")]
    if others:
        return others, True
    raise UserError(
        "no weights in this folder",
        where=str(folder),
        fix="It needs model.safetensors or pytorch_model.bin, whole or in parts with their index.",
    )


def open_weights(folder: Path) -> Weights:
    """The weights of a base in Hugging Face's layout, safetensors before pickled ones.

    Raises: UserError where there are none, or a file is damaged or not to be trusted.
    """
    files, safe = weight_files(folder)
    return SafetensorsWeights(files) if safe else PickledWeights(files)


def check_weights(folder: Path) -> None:
    """Check the weights of a base before another library opens them: headers that do not fit their
    files, pickles that would run code, a config of another size. Where there are none, that library
    says what it looked for.

    Raises: UserError naming the file and the fault.
    """
    if not any(p.suffix in (".safetensors", ".bin") for p in folder.iterdir()):
        return
    files, safe = weight_files(folder)
    if not safe:
        for path in files:
            load_pickled(path)
    elif files[0].name.startswith("model"):
        check_folder(folder)
    else:
        for path in files:
            read_safetensors(path)
    # Of whole files only: one that was cut is not the config's fault.
    check_against(folder, sum(path.stat().st_size for path in files if path.is_file()))


def shape_of(shape: tuple[int, ...], rows: slice) -> tuple[int, ...]:
    """The shape of some rows of a tensor, or of all."""
    return shape if rows == ALL else (rows.stop - rows.start, *shape[1:])


def shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor by its name."""
    return {name: weights.shape(name) for name in weights.names()}


def nbytes(weights: Weights, name: str) -> int:
    """Bytes of a tensor on disk."""
    return torch.Size(weights.shape(name)).numel() * weights.dtype(name).itemsize
