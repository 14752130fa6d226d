"""Paths as people write them."""

from __future__ import annotations

from pathlib import Path


def user_path(text: str) -> Path:
    """A path with its `~` expanded, where there is such a home and nothing of that very name."""
    path = Path(text)
    if not text.startswith("~"):
        return path
    try:
        return path if path.exists() else path.expanduser()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, nobody's ~
        return path


def exists(text: str) -> bool:
    """Whether something lies at a path; false for what cannot be one."""
    try:
        return user_path(text).exists()
    except (OSError, ValueError):
        return False
