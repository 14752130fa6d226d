"""What came from foreign files, made fit to be shown: numbers are numbers, texts are texts."""

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
    """A text without what no browser can be sent (halves of characters), of bounded length."""
    plain = value if isinstance(value, str) else "" if value is None else str(value)
    shown = plain[:most].encode("utf-8", "replace").decode()
    return shown if len(plain) <= most else shown + " …"


def parse_json(line: str) -> Any:
    """Raises: ValueError where a line is no JSON, also where it nests too deep."""
    try:
        return json.loads(line)
    except RecursionError:
        raise ValueError("it nests too deep") from None


def number(value: Any) -> float:
    """A number, NaN for what is not finite.

    Raises: ValueError for what is no number.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"no number: {str(value)[:40]!r}")
    if not math.isfinite(value):
        return math.nan
    if abs(value) > 1e300:
        raise ValueError("a number beyond all measure")
    return float(value)


def count(value: Any) -> int:
    """A number of things, or a time.

    Raises: ValueError for anything else.
    """
    found = number(value)
    if not 0 <= found <= LARGEST:
        raise ValueError(f"no count: {found}")
    return int(found)


def within(path: Path, folders: Iterable[Path]) -> bool:
    """Whether a path lies in one of the folders (which are resolved), links followed."""
    try:
        found = path.resolve()
    except (OSError, ValueError, RuntimeError):  # a circle of links, a name that cannot be
        return False
    return any(found.is_relative_to(folder) for folder in folders)


def check_links(folder: Path, folders: Iterable[Path]) -> None:
    """Raises: UserError where a folder, or what lies in it, is a link that leads out."""
    roots = list(folders)
    inside = [folder, *folder.iterdir()] if folder.is_dir() else [folder]
    for path in inside:
        if not within(path, roots):
            raise UserError("a link leads out of the folders of the page", where=text(path.name))
