"""Relative paths of a run that is gone on with from another folder than the one it began in."""

from __future__ import annotations

import glob
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from vicuna.config.base import entry
from vicuna.data.records.find_files import is_hub_id
from vicuna.errors import UserError
from vicuna.json_yaml import read_yaml
from vicuna.model.base import EMBEDDED
from vicuna.paths import exists, user_path

_DATA = ("dataset", "val_dataset")


def began_in(run: Path) -> str:
    """The working directory in which a run began; "" for runs of before it was noted."""
    environment = read_yaml(run / "config.yaml").get("environment")
    noted = environment.get("directory") if isinstance(environment, dict) else None
    return noted if isinstance(noted, str) else ""


def settle(
    old: dict[str, Any], there: str, needed: Collection[str], begins: bool
) -> dict[str, Any]:
    """A run's settings with relative paths that are not here taken from where it began.

    Args:
        there: the folder in which the run began; "" when nobody knows.
        needed: the settings that will be used: what is missing of them is a mistake.
        begins: whether the run starts from its beginning. Otherwise its checkpoint brings the
            template, and its name must stay as it is there.

    Raises: UserError when a file is neither here nor there.
    """
    found = dict(old)
    for name in _DATA:
        given = found.get(name) or []
        entries = [entry(e) for e in (given if isinstance(given, list) else [given])]
        for one in entries:
            if isinstance(one, dict) and isinstance(path := one.get("path"), str):
                one["path"] = _place(path, there)
                if name in needed and not _lies(one["path"]) and not is_hub_id(path):
                    _refuse_missing(name, path, there)
        found[name] = entries
    for name in ("model", "init_adapter", "adapter", *(["template"] if begins else [])):
        if isinstance(text := found.get(name), str) and text not in ("", "auto", EMBEDDED):
            found[name] = _place(text, there)
            is_file = text.endswith((".gguf", ".yaml", ".yml")) or text.startswith(".")
            if name in needed and is_file and not exists(found[name]):
                _refuse_missing(name, text, there)
    prompts = found.get("sample_prompts")
    if isinstance(prompts, list):
        found["sample_prompts"] = [
            _place(p, there) if isinstance(p, str) and p.endswith(".txt") else p for p in prompts
        ]
    return found


def _place(text: str, there: str) -> str:
    """A path as it is, when it leads somewhere from here or is absolute; else from there."""
    if not there or user_path(text).is_absolute() or _lies(text):
        return text
    moved = os.path.join(there, text)
    return os.path.normpath(moved) if _lies(moved) else text


def _lies(text: str) -> bool:
    return exists(text) or bool(glob.glob(text, recursive=True))


def _refuse_missing(name: str, path: str, there: str) -> None:
    """Raises: UserError for a relative path; an absolute one is told of when it is opened."""
    if user_path(path).is_absolute():
        return
    folder = there or "not noted by this run"
    raise UserError(
        f"{name}: no such file here, nor in the folder in which the run began ({folder})",
        where=path,
        fix=f"The path is relative to that folder: go on from there, or give --{name} PATH.",
    )
