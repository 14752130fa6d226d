"""Headers of weight files, checked against the file before anything is allocated or handed on.

A header says how many tensors there are, of which size and where: a damaged or hostile one would
have a reader allocate terabytes, or read past the end. Every number is checked here first.

The layouts are specified in safetensors' README and in ggml's `docs/gguf.md`.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vicuna.errors import UserError
from vicuna.gguf.read import read_tensors
from vicuna.weights.size_limits import check_gguf_against, check_gguf_counts

# What the format itself allows as the length of a header.
LONGEST_HEADER = 100_000_000
# Bits of an element, by safetensors' name of its type.
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16,
    "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_LARGEST = 1 << 60  # elements of a tensor; more than any disk holds
_AGAIN = "Fetch or make the file again."


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies in a file: its type by the format's name, its shape, its bytes."""

    kind: str
    shape: tuple[int, ...]
    start: int
    size: int


def damaged(path: Path, fault: str) -> UserError:
    """The error of a file whose header does not fit its content."""
    return UserError("the file is damaged: {fault}", fault=fault, where=str(path), fix=_AGAIN)


# -- safetensors ----


def read_safetensors(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """(tensors by name, metadata) of a safetensors file; no tensor is read.

    Raises: UserError where the file is missing, cut off, or its header contradicts itself.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            start = f.read(8)
            length = _header_length(path, start, size)
            text = f.read(length)
    except OSError as e:
        raise UserError("cannot read: {reason}", reason=e.strerror or e, where=str(path)) from e
    table = _parse(path, text)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise damaged(path, "its metadata is not a table of texts")
    entries = {name: _entry(path, name, value, 8 + length) for name, value in table.items()}
    _check_places(path, entries.items(), 8 + length, size)
    end = max((e.start + e.size for e in entries.values()), default=8 + length)
    if end != size:
        raise damaged(path, f"{size - end} bytes behind the last tensor belong to none")
    return entries, metadata


def _header_length(path: Path, start: bytes, size: int) -> int:
    if start.startswith(b"version "):
        raise UserError(
            "this is a pointer of Git LFS, not the weights",
            where=str(path),
            fix="Fetch the file itself: git lfs pull, or download it from the hub.",
        )
    if len(start) < 8:
        raise damaged(path, f"{size} bytes are too few for a header")
    (length,) = struct.unpack("<Q", start)
    if length > LONGEST_HEADER or length > size - 8 or length < 2:
        raise damaged(path, f"its header is said to have {length:,} bytes, the file has {size:,}")
    return int(length)


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name stands there twice")
        return found

    try:
        table = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:
        raise damaged(path, f"its header is no JSON ({e})") from e
    if not isinstance(table, dict):
        raise damaged(path, "its header is no table of tensors")
    return table


def _entry(path: Path, name: str, value: Any, base: int) -> Entry:
    try:
        kind, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        numbers = [*shape, begin, end]
    except (KeyError, TypeError, ValueError) as e:
        raise damaged(path, f"tensor {name!r} lacks type, shape or place") from e
    if not all(type(n) is int and 0 <= n < _LARGEST for n in numbers):
        raise damaged(path, f"tensor {name!r} has impossible dimensions or places {numbers}")
    if not isinstance(kind, str) or kind not in BITS:
        raise damaged(path, f"tensor {name!r} is of the unknown type {kind!r}")
    elements = math.prod(shape)
    if elements * BITS[kind] != (end - begin) * 8:
        raise damaged(
            path, f"tensor {name!r} {kind} {tuple(shape)} cannot have {end - begin:,} bytes"
        )
    return Entry(kind, tuple(shape), base + begin, end - begin)


def _check_places(
    path: Path, entries: Iterable[tuple[str, Entry]], first: int, size: int, align: int = 1
) -> None:
    """Refuse tensors that overlap, leave holes wider than the alignment, or lie outside."""
    at, before = first, "the header"
    for name, entry in sorted(entries, key=lambda e: (e[1].start, e[1].size)):
        if entry.start + entry.size > size:
            raise damaged(
                path,
                f"it is cut off: tensor {name!r} ends at byte {entry.start + entry.size:,}, the "
                f"file at {size:,}",
            )
        if entry.start < at:
            raise damaged(path, f"tensors {before!r} and {name!r} overlap")
        if entry.start - at >= align:
            raise damaged(path, f"{entry.start - at} bytes before {name!r} belong to no tensor")
        at, before = entry.start + entry.size, name


# -- GGUF ----


def check_gguf(path: Path) -> None:
    """Check that all that a GGUF file's header promises lies within the file.

    Raises: UserError where it is cut off, damaged, or no GGUF file, or its counts are none.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    fields, tensors, end = read_tensors(path)
    check_gguf_counts(fields, path)
    align = fields.get("general.alignment", 32)
    if type(align) is not int or not 0 < align <= 1 << 20 or align & (align - 1):
        raise damaged(path, f"its alignment is {align!r}")
    first = -(-end // align) * align
    entries: dict[str, Entry] = {}
    for name, shape, kind, offset in tensors:
        try:
            known = GGMLQuantizationType(kind)
            block, width = GGML_QUANT_SIZES[known]
        except (ValueError, KeyError) as e:
            raise damaged(path, f"tensor {name!r} is of the unknown type {kind}") from e
        if not 0 < len(shape) <= 4 or not all(0 < n < _LARGEST for n in shape):
            raise damaged(path, f"tensor {name!r} has impossible dimensions {shape}")
        if shape[0] % block:
            raise damaged(path, f"tensor {name!r} has rows of {shape[0]}, not of blocks of {block}")
        if name in entries:
            raise damaged(path, f"tensor {name!r} stands there twice")
        if offset % align:
            raise damaged(path, f"tensor {name!r} does not begin at a multiple of {align}")
        size = math.prod(shape) // block * width
        entries[name] = Entry(known.name, shape, first + offset, size)
    _check_places(path, entries.items(), first, path.stat().st_size, align)
    check_gguf_against(fields, path)


# -- folders ----


def index_of(folder: Path, name: str) -> dict[str, str]:
    """Which tensor lies in which file of a folder, as its index says.

    Raises: UserError where the index is broken, or names a file outside the folder or a missing
        one.
    """
    path = folder / name
    try:
        table = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(v, str) for v in table.values()):
            raise TypeError("weight_map")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as e:
        raise UserError("the index is broken: {error}", error=e, where=str(path), fix=_AGAIN) from e
    for file in sorted(set(table.values())):
        if os.path.basename(file) != file:
            raise UserError("the index names a file elsewhere: {file}", file=file, where=str(path))
        if not (folder / file).is_file():
            raise UserError(
                "a file of the weights is missing: {file}",
                file=file,
                where=str(folder),
                fix="The index names it; fetch or copy it again.",
            )
    found: dict[str, str] = table
    return found


def check_folder(folder: Path) -> None:
    """Check the headers of all safetensors files of a base, and that the index is complete.

    Raises: UserError naming the file and the fault.
    """
    files = sorted(folder.glob("model*.safetensors"))
    held = {path.name: read_safetensors(path)[0] for path in files}
    index = "model.safetensors.index.json"
    if not (folder / index).is_file():
        return
    for name, file in index_of(folder, index).items():
        if file in held and name not in held[file]:
            raise damaged(
                folder / file, f"tensor {name!r}, which the index places here, is missing"
            )


# -- formats of 2023 that nothing reads any more ---------------------------------------------------

# The first four bytes, and what such a file is. They are a number: its letters stand reversed.
_LEGACY = {
    b"lmgg": "a ggml model of early 2023 (llama.cpp, alpaca.cpp)",
    b"fmgg": "a ggmf model of 2023 (llama.cpp)",
    b"tjgg": "a ggjt model of 2023 (llama.cpp)",
    b"algg": "a ggml LoRA adapter of 2023 (llama.cpp)",
    b"nsgg": "a saved session of llama.cpp",
}


def refuse_legacy_format(path: Path) -> None:
    """Nothing where the file is none of these.

    Raises: UserError that says what it is, and the way out.
    """
    with path.open("rb") as f:
        found = _LEGACY.get(f.read(4))
    if found is None:
        return
    fix = (
        "It was made from an adapter in PEFT's format: give that folder."
        if "LoRA" in found
        else "Today's llama.cpp reads it neither. Take the original weights (Hugging Face's or "
        "Meta's layout, see vicuna convert) and write a GGUF file of them: vicuna export gguf."
    )
    raise UserError(
        "this is {value}, a format that was given up", value=found, where=str(path), fix=fix
    )
