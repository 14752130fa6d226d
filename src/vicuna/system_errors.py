"""What the system and the libraries say when a file, a disk or the memory fails, in words.

A place that knows which file it reads or writes says so itself; `explain` is for those that do not,
and the last thing that is tried before an error counts as one of this program.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vicuna.errors import UserError
from vicuna.messages import Message

_FULL = "Free some space, or choose a folder on another disk."
# errno: (what happened, the way out).
_SYSTEM: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("the disk is full", _FULL),
    errno.EDQUOT: ("the disk quota is used up", _FULL),
    errno.EFBIG: (
        "the file would be larger than this system or `ulimit -f` allows",
        "Raise the limit, or choose a folder on another disk.",
    ),
    errno.EACCES: ("no permission", "Change the permissions, or choose another place."),
    errno.EPERM: ("this is not permitted", "Change the permissions, or choose another place."),
    errno.EROFS: ("the file system is read-only", "Choose a folder that can be written to."),
    errno.ENOENT: ("no such file or folder", "Check the path."),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "Check the path."),
    errno.EISDIR: ("this is a folder, not a file", "Name a file."),
    errno.EEXIST: ("something of this name exists already", "Choose another name."),
    errno.ENOTEMPTY: ("this folder is not empty", "Choose another name."),
    errno.ENAMETOOLONG: ("the name is too long", "Choose a shorter one."),
    errno.ELOOP: ("the links lead in a circle", "Check the path."),
    errno.EMFILE: ("too many files are open", "Raise the limit (ulimit -n)."),
    errno.ENFILE: ("too many files are open on this system", "Close other programs."),
    errno.ENOMEM: ("out of memory", "Close other programs, or use a smaller model."),
    errno.EIO: ("input/output error", "The disk, or the way to it, may be damaged."),
    errno.EBUSY: ("the file is in use", "Close the program that uses it."),
    errno.EADDRINUSE: ("the port is in use", "Choose another --port."),
}
_ASIDE = re.compile(r"\.(.+?)(?:\.(?:[0-9a-f]{6}-)?\d+)?\.part")
# What a CPU's allocator (Linux, Windows), CUDA's runtime, cuBLAS and Apple's GPU say.
MEMORY_WORDS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "cublas_status_alloc_failed",
)
# How libraries that are not Python's tell of the system's error number.
_NUMBER = re.compile(r"\(os error (\d+)\)")
# PyTorch and numpy name no number of a file that they could not write.
_UNWRITTEN = re.compile(
    r"PytorchStreamWriter failed|inline_container.* unexpected pos|\d+ requested and \d+ written"
)


def install_extra(extra: str) -> Message:
    """How to install an optional part of this project, which is on no package index."""
    return Message("In the clone of this project: pip install -e '.[{extra}]'", extra=extra)


def explain(error: BaseException) -> UserError | None:
    """The user's version of an error of the system or of memory; None for any other."""
    if isinstance(error, UserError):
        return error
    found = system_error(error)
    if found is not None:
        what, fix = in_words(found)
        return UserError(what, where=_place(found), fix=fix)
    words = str(error)
    if isinstance(error, OSError):  # a library's, in its own words
        return UserError(words.strip().split("\n")[0] or type(error).__name__)
    if isinstance(error, MemoryError) or any(w in words.lower() for w in MEMORY_WORDS):
        return UserError(
            "memory ran out",
            fix="Close other programs, or take a smaller model; for training vicuna plan says "
            "what fits.",
        )
    if isinstance(error, RecursionError):
        return UserError(
            "a file or a setting is nested too deeply", fix="Check the files and settings."
        )
    if (isinstance(error, ValueError) and "null byte" in words) or "null character" in words:
        return UserError("a path cannot hold the character NUL", fix="Check the path.")
    if isinstance(error, UnicodeError):
        return UserError(
            f"this text cannot be written or read as {getattr(error, 'encoding', 'Unicode')}: "
            f"{getattr(error, 'reason', error)}",
            fix="Check names and texts for characters that are damaged.",
        )
    return None


def system_error(error: BaseException) -> OSError | None:
    """The operating system's error that an error is, or tells of; None if there is none."""
    if isinstance(error, OSError):
        # Libraries raise OSError for many things; one of the system has a number.
        return error if error.errno is not None else _numbered(error)
    return _numbered(error)


def _numbered(error: BaseException) -> OSError | None:
    words = str(error)
    number = _NUMBER.search(words)
    if number is not None:
        return OSError(int(number[1]), os.strerror(int(number[1])))
    if _UNWRITTEN.search(words):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return None


def in_words(error: OSError) -> tuple[str, str]:
    """(what happened, the way out) of an error of the operating system."""
    known = _SYSTEM.get(error.errno or 0)
    return known or (error.strerror or str(error), "")


def _place(error: OSError) -> str:
    name = error.filename
    return os.fsdecode(name) if isinstance(name, (str, bytes)) else ""


def cannot_write(error: BaseException, path: Path) -> UserError:
    """That a file or folder could not be written, and what can be done about it."""
    path = _meant(path)
    found = system_error(error)
    what, fix = in_words(found) if found is not None else (str(error), "Choose another folder.")
    if found is not None and found.errno in (errno.ENOSPC, errno.EDQUOT):
        what += _free(path)
    return UserError(f"cannot write: {what}", where=str(path), fix=fix)


def _meant(path: Path) -> Path:
    """The path that is to be written, of one that is written aside first (`cache.whole_file`)."""
    while aside := _ASIDE.fullmatch(path.name):
        path = path.with_name(aside[1])
    return path


def cannot_read(error: BaseException, path: Path) -> UserError:
    """That a file or folder could not be read, and what can be done about it."""
    found = system_error(error)
    what, fix = in_words(found) if found is not None else (str(error), "")
    return UserError(f"cannot read: {what}", where=str(path), fix=fix)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Inside, an error of the system is told as one of writing `target`, unless it names a file
    that lies elsewhere: what was read, then.

    Raises: UserError.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        found = system_error(e)
        if found is None:
            raise
        elsewhere = _place(found)
        if elsewhere and not Path(elsewhere).is_relative_to(target.parent):
            raise explain(e) or e from e
        raise cannot_write(e, target) from e


def _free(path: Path) -> str:
    for place in (path, *path.parents):
        try:
            return f" ({shutil.disk_usage(place).free / 2**20:,.0f} MiB free)"
        except OSError:
            continue
    return ""
