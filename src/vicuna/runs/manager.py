"""The runs of one folder: start, pause, resume, stop and delete them, and find them again.

All that is known of a run is in its folder. A server that was stopped and started again finds
every run as it is, and so does a second one beside it.
"""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vicuna import config, untrusted
from vicuna.config import TrainSettings
from vicuna.errors import UserError
from vicuna.messages import Message
from vicuna.runs import process as run_process
from vicuna.runs.log import RunLog
from vicuna.runs.process import INTERRUPTED, Process

State = Literal[
    "starting", "running", "pausing", "paused", "finished", "failed", "stopped", "killed",
    "unreadable",
]  # fmt: skip
WORKING: tuple[State, ...] = ("starting", "running", "pausing")
RECIPE = "recipe.yaml"
# Anything of these makes a folder a run.
_SIGNS = ("config.yaml", "log.jsonl", RECIPE, run_process.NOTE)
_NAME = re.compile(r"\w[\w.\- ]{0,79}")


@dataclass(frozen=True)
class Run:
    """A run as it is now. error: the message of a run that failed; of a paused one, why it was not
    resumed."""

    path: Path
    state: State
    log: RunLog
    error: str = ""

    @property
    def name(self) -> str:
        return untrusted.text(self.path.name, 200)

    @property
    def working(self) -> bool:
        """Whether a process works in its folder."""
        return self.state in WORKING

    @property
    def has_adapter(self) -> bool:
        return (
            self.state != "unreadable" and (self.path / "adapter" / "adapter_config.json").is_file()
        )

    def settings(self) -> dict[str, Any]:
        """The settings it was started with, those that were chosen automatically included."""
        for name in ("config.yaml", RECIPE):
            try:
                return config.read_recipe(self.path / name)
            except UserError:
                continue
        return {}


class Runs:
    """All runs under a folder.

    Args:
        may_write: raises a UserError if runs may only be looked at.
    """

    def __init__(self, folder: Path, may_write: Callable[[], None] = lambda: None) -> None:
        self.folder = folder
        self._may_write = may_write
        self._logs: dict[Path, RunLog] = {}
        self._reading = threading.Lock()
        self._starting = threading.Lock()

    # Looking.

    def all(self) -> list[Run]:
        """Every run, the newest first."""
        try:
            inside = list(self.folder.iterdir())
        except OSError:
            return []
        found = [path for path in inside if not path.name.startswith(".") and _is_run(path)]
        return [self._look(path) for path in sorted(found, key=_when, reverse=True)]

    def get(self, name: str) -> Run:
        """A run by name.

        Raises: UserError if there is none; a name is never a path.
        """
        path = self.folder / _checked(name)
        if not _is_run(path):
            raise UserError(
                "no such run", folder=self.folder, where=name, fix="The runs lie in {folder}."
            )
        return self._look(path)

    def working(self) -> Run | None:
        """The run that a process works at now."""
        return next((run for run in self.all() if run.working), None)

    def _look(self, path: Path) -> Run:
        """A run as it is now; if it cannot be read, one that says so."""
        try:
            # What lies in a run is shown: a link would show what lies elsewhere.
            untrusted.check_links(path, [self.folder.resolve()])
            return self._read(path)
        except UserError as e:
            error = str(e)
        except Exception as e:  # its files may hold anything
            error = Message(
                "it cannot be read: {error}", error=untrusted.text(e, 200) or type(e).__name__
            )
        return Run(path, "unreadable", RunLog(path / "log.jsonl"), error)

    def _read(self, path: Path) -> Run:
        process = run_process.find(path)
        # Asked before the log is read: what it wrote at its end is then in the log.
        alive = process is not None and process.alive()
        with self._reading:
            log = self._logs.setdefault(path, RunLog(path / "log.jsonl"))
            log.read()
        state, error = _state(path, process, alive, log)
        return Run(path, state, log, error)

    # Doing.

    def start(self, values: Mapping[str, Any], name: str = "") -> Run:
        """Start `vicuna train` with these settings in a process of its own.

        Args:
            values: settings that were given; all others are left to their defaults.
            name: of the run's folder; the date and time by default.

        Raises: SettingsError for settings that are wrong; UserError if another training is
            active, or the name is taken.
        """
        self._may_write()
        path = self.folder / (_checked(name) if name.strip() else time.strftime("%Y%m%d-%H%M%S"))
        recipe = {**values, "output_dir": str(path)}
        config.build(TrainSettings, recipe)
        with self._alone():
            if path.exists() and any(path.iterdir()):
                raise UserError(
                    "this folder already holds a run", where=path.name, fix="Choose another name."
                )
            path.mkdir(parents=True, exist_ok=True)
            _write_recipe(path / RECIPE, recipe)
            run_process.launch(path, ["train", str(path / RECIPE)])
        return self._look(path)

    def resume(self, name: str) -> Run:
        """Resume from the last whole checkpoint, or from the beginning if there is none.

        Raises: UserError if it works already, is finished, or another training works.
        """
        self._may_write()
        with self._alone():
            run = self.get(name)
            if run.state == "unreadable":
                raise UserError(run.error, where=name)
            if run.state == "finished":
                raise UserError(
                    "this run is finished", where=name, fix="Start a new one from its adapter."
                )
            argv = ["train", "--resume", str(run.path)]
            if not (run.path / "config.yaml").is_file():
                argv = ["train", str(run.path / RECIPE)]
            run_process.launch(run.path, argv)
        return self._look(run.path)

    def pause(self, name: str) -> Run:
        """Ask for a checkpoint and an end after the current step; returns at once.

        Raises: UserError if it does not work.
        """
        return self._tell(name, run_process.interrupt)

    def stop(self, name: str) -> Run:
        """End it at once; it can still be resumed from its last checkpoint.

        Raises: UserError if it does not work.
        """
        return self._tell(name, run_process.kill)

    def delete(self, name: str) -> None:
        """Remove a run with all that it made. Whoever calls this has asked the user.

        Raises: UserError if a process works in it.
        """
        self._may_write()
        run = self.get(name)
        if run.working:
            raise UserError("a training works in it", where=name, fix="Stop it first.")
        # Renamed first: a kill in between must not leave half a run under its name.
        gone = run.path.with_name(f".{run.path.name}.deleted")
        shutil.rmtree(gone, ignore_errors=True)
        run.path.rename(gone)
        if gone.is_symlink():
            gone.unlink()
        shutil.rmtree(gone, ignore_errors=True)
        with self._reading:
            self._logs.pop(run.path, None)

    def _tell(self, name: str, tell: Any) -> Run:
        self._may_write()
        run = self.get(name)
        process = run_process.find(run.path)
        if process is None or not run.working:
            raise UserError("it does not run", where=name)
        tell(run.path, process)
        return self._look(run.path)

    def refuse_second(self) -> None:
        """Raises: UserError if a training works: two at once would share the memory."""
        other = self.working()
        if other is not None:
            raise UserError(
                "another training works already, and two would share the memory",
                where=other.name,
                fix="Wait until it is done, or pause it.",
            )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other training works, and none is started from elsewhere meanwhile."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._starting, _file_lock(self.folder / ".starting"):
            self.refuse_second()
            yield


