"""Safetensors files written piece by piece, cut into files of a largest size, with an index.

The library writes what is in memory as a whole; here a file is as large as the disk allows, and
memory holds a few pieces of it. The layout is specified in safetensors' README.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vicuna.errors import UserError
from vicuna.weights.chunks import Pieces, all_finite, rows_of
from vicuna.weights.read import SAFETENSORS_TYPES, Weights, shape_of

INDEX = "model.safetensors.index.json"
# Gives some rows of a tensor, or all.
Read = Callable[[slice], Tensor]
_ALIGN = 8  # readers map the data: a header of this multiple keeps every type aligned


@dataclass(frozen=True)
class Planned:
    """A tensor to write, and what gives it.

    unit: rows that `read` must be asked for together; 0: all.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Read
    unit: int = 1

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def copies(weights: Weights, dtype: torch.dtype | None = None) -> list[Planned]:
    """A plan that copies all tensors; numbers with a fraction as `dtype`, where given."""

    def reader(name: str, kind: torch.dtype) -> Read:
        return lambda rows: rounded(name, weights.read(name, rows), kind)

    plan = []
    for name in weights.names():
        kind = weights.dtype(name)
        if dtype is not None and kind.is_floating_point:
            kind = dtype
        read, unit = reader(name, kind), int(weights.by_rows)
        plan.append(Planned(name, kind, weights.shape(name), read, unit))
    return plan


def rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another type; the same tensor where it has that type.

    Raises: UserError where a value lies beyond the type's range, or is no number.
    """
    if tensor.dtype == dtype:
        return tensor
    found = tensor.to(dtype)
    if not all_finite(found):
        kind = str(dtype).removeprefix("torch.")
        raise UserError(
            "{name} has values that {type} cannot hold",
            name=name,
            type=kind,
            where="dtype",
            fix="Use --dtype bf16 or fp32, whose range is wider.",
        )
    return found


def write_sharded(folder: Path, plan: Sequence[Planned], largest: int) -> None:
    """Write a plan into a folder: one file, or several of `largest` bytes at most and their index.

    A tensor that is larger by itself gets a file of its own.
    """
    shards = _cut(plan, largest)
    if len(shards) == 1:
        write_file(folder / "model.safetensors", plan)
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_file(folder / name, shard)
        places |= {p.name: name for p in shard}
    index = {"metadata": {"total_size": sum(p.size for p in plan)}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _cut(plan: Sequence[Planned], largest: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    room = largest
    for planned in plan:
        if planned.size > room and shards[-1]:
            shards.append([])
            room = largest
        shards[-1].append(planned)
        room -= planned.size
    return shards


def write_file(path: Path, plan: Iterable[Planned]) -> None:
    """Write one safetensors file."""
    # As the library does: wide types first, so that each begins at a multiple of its width.
    ordered = sorted(plan, key=lambda p: -p.dtype.itemsize)
    with path.open("wb") as f:
        f.write(_header(ordered))
        with Pieces(f) as out:
            for planned in ordered:
                write_bytes(out, planned)


def _header(plan: Sequence[Planned]) -> bytes:
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for p in plan:
        table[p.name] = {
            "dtype": SAFETENSORS_TYPES[p.dtype],
            "shape": list(p.shape),
            "data_offsets": [at, at + p.size],
        }
        at += p.size
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGN)
    return struct.pack("<Q", len(text)) + text


def write_bytes(out: Pieces, planned: Planned) -> None:
    """Write a tensor's bytes behind what was written before."""
    for rows in rows_of(planned.shape, planned.unit):
        shape = shape_of(planned.shape, rows)
        out.put(math.prod(shape) * planned.dtype.itemsize, partial(_part, planned, rows, shape))


def _part(planned: Planned, rows: slice, shape: tuple[int, ...]) -> Tensor:
    tensor = planned.read(rows)
    if tensor.dtype != planned.dtype or tuple(tensor.shape) != shape:
        raise ValueError(
            f"{planned.name}: planned {planned.dtype} {shape}, "
            f"got {tensor.dtype} {tuple(tensor.shape)}"
        )
    return tensor
