"""A training as a process of its own: it goes on when the page closes and when the server stops.

What the page knows of it lies in the run's folder, so that it is found again: `.process.json` says
which process it is, `output.txt` has all that it printed. A run that was started in a terminal has
neither; the lock of its folder names its process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import psutil

from vicuna import untrusted
from vicuna.errors import ERROR_FILE, UserError, read_error_file
from vicuna.files import whole_file
from vicuna.json_yaml import read_json
from vicuna.system_errors import cannot_write

NOTE, OUTPUT, LOCK, LEFT = ".process.json", "output.txt", ".lock", ".error.json"
# Two readings of when a process began may differ by this: the clock is set now and then.
SLACK = 5.0
TAIL = 1 << 16
ERROR, INTERRUPTED = "error: ", "interrupted"

Asked = Literal["", "pause", "stop"]

# Processes that this one started: they must be waited for, or they stay behind as zombies.
_children: dict[int, subprocess.Popen[bytes]] = {}


@dataclass(frozen=True)
class Process:
    """A training's process.

    created: when it began; a pid alone may have been given to another process since. output_at:
    where in `output.txt` it began to write; -1: it writes somewhere else. asked: what it was asked
    for from here.
    """

    pid: int
    created: float
    output_at: int = -1
    asked: Asked = ""

    def alive(self) -> bool:
        """Whether it still works."""
        child = _children.get(self.pid)
        if child is not None and child.poll() is not None:
            _children.pop(self.pid, None)
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created) < SLACK
            return same and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.Error, ValueError, OverflowError):
            return False


def launch(folder: Path, argv: Sequence[str]) -> Process:
    """Start `vicuna ARGV`, detached from this process, its output in the run's folder.

    Raises: UserError where the disk is full or the system starts no more processes.
    """
    command = [sys.executable, "-m", "vicuna", *argv]
    environment = {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    environment[ERROR_FILE] = str(folder.resolve() / LEFT)
    try:
        with (folder / OUTPUT).open("ab") as output:
            begin = output.tell()
            output.write(f"$ vicuna {' '.join(argv)}\n".encode("utf-8", "replace"))
            output.flush()
            # A session of its own: neither the terminal's Ctrl-C nor its end reaches it.
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | environment,
            )
    except OSError as e:
        raise cannot_write(e, folder) from e
    _children[child.pid] = child
    try:
        created = psutil.Process(child.pid).create_time()
    except psutil.Error:
        created = time.time()
    process = Process(child.pid, created, begin)
    _write(folder, process)
    return process


def find(folder: Path) -> Process | None:
    """The process that works in a folder now or did so last; None if none is known."""
    noted = _noted(folder)
    if noted is not None and noted.alive():
        return noted
    # Somebody may have resumed the run in a terminal since.
    holder = _holder(folder)
    if holder is not None and noted is not None and holder.pid == noted.pid:
        return noted  # it is just ending: its workers still hold what it held
    return holder or noted


def interrupt(folder: Path, process: Process) -> None:
    """Ask for an end after the current step, with a whole checkpoint: what Ctrl-C does."""
    _note_request(folder, process, "pause")
    _send(process, signal.SIGINT)


def kill(folder: Path, process: Process) -> None:
    """End it at once. The last whole checkpoint stays, as it does at any kill."""
    _note_request(folder, process, "stop")
    if hasattr(os, "killpg") and process.output_at >= 0:
        # Its workers too: launched from here, it leads a session of its own.
        try:
            os.killpg(process.pid, signal.SIGKILL)
            return
        except OSError:
            pass
    _send(process, getattr(signal, "SIGKILL", signal.SIGTERM))


def last_error(folder: Path, process: Process | None) -> str:
    """The last output of the process if that was an error or an interruption; else "".

    An error is the message of `vicuna`: what happened, and on the lines below what to do.
    """
    if process is None or process.output_at < 0:
        return ""
    text = tail(folder, process.output_at)
    lines = [line.rstrip() for line in text.splitlines()]
    for at in range(len(lines) - 1, -1, -1):
        if lines[at].startswith(ERROR):
            error = "\n".join(lines[at:]).removeprefix(ERROR).strip()
            return read_error_file(folder / LEFT, error, untrusted.text)
    output = [line for line in lines if line]
    return INTERRUPTED if output and output[-1].startswith(INTERRUPTED) else ""


def tail(folder: Path, begin: int = 0) -> str:
    """The end of what was printed since byte `begin`."""
    try:
        with (folder / OUTPUT).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(begin, size - TAIL))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def _send(process: Process, number: int) -> None:
    try:
        os.kill(process.pid, number)
    except ProcessLookupError:
        pass
    except OSError as e:
        raise UserError(
            "process {pid} cannot be told to stop: {reason}",
            pid=process.pid,
            reason=e.strerror or e,
            fix="It may belong to another user of this machine.",
        ) from e


def _note_request(folder: Path, process: Process, asked: Asked) -> None:
    _write(folder, replace(process, asked=asked))


def _write(folder: Path, process: Process) -> None:
    with whole_file(folder / NOTE) as aside:
        aside.write_text(json.dumps(asdict(process)) + "\n")


def _noted(folder: Path) -> Process | None:
    try:
        noted = read_json(folder / NOTE)
        pid, at = untrusted.count(noted["pid"]), int(untrusted.number(noted.get("output_at", -1)))
        asked = noted.get("asked", "")
        if not 0 < pid < 1 << 31 or asked not in get_args(Asked):
            return None
        return Process(pid, untrusted.number(noted["created"]), at, asked)
    except (UserError, KeyError, ValueError, TypeError):
        return None


def _holder(folder: Path) -> Process | None:
    """The process that holds the folder's lock."""
    lock = folder / LOCK
    try:
        content = lock.read_text().split()
        taken = lock.stat().st_mtime
        pid = int(content[1]) if content[:1] == ["pid"] else 0
        created = psutil.Process(pid).create_time() if pid else taken + 2 * SLACK
    except (OSError, ValueError, OverflowError, IndexError, psutil.Error):
        return None
    # What began after the lock was taken has the number of a process that is gone.
    if created > taken + SLACK or not _held(lock):
        return None
    return Process(pid, created)


def _held(lock: Path) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows: the process is all there is to go by
        return True
    with lock.open("r") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        return False