def _state(path: Path, process: Process | None, alive: bool, log: RunLog) -> tuple[State, str]:
    """A run's state, and the message of its error."""
    if alive and process is not None:
        if process.asked:
            return "pausing", ""
        begun = float(log.began.get("time", 0.0)) >= process.created
        return ("running" if begun else "starting"), ""
    ended = log.end and (process is None or float(log.end["time"]) >= process.created)
    if ended:
        return ("paused" if log.end.get("reason") == "interrupted" else "finished"), ""
    error = run_process.last_error(path, process) or _logged_error(log, process)
    kept = any((path / "checkpoints").glob("step-*"))
    if error and error != INTERRUPTED:
        begun = process is None or float(log.began.get("time", 0.0)) >= process.created
        # Refused before it began: nothing of the run was touched, it can go on as before.
        return ("paused" if kept and not begun else "failed"), error
    asked = process.asked if process else ""
    if asked == "pause" and kept:
        return "paused", ""
    return ("stopped", "") if asked or error else ("killed", "")


def _logged_error(log: RunLog, process: Process | None) -> str:
    """The error that ended a run, as its log has it: of one that was started in a terminal."""
    if log.last.get("event") != "warning":
        return ""
    if process is not None and float(log.last.get("time", 0.0)) < process.created:
        return ""
    error_type, _, message = str(log.last.get("message", "")).partition(": ")
    if error_type == "KeyboardInterrupt":
        return INTERRUPTED
    return message if error_type.isidentifier() and error_type[:1].isupper() else ""


def _checked(name: str) -> str:
    """A name that is one folder's, whatever somebody typed.

    Raises: UserError if it is none.
    """
    name = name.strip()
    if not _NAME.fullmatch(name) or name.endswith("."):
        raise UserError(
            "{name!r} is no name for a run",
            name=name,
            where="name",
            fix="Letters, digits, spaces and - _ . are allowed, at most 80 of them.",
        )
    return name


def _is_run(path: Path) -> bool:
    try:
        return any((path / sign).exists() for sign in _SIGNS)
    except OSError:  # a folder that may not be read, a circle of links
        return False


def _when(path: Path) -> float:
    """When a run was begun: the age of what is written once."""
    for name in (RECIPE, "data.json", "config.yaml", "log.jsonl"):
        try:
            return (path / name).stat().st_mtime
        except OSError:
            continue
    return 0.0


def _write_recipe(path: Path, values: Mapping[str, Any]) -> None:
    import yaml

    from vicuna.files import whole_file

    head = "# Made by the page. The same in a terminal:  vicuna train THIS_FILE\n"
    with whole_file(path) as aside:
        text = head + yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
        aside.write_text(text, encoding="utf-8")


@contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    """One process at a time."""
    with path.open("a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except ImportError:  # Windows
            pass
        yield
