"""Where things that are made once are kept, and how a file or folder appears there whole or not."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vicuna.errors import UserError


def cache_dir(*parts: str) -> Path:
    """A folder in the user's cache: $VICUNA_CACHE, else $XDG_CACHE_HOME/vicuna, else ~/.cache."""
    root = os.environ.get("VICUNA_CACHE")
    base = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "vicuna"
    return base.expanduser().joinpath(*parts)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill that takes the name `target` only when all in it is on the disk.

    It is written aside, synced and renamed; after an error nothing of it remains. An existing
    target is replaced.

    Raises: UserError where the disk is full or not writable.
    """
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        yield aside
        for path in aside.rglob("*"):
            if path.is_file():
                sync(path)
        sync(aside)
        old = target.with_name(f".{target.name}.{os.getpid()}.old")
        if target.exists():
            target.rename(old)
        aside.rename(target)
        sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as e:
        shutil.rmtree(aside, ignore_errors=True)
        raise disk_error(e, target) from e
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A path to write that takes the name `target` only when all of the file is on the disk.

    As `whole_folder`, for one file.

    Raises: UserError where the disk is full or not writable.
    """
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        sync(aside)
        aside.replace(target)
        sync(target.parent)
    except OSError as e:
        raise disk_error(e, target) from e
    finally:
        aside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Force a file or folder onto the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def disk_error(error: OSError, path: Path) -> UserError:
    """The user's version of an error of the file system."""
    parent = path if path.exists() else path.parent
    try:
        free = f" ({shutil.disk_usage(parent).free / 2**20:.0f} MiB free)"
    except OSError:
        free = ""
    return UserError(
        f"cannot write: {error.strerror or error}{free}",
        where=str(path),
        fix="Free some space or choose another folder; what was complete before is still there.",
    )


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as f:
        if hasattr(hashlib, "file_digest"):
            return hashlib.file_digest(f, "sha256").hexdigest()
        digest = hashlib.sha256()
        while block := f.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()
