"""Paths as people write them."""

from __future__ import annotations

import shlex
from pathlib import Path

from vicuna.errors import UserError


def user_path(text: str) -> Path:
    """A path with its `~` expanded, if that home exists and no file has this very name."""
    path = Path(text)
    if not text.startswith("~"):
        return path
    try:
        return path if path.exists() else path.expanduser()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, nobody's ~
        return path


def given_path(text: str) -> Path:
    """`user_path` of a text that a user typed.

    Raises: UserError if it cannot be a path at all.
    """
    path = user_path(text)
    try:
        path.exists()
        path.parent.is_dir()
    except (OSError, ValueError) as e:
        shown = text if len(text) <= 60 else text[:57] + "..."
        raise UserError(
            "this cannot be a path ({reason})", reason=getattr(e, "strerror", e), where=shown
        ) from e
    if "\0" in text:
        raise UserError(
            "a path cannot contain the character NUL",
            where=text.replace("\0", "?"),
            fix="Check the path.",
        )
    return path


def shell_word(path: str | Path) -> str:
    """A path quoted for a shell, for commands that users copy."""
    return shlex.quote(str(path))


def exists(text: str) -> bool:
    """Whether a file or folder has this path; false if the text cannot be a path."""
    try:
        return user_path(text).exists()
    except (OSError, ValueError):
        return False
