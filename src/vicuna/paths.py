"""Paths as people write them."""

from __future__ import annotations

import shlex
from pathlib import Path

from vicuna.errors import UserError


def user_path(text: str) -> Path:
    """A path with its `~` expanded, where there is such a home and nothing of that very name."""
    path = Path(text)
    if not text.startswith("~"):
        return path
    try:
        return path if path.exists() else path.expanduser()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, nobody's ~
        return path


def given_path(text: str) -> Path:
    """`user_path` of what a user gave.

    Raises: UserError where it cannot be a path at all.
    """
    path = user_path(text)
    try:
        path.exists()
        path.parent.is_dir()
    except (OSError, ValueError) as e:
        shown = text if len(text) <= 60 else text[:57] + "..."
        raise UserError(f"this cannot be a path ({getattr(e, 'strerror', e)})", where=shown) from e
    if "\0" in text:
        raise UserError("this cannot be a path (it contains a NUL)", where=text.replace("\0", "?"))
    return path


def shell_word(path: str | Path) -> str:
    """A path as one word of a command that is shown to be copied."""
    return shlex.quote(str(path))


def exists(text: str) -> bool:
    """Whether something lies at a path; false for what cannot be one."""
    try:
        return user_path(text).exists()
    except (OSError, ValueError):
        return False
