"""Pickled weights (`.bin`, `.pth`, `.pt`), read without running any code in them.

A pickle is a program. torch's restricted reader knows tensors and plain containers and nothing
else; a file that asks for more is refused with the name of what it wanted to run.
"""

from __future__ import annotations

import contextlib
import pickle
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vicuna.errors import UserError
from vicuna.messages import Message

SHARED = 8  # times that what a file stores may stand for tensors: heads are tied to embeddings
_WANTED = re.compile(r"GLOBAL:? ([A-Za-z_][\w.]*\.[\w.]+)")
# What a state dict of any age names without harm.
_HARMLESS = ("torch.", "collections.OrderedDict")


def load_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled file by name, mapped into memory where its format allows.

    Raises: UserError where the file would run code (naming it), is damaged, or is no plain table
        of tensors.
    """
    try:
        mapped = zipfile.is_zipfile(path)
        if mapped:
            _check_archive(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as e:
        raise _refused(path, e) from e
    except UserError:
        raise
    except Exception as e:  # damaged files raise many kinds
        raise _damaged(path, (str(e).splitlines() or [type(e).__name__])[0]) from e
    return _tensors(path, loaded)


def _check_archive(path: Path) -> None:
    """Refuse packed records: torch writes none, and one of a few kilobytes can fill all memory."""
    with zipfile.ZipFile(path) as archive:
        packed = [i.filename for i in archive.infolist() if i.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise _damaged(path, f"{packed[0]} is packed, which torch never writes")


def _tensors(path: Path, loaded: Any) -> dict[str, Tensor]:
    if isinstance(loaded, dict):
        inner = loaded.get("state_dict", loaded.get("model", loaded))
        loaded = inner if isinstance(inner, dict) else loaded
        found = {k: v for k, v in loaded.items() if isinstance(k, str) and isinstance(v, Tensor)}
        _check_sizes(path, found)
        if found:
            return found
    raise UserError(
        "no tensors by name in this file ({type})",
        type=type(loaded).__name__,
        where=str(path),
        fix="Expected a state dict as torch.save writes it.",
    )


def _check_sizes(path: Path, tensors: dict[str, Tensor]) -> None:
    """Refuse tensors that are larger than what is stored of them.

    A pickle says how a tensor lies in its storage; with strides of zero one number stands for
    billions, which take their memory as soon as the tensor is copied.
    """
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
            raise _damaged(path, f"{name} is not stored as plain numbers")
        asked, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
        if asked > stored:
            raise _damaged(
                path,
                Message(
                    "{name} would take {asked} bytes, and {stored} are stored",
                    name=name,
                    asked=asked,
                    stored=stored,
                ),
            )
    stored = _stored(path)
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors.values()}
    if sum(kept.values()) > stored:
        raise _damaged(path, f"it names {sum(kept.values())} bytes of data, and holds {stored}")
    # One storage for many names is usual (tied weights); for thousands of them it is a bomb.
    asked = sum(t.numel() * t.element_size() for t in tensors.values())
    if asked > SHARED * stored + (1 << 20):
        raise _damaged(path, f"its tensors would take {asked} bytes, and the file has {stored}")


def _stored(path: Path) -> int:
    """Bytes of data in a file: of its records where it is an archive."""
    if not zipfile.is_zipfile(path):
        return path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        return sum(i.file_size for i in archive.infolist() if "/data/" in i.filename)


def _refused(path: Path, error: pickle.UnpicklingError) -> UserError:
    names = _wanted(path, str(error))
    if not names:
        return _damaged(path, "it asks for what no table of tensors needs")
    return UserError(
        "this file wants to run code: {names}; it was refused and nothing was run",
        names=", ".join(names),
        where=str(path),
        fix="Weights need no code. Do not use this file; take safetensors from a source you trust.",
    )


def _wanted(path: Path, message: str) -> list[str]:
    """What a pickle asks for beyond tensors."""
    try:
        if names := torch.serialization.get_unsafe_globals_in_checkpoint(str(path)):
            return sorted(names)
    except Exception:  # an old format, or damaged further on
        pass
    named = _named_in(path)
    return sorted(n for n in named if not n.startswith(_HARMLESS)) or _WANTED.findall(message)[:1]


def _named_in(path: Path) -> set[str]:
    """The names that a bare pickle calls for, read off its instructions without following them."""
    names: set[str] = set()
    texts: list[str] = []
    with path.open("rb") as f, contextlib.suppress(Exception):
        while True:  # an old file is several pickles in a row
            for code, given, _ in pickletools.genops(f):
                if code.name in ("GLOBAL", "INST"):
                    names.add(str(given).replace(" ", "."))
                elif code.name == "STACK_GLOBAL" and len(texts) > 1:
                    names.add(".".join(texts[-2:]))
                elif isinstance(given, str):
                    texts.append(given)
    return names


def _damaged(path: Path, why: str) -> UserError:
    return UserError(
        "cannot read the weights: {why}",
        why=why,
        where=str(path),
        fix="The file is damaged or not a plain list of tensors; fetch it again.",
    )
