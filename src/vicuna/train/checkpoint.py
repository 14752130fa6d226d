"""Checkpoints: whole or absent, and enough to resume a run bit for bit.

A checkpoint is a folder with the adapter (a plain PEFT adapter that can be used at once), the
optimiser's moments as safetensors, and `state.json`. It is written aside, synced and renamed; the
hash of every file is noted, and a damaged one is never resumed from.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vicuna.errors import UserError
from vicuna.files import file_hash, whole_folder
from vicuna.model import adapter as adapters
from vicuna.train import optimizer as optimizers
from vicuna.train.micro_batch import MicroBatch

_NAME = re.compile(r"step-(\d{6,})")


@dataclass
class State:
    """Everything besides tensors that the next step depends on.

    step: steps done. data_offset: step k takes the data of step k - data_offset. settings: those
    that decide the result, for comparison on resume. sample_seconds: spent on sample answers.
    evaluation_due: the evaluation after this step was interrupted.
    """

    step: int = 0
    total: int = 0
    warmup: int = 0
    data_offset: int = 0
    data: str = ""
    micro_batch: MicroBatch = field(default_factory=MicroBatch)
    settings: dict[str, Any] = field(default_factory=dict)
    examples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_step: int = 0
    best_loss: float | None = None
    evaluations_without_gain: int = 0
    loss_scale: float = 1.0
    nonfinite: int = 0
    nonfinite_in_a_row: int = 0
    last_loss: float | None = None
    sample_seconds: float = 0.0
    evaluation_due: bool = False

    def to_json(self) -> dict[str, Any]:
        """As `state.json` has it: the micro-batch under `cut`."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["cut"] = fields.pop("micro_batch").to_json()
        return fields

    @classmethod
    def from_json(cls, noted: dict[str, Any]) -> State:
        """What `to_json` made, of this version or an older one.

        Raises: KeyError, TypeError, ValueError if it is something else.
        """
        fields = dict(noted)
        return cls(micro_batch=MicroBatch.from_json(fields.pop("cut")), **fields)


def name_of(step: int) -> str:
    return f"step-{step:06d}"


def save(
    folder: Path,
    state: State,
    peft: Any,
    optimizer: torch.optim.Optimizer,
    names: list[str],
    meta: dict[str, Any],
) -> Path:
    """Write `folder/step-000200`; it is whole or absent.

    Args:
        names: the parameters' names in the optimiser's order.

    Raises: UserError if the disk is full; what was there before stays.
    """
    from safetensors.torch import save_file

    target = folder / name_of(state.step)
    with whole_folder(target) as aside:
        (aside / "adapter").mkdir()
        adapters.save(peft, aside / "adapter", meta)
        save_file(optimizers.state_of(optimizer, names), str(aside / "optimizer.safetensors"))
        files = {
            str(p.relative_to(aside)): file_hash(p) for p in sorted(aside.rglob("*")) if p.is_file()
        }
        text = json.dumps({**state.to_json(), "files": files}, indent=1)
        (aside / "state.json").write_text(text)
    return target


def restore_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer, names: list[str]) -> None:
    """Put the moments of a checkpoint into a fresh optimiser.

    Raises: UserError if they belong to other parameters.
    """
    from safetensors.torch import load_file

    tensors = load_file(str(checkpoint / "optimizer.safetensors"))
    missing = optimizers.load_state(optimizer, names, tensors)
    if missing:
        raise UserError(
            "the optimiser's state has nothing for {missing}",
            missing=missing[0],
            where=str(checkpoint),
            fix="lora_target and model must be the checkpoint's; or use --init_adapter.",
        )


# -- reading --------------------------------------------------------------------------------


def all_of(folder: Path) -> list[Path]:
    """Checkpoints under a run's `checkpoints`, by step."""
    steps = [(int(m[1]), p) for p in folder.glob("step-*") if (m := _NAME.fullmatch(p.name))]
    return [p for _, p in sorted(steps)]


def read_state(checkpoint: Path) -> State:
    """The state of a checkpoint, after its files were checked against their hashes.

    Raises: UserError if it is damaged.
    """
    try:
        noted = json.loads((checkpoint / "state.json").read_text())
        files = noted.pop("files")
        for name, sha256 in files.items():
            if file_hash(checkpoint / name) != sha256:
                raise ValueError(f"{name} is not what was written")
        return State.from_json(noted)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(
            "the checkpoint is damaged: {error}",
            error=e,
            where=str(checkpoint),
            fix="Resume from an earlier one: --resume RUN/checkpoints/step-...",
        ) from e


def last_whole(run: Path) -> tuple[Path, State, list[str]]:
    """The newest undamaged checkpoint of a run, and a warning for each damaged one it skipped.

    Raises: UserError if there is none.
    """
    warnings: list[str] = []
    for checkpoint in reversed(all_of(run / "checkpoints")):
        try:
            return checkpoint, read_state(checkpoint), warnings
        except UserError as e:
            warnings.append(str(e).splitlines()[0])
    raise UserError(
        "no whole checkpoint in this run",
        where=str(run),
        fix="All of its checkpoints are damaged: start a new run in another --output_dir.",
    )


def prune(folder: Path, keep: int, spare: Iterable[str]) -> None:
    """Remove the oldest checkpoints beyond `keep` (0: none), never one named in `spare`."""
    present = all_of(folder)
    if not keep:
        return
    for old in present[:-keep]:
        if old.name not in spare:
            # Renamed first: a kill in between must not leave half a checkpoint under its name.
            gone = old.with_name(f".{old.name}.old")
            old.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
