"""Checks for values from files of others, before they are used or shown."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vicuna.errors import UserError

LONGEST = 20_000  # characters of a text that are shown
LARGEST = 2.0**53  # of whole numbers: more than any run counts


def text(value: Any, most: int = LONGEST) -> str:
    """A text of bounded length without lone surrogates, which no browser can be sent."""
    plain = value if isinstance(value, str) else "" if value is None else str(value)
    shown = plain[:most].encode("utf-8", "replace").decode()
    return shown if len(plain) <= most else shown + " …"


def parse_json(line: str) -> Any:
    """Raises: ValueError if a line is not JSON, or is nested too deeply."""
    try:
        return json.loads(line)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def number(value: Any) -> float:
    """A number; NaN if it is not finite.

    Raises: ValueError if it is not a number.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"expected a number, not {str(value)[:40]!r}")
    if not math.isfinite(value):
        return math.nan
    if abs(value) > 1e300:
        raise ValueError("the number is too large")
    return float(value)


def count(value: Any) -> int:
    """A number of things, or a time.

    Raises: ValueError if it is anything else.
    """
    size = number(value)
    if not 0 <= size <= LARGEST:
        raise ValueError(f"expected a count, not {size}")
    return int(size)


def within(path: Path, folders: Iterable[Path]) -> bool:
    """Whether a path, its links followed, is inside one of the folders (which are resolved)."""
    try:
        target = path.resolve()
    except (OSError, ValueError, RuntimeError):  # a circle of links, an impossible name
        return False
    return any(target.is_relative_to(folder) for folder in folders)


def check_links(folder: Path, folders: Iterable[Path]) -> None:
    """Raises: UserError if a folder, or something in it, is a link that points outside."""
    roots = list(folders)
    inside = [folder, *folder.iterdir()] if folder.is_dir() else [folder]
    for path in inside:
        if not within(path, roots):
            raise UserError("a link points outside the folders of the page", where=text(path.name))
