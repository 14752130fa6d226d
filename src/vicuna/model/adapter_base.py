"""The base that an adapter names: found where it may lie, or said to be the adapter's own claim."""

from __future__ import annotations

import re
from pathlib import Path

from vicuna.errors import UserError
from vicuna.hub import is_hub_id
from vicuna.messages import Message
from vicuna.model.adapter_files import AdapterFiles
from vicuna.model.base import EMBEDDED, locate
from vicuna.paths import user_path

_OF_4_BITS = re.compile(r"(-unsloth)?-bnb-4bit$|-(GPTQ|AWQ)(-\w+)?$", re.IGNORECASE)


def named_base(files: AdapterFiles) -> str:
    """The base an adapter names, as `model.base.locate` takes it. A path is also looked for from
    the adapter's own folder, and from the one it lies in.

    Raises: UserError where it names none, or one that is neither here nor on the hub.
    """
    name = files.base.strip()
    if not name:
        raise UserError(
            "this adapter does not say which base it belongs to",
            where=f"adapter {files.path}",
            fix="Name it: --model FOLDER_OR_HUB_ID.",
        )
    if name == EMBEDDED:
        return name
    if found := _on_this_machine(name, files.path):
        return str(found)
    if not is_hub_id(name):
        raise _not_here(files, name, Message("which is not on this machine"))
    try:
        locate(name, weights=False)
    except UserError as e:
        raise _not_here(
            files, name, Message("which is no folder here, and {reason}", reason=e.what)
        ) from e
    return name


def _on_this_machine(name: str, adapter: Path) -> Path | None:
    """Where a path leads, if it does; as it is, then from the adapter's folder."""
    try:
        path = user_path(name)
        places = [path] if path.is_absolute() else [path, adapter / path, adapter.parent / path]
        return next((p for p in places if p.exists()), None)
    except (OSError, ValueError):  # too long, a NUL
        return None


def _not_here(files: AdapterFiles, name: str, why: str) -> UserError:
    shown = name if len(name) <= 120 else name[:117] + "..."
    fix = Message("Say where that base is: --model FOLDER, or its hub id.")
    if _OF_4_BITS.search(name):
        fix = Message(
            "{fix} Its name is that of a quantised copy: the same model in 16 bits serves as well.",
            fix=fix,
        )
    return UserError(
        "the adapter names {value} as its base, {why}",
        value=shown,
        why=why,
        where=f"adapter {files.path}",
        fix=fix,
    )
