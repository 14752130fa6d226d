"""The memory plan of a training before it is started: `vicuna plan`, as a process of its own.

Planning puts stand-ins in the place of parts of the model code, which must not happen in a process
that answers somebody at the same time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vicuna.commands.data import renderer_for
from vicuna.config import TrainSettings
from vicuna.data import dataset
from vicuna.errors import ERROR_FILE, UserError, read_error_file
from vicuna.files import scratch_folder
from vicuna.messages import Message, restored
from vicuna.runs.process import ERROR

SECONDS = 300
SHORTEST = 16  # what cutoff_len may be at least


def longest_example(settings: TrainSettings) -> int:
    """Tokens of the longest example that these settings leave: what the training plans for.

    Reading the data is not wasted: what comes of it lies in the cache, where the training finds it.

    Raises: UserError where a file cannot be used, or there is nothing to train on.
    """
    renderer = renderer_for(settings)
    found, _ = dataset.load([*settings.dataset, *settings.val_dataset], settings, renderer)
    if not len(found):
        raise UserError(
            "no usable records: nothing to train on",
            where="dataset",
            fix="The tab Data says why each record was dropped.",
        )
    return max(SHORTEST, min(found.lengths().longest, settings.cutoff_len))


def plan(chosen: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """What `vicuna plan --json` says of these settings on this machine.

    Args:
        longest: tokens of the longest example.

    Raises: UserError with its words where it cannot be told.
    """
    import yaml

    chosen = {**chosen, "cutoff_len": longest}
    with scratch_folder("plan") as folder:
        recipe = Path(folder) / "plan.yaml"
        recipe.write_text(yaml.safe_dump(dict(chosen), allow_unicode=True), encoding="utf-8")
        environment = os.environ | {ERROR_FILE: str(Path(folder) / "error.json")}
        try:
            done = subprocess.run(
                [sys.executable, "-m", "vicuna", "plan", str(recipe), "--json"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=SECONDS,
                env=environment,
            )
        except subprocess.TimeoutExpired as e:
            raise UserError(
                "planning took more than {seconds} seconds",
                seconds=SECONDS,
                where=Message("memory plan"),
            ) from e
        if done.returncode:
            _, _, words = done.stderr.rpartition(ERROR)
            raise UserError(
                read_error_file(Path(folder) / "error.json", words.strip())
                or Message("no plan could be made")
            )
    return restored(json.loads(done.stdout.strip().splitlines()[-1]))
