"""Errors of the operating system and of memory, as UserErrors.

Code that knows which file it reads or writes says so itself (`cannot_read`, `cannot_write`).
`explain` is for code that does not, and the last resort before an error counts as a bug.
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

_FULL = Message("Free some space, or choose a folder on another disk.")
# errno: (what happened, the way out).
_SYSTEM: dict[int, tuple[Message, Message]] = {
    errno.ENOSPC: (Message("the disk is full"), _FULL),
    errno.EDQUOT: (Message("the disk quota is used up"), _FULL),
    errno.EFBIG: (
        Message("the file would be larger than this system or `ulimit -f` allows"),
        Message("Raise the limit, or choose a folder on another disk."),
    ),
    errno.EACCES: (
        Message("no permission"),
        Message("Change the permissions, or choose another place."),
    ),
    errno.EPERM: (
        Message("the system does not permit this"),
        Message("Change the permissions, or choose another place."),
    ),
    errno.EROFS: (
        Message("the file system is read-only"),
        Message("Choose a folder that can be written to."),
    ),
    errno.ENOENT: (Message("no such file or folder"), Message("Check the path.")),
    errno.ENOTDIR: (
        Message("part of the path is a file, not a folder"),
        Message("Check the path."),
    ),
    errno.EISDIR: (Message("this is a folder, not a file"), Message("Name a file.")),
    errno.EEXIST: (
        Message("a file or folder with this name exists"),
        Message("Choose another name."),
    ),
    errno.ENOTEMPTY: (Message("this folder is not empty"), Message("Choose another name.")),
    errno.ENAMETOOLONG: (Message("the name is too long"), Message("Choose a shorter one.")),
    errno.ELOOP: (Message("the links form a circle"), Message("Check the path.")),
    errno.EMFILE: (Message("too many files are open"), Message("Raise the limit (ulimit -n).")),
    errno.ENFILE: (
        Message("too many files are open on this system"),
        Message("Close other programs."),
    ),
    errno.ENOMEM: (
        Message("out of memory"),
        Message("Close other programs, or use a smaller model."),
    ),
    errno.EIO: (
        Message("input/output error"),
        Message("The disk or its connection may be damaged."),
    ),
    errno.EBUSY: (Message("the file is in use"), Message("Close the program that uses it.")),
    errno.EADDRINUSE: (Message("the port is in use"), Message("Choose another --port.")),
}
_ASIDE = re.compile(r"\.(.+?)(?:\.(?:[0-9a-f]{6}-)?\d+)?\.part")
# What CPU allocators (Linux, Windows), CUDA's runtime, cuBLAS and Apple's GPU say when memory is
# exhausted.
MEMORY_WORDS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "cublas_status_alloc_failed",
)
# How Rust libraries name the system's error number.
_NUMBER = re.compile(r"\(os error (\d+)\)")
# PyTorch and numpy give no error number when they cannot write a file.
_UNWRITTEN = re.compile(
    r"PytorchStreamWriter failed|inline_container.* unexpected pos|\d+ requested and \d+ written"
)


def install_extra(extra: str) -> Message:
    """How to install an optional part of this project, which is on no package index."""
    return Message("In the clone of this project: pip install -e '.[{extra}]'", extra=extra)


def explain(error: BaseException) -> UserError | None:
    """The UserError for an error of the system or of memory; None for any other."""
    if isinstance(error, UserError):
        return error
    system = system_error(error)
    if system is not None:
        what, fix = describe(system)
        return UserError(what, where=_path_of(system), fix=fix)
    text = str(error)
    if isinstance(error, OSError):  # raised by a library
        return UserError(Message(text.strip().split("\n")[0] or type(error).__name__))
    if isinstance(error, MemoryError) or any(w in text.lower() for w in MEMORY_WORDS):
        return UserError(
            "out of memory",
            fix="Close other programs, or use a smaller model. For training, vicuna plan shows "
            "which settings fit.",
        )
    if isinstance(error, RecursionError):
        return UserError("a file or setting is nested too deeply", fix="Check both.")
    if (isinstance(error, ValueError) and "null byte" in text) or "null character" in text:
        return UserError("a path cannot contain the character NUL", fix="Check the path.")
    if isinstance(error, UnicodeError):
        return UserError(
            "this text cannot be read or written as {encoding}: {reason}",
            encoding=getattr(error, "encoding", "Unicode"),
            reason=getattr(error, "reason", error),
            fix="Check names and texts for damaged characters.",
        )
    return None


def system_error(error: BaseException) -> OSError | None:
    """The operating system's error that an error is or reports; None if there is none."""
    if isinstance(error, OSError):
        # Libraries raise OSError for many things; the system's own errors have a number.
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


def describe(error: OSError) -> tuple[Message, Message]:
    """(what happened, the way out) of an error of the operating system."""
    unknown = Message(error.strerror or str(error)), Message("")
    return _SYSTEM.get(error.errno or 0, unknown)


def _path_of(error: OSError) -> str:
    name = error.filename
    return os.fsdecode(name) if isinstance(name, (str, bytes)) else ""


def cannot_write(error: BaseException, path: Path) -> UserError:
    """The error of a file or folder that could not be written."""
    path = _target(path)
    system = system_error(error)
    if system is None:
        return UserError(
            "cannot write: {reason}", reason=error, where=str(path), fix="Choose another folder."
        )
    reason, fix = describe(system)
    free = _free_space(path) if system.errno in (errno.ENOSPC, errno.EDQUOT) else None
    if free is None:
        return UserError("cannot write: {reason}", reason=reason, where=str(path), fix=fix)
    return UserError(
        "cannot write: {reason} ({free:,.0f} MiB free)",
        reason=reason,
        free=free,
        where=str(path),
        fix=fix,
    )


def _target(path: Path) -> Path:
    """The final path of a file that is written aside first (`files.whole_file`)."""
    while aside := _ASIDE.fullmatch(path.name):
        path = path.with_name(aside[1])
    return path


def cannot_read(error: BaseException, path: Path) -> UserError:
    """The error of a file or folder that could not be read."""
    system = system_error(error)
    reason, fix = describe(system) if system is not None else (Message(str(error)), "")
    return UserError("cannot read: {reason}", reason=reason, where=str(path), fix=fix)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Inside, an error of the system counts as one of writing `target`, unless it names a file
    in another folder, which then is one that was read.

    Raises: UserError.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        system = system_error(e)
        if system is None:
            raise
        elsewhere = _path_of(system)
        if elsewhere and not Path(elsewhere).is_relative_to(target.parent):
            raise explain(e) or e from e
        raise cannot_write(e, target) from e


def _free_space(path: Path) -> float | None:
    """Free space of a path's disk in MiB; None if the system does not say."""
    for place in (path, *path.parents):
        try:
            return shutil.disk_usage(place).free / 2**20
        except OSError:
            continue
    return None
