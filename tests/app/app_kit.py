"""What the tests of the page share: folders of runs as processes that are gone left them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vicuna.app import run_process


def write_run(path: Path, *events: dict[str, Any], output: str | None = None) -> None:
    """A run's folder as a process that is gone has left it."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("model: tiny\n")
    first = {"event": "start", "step": 0, "total_steps": 9, "time": 1.0}
    (path / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in (first, *events)))
    if output is not None:
        (path / "output.txt").write_text(output)
        gone = run_process.Process(2**22 + 1, 0.5, 0)
        (path / ".process.json").write_text(json.dumps(gone.__dict__))
