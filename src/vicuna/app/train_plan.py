"""The memory plan of a training before it is started: `vicuna plan`, as a process of its own.

Planning puts stand-ins in the place of parts of the model code, which must not happen in a process
that answers somebody at the same time.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vicuna.app.run_process import ERROR
from vicuna.errors import UserError

SECONDS = 300


def plan(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """What `vicuna plan --json` says of these settings on this machine.

    Raises: UserError with its words where it cannot be told.
    """
    import yaml

    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "plan.yaml"
        recipe.write_text(yaml.safe_dump(dict(chosen), allow_unicode=True), encoding="utf-8")
        try:
            done = subprocess.run(
                [sys.executable, "-m", "vicuna", "plan", str(recipe), "--json"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired as e:
            raise UserError(
                f"planning took more than {SECONDS} seconds", where="memory plan"
            ) from e
    if done.returncode:
        _, _, words = done.stderr.rpartition(ERROR)
        raise UserError(words.strip() or "no plan could be made", where="")
    loaded: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return loaded
