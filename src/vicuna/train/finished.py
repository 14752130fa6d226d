"""Whether a run that is to be resumed is finished: told from its folder, nothing is loaded."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vicuna.config import TrainSettings
from vicuna.model.adapter_location import WEIGHTS
from vicuna.train.run_folder import read_log


@dataclass(frozen=True)
class End:
    """How a run ended. steps: updates done."""

    run: Path
    steps: int
    reason: str


def finished(settings: TrainSettings, given: Collection[str]) -> End | None:
    """The end of the run that is named, where it came to one and nothing else is asked for.

    Args:
        given: the settings that the user named. With any but the run itself it may go on: with
            more epochs, from an earlier checkpoint.
    """
    if not settings.resume or set(given) - {"resume", "output_dir"}:
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
    return End(run, steps, str(end.get("reason", "")))
