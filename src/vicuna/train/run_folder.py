"""A run's folder: its lock, its log, its config. Other tools rely on the names in here.

config.yaml   every setting resolved; also what was chosen, the versions, the hardware
data.json     the data report
log.jsonl     one object a line: start, step, eval, sample, checkpoint, warning, end
checkpoints/step-000200/   whole or absent
adapter/      the result, in PEFT's format
loss.png
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from vicuna.append_lines import Lines
from vicuna.config import RUN_KEYS, TrainSettings
from vicuna.errors import UserError
from vicuna.files import sweep, whole_file
from vicuna.messages import Message, with_messages
from vicuna.model.adapter_location import WEIGHTS
from vicuna.system_errors import cannot_write, writing

_PACKAGES = ("chinese-vicuna", "torch", "transformers", "peft", "tokenizers", "bitsandbytes")
# What a run writes, and would write over.
_WRITTEN = ("config.yaml", "data.json", "log.jsonl", "loss.png", "adapter", "checkpoints")
# How a data report begins: a run that ended over its data leaves nothing else.
_REPORT = re.compile(r'\s*\{\s*"files":\s*\[\s*(\]|\{\s*"path":)')


class RunFolder:
    """The folder of one run, locked while a process works in it.

    Raises: UserError when it cannot be made, another process has it, or it holds somebody's own
        files under names that a run writes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _refuse_others(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock: IO[str] = (path / ".lock").open("a+")
        except OSError as e:
            raise cannot_write(e, path) from e
        with writing(path / ".lock"):
            _lock(self._lock, path)
        self._log: Lines | None = None
        self._sweep()

    def _sweep(self) -> None:
        """Clean up what a killed process left: this one has the lock."""
        sweep(self.path)
        for name in ("config.yaml", "data.json", "log.jsonl"):
            (self.path / f".{name}.part").unlink(missing_ok=True)  # of versions before
        sweep(self.checkpoints, locked=True)
        for gone in self.checkpoints.glob(".step-*.old"):
            shutil.rmtree(gone, ignore_errors=True)  # was being removed as one too many

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    def used(self) -> bool:
        """Whether an earlier run has left anything here."""
        names = ("log.jsonl", "config.yaml", "checkpoints", "adapter")
        return any((self.path / n).exists() for n in names)

    def write(self, name: str, text: str) -> None:
        """Replace a small file in one instant."""
        with whole_file(self.path / name) as aside:
            aside.write_text(text, encoding="utf-8", errors="replace")

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, json.dumps(value, ensure_ascii=False, indent=1) + "\n")

    def write_config(self, settings: dict[str, Any], resolved: dict[str, Any]) -> None:
        """config.yaml: usable as a recipe as it is."""
        import yaml

        whole = {**settings, "resolved": resolved, "environment": environment()}
        self.write("config.yaml", yaml.safe_dump(whole, sort_keys=False, allow_unicode=True))

    # The log.

    def open_log(self, keep_steps: int | None = None) -> None:
        """Begin a new log, or continue the old one as it was after step `keep_steps`."""
        path = self.path / "log.jsonl"
        kept: list[str] = []
        if keep_steps is not None and path.is_file():
            kept = [
                json.dumps(event, ensure_ascii=False)
                for event in read_log(path)
                if event.get("step", 0) <= keep_steps and event.get("event") != "end"
            ]
        self.write("log.jsonl", "".join(line + "\n" for line in kept))
        self._log = Lines(path)

    def log(self, event: str, **fields: Any) -> dict[str, Any]:
        """Write one event."""
        line = with_messages({"event": event, **fields, "time": round(time.time(), 3)})
        assert self._log is not None
        self._log.add(json.dumps(line, ensure_ascii=False))
        return line

    def close(self) -> None:
        if self._log is not None:
            # On a full disk what could not be written would be tried again.
            with contextlib.suppress(OSError):
                self._log.close()
        self._lock.close()


def is_run(path: Path) -> bool:
    """Whether a run of ours has worked in a folder: its config or its log says so."""
    import yaml

    with contextlib.suppress(OSError, ValueError, RecursionError, yaml.YAMLError):
        config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        if isinstance(config, dict) and all(key in config for key in RUN_KEYS):
            return True
    with contextlib.suppress(OSError, ValueError, RecursionError):
        with (path / "log.jsonl").open(encoding="utf-8") as log:
            first = json.loads(log.readline(1 << 20))
        return isinstance(first, dict) and first.get("event") == "start"
    return False


def _refuse_others(path: Path) -> None:
    """Raises: UserError when a run here would write over what is not a run's."""
    held = [name for name in _WRITTEN if os.path.lexists(path / name)]
    if not held or is_run(path):
        return
    if "data.json" in held and _is_report(path / "data.json"):
        held.remove("data.json")
    if held:
        raise UserError(
            "this folder is not a run, and a run would write over {held} in it",
            held=", ".join(held),
            where=str(path),
            fix="Choose another --output_dir: a new folder, such as runs/mine.",
        )


def _is_report(path: Path) -> bool:
    """Whether a file is a run's data report; only its beginning is read."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return _REPORT.match(file.read(4096)) is not None
    except OSError:
        return False


def _lock(file: IO[str], path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # no such lock on Windows; two runs in one folder are then not noticed
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        file.seek(0)
        raise UserError(
            "another process ({read}) is working in this run folder",
            read=file.read().strip() or Message("unknown"),
            where=str(path),
            fix="Wait for it, stop it, or choose another --output_dir.",
        ) from e
    file.truncate(0)
    file.write(f"pid {os.getpid()}")
    file.flush()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The events of a log; a last line that a kill cut off, and what is no event, is left out."""
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            step = event.get("step", 0)
            if isinstance(step, (int, float)) and not isinstance(step, bool):
                events.append(event)
    return events


@dataclass(frozen=True)
class EndedRun:
    """A run that came to its end. steps: optimiser steps done."""

    run: Path
    steps: int
    reason: str


def ended_run(settings: TrainSettings, named: Collection[str]) -> EndedRun | None:
    """The run to be resumed, if it has ended and nothing else is asked for; nothing is loaded.

    Args:
        named: the settings that the user named. With any but the run itself it may continue: with
            more epochs, from an earlier checkpoint.
    """
    if not settings.resume or set(named) - {"resume", "output_dir"}:
        return None
    last = settings.resume == "last"
    if not last and settings.output_dir and Path(settings.output_dir) != Path(settings.resume):
        return None
    run = Path(settings.output_dir if last else settings.resume)
    if not (run / "config.yaml").is_file() or not (run / "log.jsonl").is_file():
        return None
    if not any((run / "adapter" / name).is_file() for name in WEIGHTS):
        return None
    events: list[dict[str, Any]] = read_log(run / "log.jsonl")
    end = events[-1] if events else {}
    if end.get("event") != "end" or end.get("reason") == "interrupted":
        return None
    steps = int(end.get("step", 0))
    saved = [int(p.name[5:]) for p in (run / "checkpoints").glob("step-*") if p.name[5:].isdigit()]
    if saved and max(saved) != steps:
        return None
    return EndedRun(run, steps, str(end.get("reason", "")))


def environment() -> dict[str, Any]:
    """Versions and hardware, for config.yaml."""
    import torch

    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "directory": os.getcwd(),  # what relative paths in the settings are relative to
        "python": platform.python_version(),
        "versions": versions,
        "machine": platform.machine(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }
