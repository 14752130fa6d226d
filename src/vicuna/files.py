"""Where things that are made once are kept, and how a file or folder appears there whole or not."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path

from vicuna.interrupts import shielded
from vicuna.system_errors import writing


def cache_dir(*parts: str) -> Path:
    """A folder in the user's cache: $VICUNA_CACHE, else $XDG_CACHE_HOME/vicuna, else ~/.cache."""
    root = os.environ.get("VICUNA_CACHE")
    base = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "vicuna"
    return base.expanduser().joinpath(*parts)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill that takes the name `target` only when all in it is on the disk.

    It is written aside, synced and renamed; after an error nothing of it remains. An existing
    target is replaced. What a killed process left aside is cleaned up first.

    Raises: UserError where the disk is full or not writable.
    """
    aside = _aside(target, "part")
    with _told(aside, target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep_for(target)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        yield aside
        for path in aside.rglob("*"):
            if path.is_file():
                sync(path)
        sync(aside)
        with shielded():
            _take_name(aside, target)
            sync(target.parent)


def _take_name(aside: Path, target: Path) -> None:
    """Rename, in place of what is there; on an error that is put back."""
    old = _aside(target, "old")
    replaces = target.exists()
    if replaces:
        target.rename(old)
    try:
        aside.rename(target)
    except OSError:
        if replaces:
            old.rename(target)
        raise
    _remove(old)


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A path to write that takes the name `target` only when all of the file is on the disk.

    As `whole_folder`, for one file.

    Raises: UserError where the disk is full or not writable.
    """
    with whole_files(target) as (aside,):
        yield aside


@contextmanager
def whole_files(*targets: Path) -> Iterator[list[Path]]:
    """As `whole_file`, for several that belong together: none takes its name before all are on the
    disk. The first must be written; another that is not is left out."""
    asides = [_aside(target, "part") for target in targets]
    pairs = list(zip(asides, targets))
    with ExitStack() as stack:
        # The innermost tells of what goes wrong: the first, which the others are beside.
        for aside, target in reversed(pairs):
            stack.enter_context(_told(aside, target))
            target.parent.mkdir(parents=True, exist_ok=True)
            _sweep_for(target)
        yield asides
        written = [pair for pair in pairs if pair[0] is asides[0] or pair[0].exists()]
        for aside, _ in written:
            sync(aside)
        with shielded():
            for aside, target in written:
                aside.replace(target)
                sync(target.parent)


@contextmanager
def _told(aside: Path, target: Path) -> Iterator[None]:
    """Whatever goes wrong, nothing stays aside; what the disk refused becomes a UserError."""
    try:
        with writing(target):
            yield
    except BaseException:
        with shielded():
            _remove(aside)
        raise


# -- what a killed process left behind ----

_LEFT = re.compile(r"\.(?P<name>.+?)\.(?:(?P<place>[0-9a-f]{6})-)?(?P<pid>\d+)\.(?P<kind>part|old)")
_SCRATCH = re.compile(r"vicuna-\w+-(?P<place>[0-9a-f]{6})-(?P<pid>\d+)-\w+")
# Of another machine, or another container, nobody here knows whether its process lives.
_FOREIGN_SECONDS = 7 * 86400


@lru_cache
def _place() -> str:
    """A name for where a process number means something: this machine, or this container."""
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        space = 0
    return hashlib.sha256(f"{socket.gethostname()};{space}".encode()).hexdigest()[:6]


def _aside(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{_place()}-{os.getpid()}.{kind}")


def sweep(folder: Path, name: str = "", locked: bool = False) -> None:
    """Remove what killed processes left aside in a folder; what they were replacing comes back.

    Args:
        name: of one target; else all that is named as `whole_folder` and `whole_file` name it.
        locked: nobody else writes here now, so whatever lies aside was left.
    """
    try:
        listed = [path for path in folder.iterdir() if path.name.startswith(".")]
    except OSError:
        return
    for path in sorted(listed):
        found = _LEFT.fullmatch(path.name)
        if not found or (name and found["name"] != name):
            continue
        if not locked and not _left(path, found["place"], int(found["pid"])):
            continue
        target = folder / found["name"]
        if found["kind"] == "old" and not target.exists():
            # Killed between two renames: what was there before is whole.
            with contextlib.suppress(OSError):
                path.rename(target)
        else:
            _remove(path)


def scratch_folder(what: str) -> tempfile.TemporaryDirectory[str]:
    """A folder for what is needed only now; those of killed processes are cleaned up first."""
    for path in Path(tempfile.gettempdir()).glob(f"vicuna-{what}-*"):
        found = _SCRATCH.fullmatch(path.name)
        if found and _left(path, found["place"], int(found["pid"])):
            _remove(path)
    return tempfile.TemporaryDirectory(prefix=f"vicuna-{what}-{_place()}-{os.getpid()}-")


def _sweep_for(target: Path) -> None:
    """Leftovers of the same target; in the cache, which is ours alone, all of its neighbours'."""
    own = cache_dir() in target.parents
    sweep(target.parent, "" if own else target.name)


def _left(path: Path, place: str | None, pid: int) -> bool:
    """Whether the process that wrote this is gone."""
    try:
        changed = path.stat().st_mtime
    except OSError:
        return False
    if place is not None and place != _place():
        return time.time() - changed > _FOREIGN_SECONDS
    import psutil

    try:
        # What began after the last change has the number of a process that is gone.
        return psutil.Process(pid).create_time() > changed + 5
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def sync(path: Path) -> None:
    """Force a file or folder onto the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as f:
        if hasattr(hashlib, "file_digest"):
            return hashlib.file_digest(f, "sha256").hexdigest()
        digest = hashlib.sha256()
        while block := f.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()
