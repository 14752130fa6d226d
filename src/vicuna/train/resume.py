"""Where a run starts: new, from a checkpoint of its own, from another run, or from an adapter.

Also which settings it takes over from there. A resumed run may be started in another folder than
before: relative paths that lead nowhere from here are then taken from where it began.
"""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vicuna import config
from vicuna.config import TrainSettings
from vicuna.config.base import entry
from vicuna.data.records.find_files import is_hub_id
from vicuna.errors import SettingsError, UserError
from vicuna.files import sweep
from vicuna.hub import must_be_hub_id, snapshot
from vicuna.json_yaml import read_yaml
from vicuna.messages import Message
from vicuna.model import adapter as adapters
from vicuna.model.adapter_base import named_base
from vicuna.model.base import EMBEDDED
from vicuna.paths import exists, user_path
from vicuna.train import checkpoint as checkpoints
from vicuna.train.checkpoint import State
from vicuna.train.progress import RunConsole
from vicuna.train.run_folder import is_run

# Settings that decide which weights a run ends with; on resume they must be the checkpoint's.
RESULT_SETTINGS = (
    "template",
    "cutoff_len",
    "overlong",
    "train_turns",
    "thinking",
    "thinking_loss",
    "val_size",
    "seed",
    "batch_size",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_ratio",
    "warmup_steps",
    "optimizer",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "lora_target",
    "use_rslora",
    "precision",
)
# Settings that an incremental run does not take over from the run it continues.
_OWN_SETTINGS = {
    "dataset",
    "val_dataset",
    "val_size",
    "output_dir",
    "max_samples",
    "max_steps",
    "resume",
    "init_adapter",
    "adapter",
    "continue_from",
    "from_data_beginning",
}


@dataclass
class StartingPoint:
    """Where a run starts.

    kind: new; resume: from a checkpoint of its own; continue: from another run's; adapter: from an
    adapter's weights alone.
    """

    kind: Literal["new", "resume", "continue", "adapter"] = "new"
    checkpoint: Path | None = None
    state: State | None = None
    adapter: adapters.AdapterFiles | None = None


def find_start(
    settings: TrainSettings, named: dict[str, Any], console: RunConsole
) -> tuple[TrainSettings, StartingPoint]:
    """The settings with those of the older run filled in, and the starting point.

    Args:
        named: the settings that the user named, with their values.

    Raises: UserError if the starting point is not there, SettingsError if settings contradict it.
    """
    if settings.adapter and settings.init_adapter:
        raise SettingsError(["adapter and init_adapter are the same setting: give one of them"])
    names = [
        w for w in ("resume", "init_adapter", "adapter", "continue_from") if getattr(settings, w)
    ]
    if len(names) > 1:
        raise SettingsError(
            [Message("{names} exclude each other: give one of them", names=" and ".join(names))]
        )
    if settings.resume:
        return _resume(settings, named, console)
    if not settings.output_dir:
        settings = settings.model_copy(update={"output_dir": time.strftime("runs/%Y%m%d-%H%M%S")})
    if settings.continue_from:
        run, checkpoint = _run_and_checkpoint(settings.continue_from)
        state = checkpoints.read_state(checkpoint)
        old = {
            k: v
            for k, v in _old_settings(run, _OWN_SETTINGS | set(named)).items()
            if k not in _OWN_SETTINGS
        }
        merged = {**settings.model_dump(include=_OWN_SETTINGS), **old, **named}
        settings = config.build(TrainSettings, merged)
        return settings, StartingPoint("continue", checkpoint, state, _adapter_of(checkpoint))
    adapter = settings.init_adapter or settings.adapter
    if adapter:
        files = adapters.read_adapter(adapter)
        lora = files.lora
        lora_settings = {
            "lora_rank": lora.rank,
            "lora_alpha": lora.alpha,
            "use_rslora": lora.rslora,
        }
        wrong = [
            f"{k} is {getattr(settings, k)}, but the adapter {adapter} has {v}"
            for k, v in lora_settings.items()
            if k in named and getattr(settings, k) != v
        ]
        if wrong:
            raise SettingsError(wrong)
        settings = settings.model_copy(update={**lora_settings, "lora_target": list(lora.target)})
        for note in files.notes:
            console.warn(note)
        if "model" not in named and files.base:
            settings = settings.model_copy(update={"model": named_base(files)})
        return settings, StartingPoint("adapter", adapter=files)
    return settings, StartingPoint()


def _resume(
    settings: TrainSettings, named: dict[str, Any], console: RunConsole
) -> tuple[TrainSettings, StartingPoint]:
    place = Path(settings.resume)
    if settings.resume == "last" or (place / "config.yaml").is_file():
        if settings.resume == "last" and not settings.output_dir:
            raise SettingsError(["resume: which run? Give --output_dir RUN, or --resume RUN"])
        run = Path(settings.output_dir) if settings.resume == "last" else place
        _must_be_run(run)
        sweep(run / "checkpoints")  # one that was being replaced when the process was killed
        if not checkpoints.all_of(run / "checkpoints"):
            _refuse_continued(run)
            console.warn(Message("no checkpoint in this run yet: it starts from its beginning"))
            merged = {**_old_settings(run, named, begins=True), **named, "output_dir": str(run)}
            settings = config.build(TrainSettings, merged)
            adapter = settings.init_adapter or settings.adapter
            files = adapters.read_adapter(adapter) if adapter else None
            return settings, StartingPoint("resume", adapter=files)
        checkpoint, state, warnings = checkpoints.last_whole(run)
        for warning in warnings:
            console.warn(warning)
    else:
        run, checkpoint = _run_and_checkpoint(settings.resume)
        state = checkpoints.read_state(checkpoint)
        if not Path(settings.resume).exists() and not settings.output_dir:
            raise SettingsError(
                ["resume from the hub needs a folder to continue in: give --output_dir"]
            )
    merged = {**_old_settings(run, named), "from_data_beginning": None, **named}
    # A checkpoint from elsewhere (a copy, the hub) continues in the folder that was asked for.
    merged["output_dir"] = named.get("output_dir") or str(run)
    merged["resume"] = str(checkpoint)
    return (
        config.build(TrainSettings, merged),
        StartingPoint("resume", checkpoint, state, _adapter_of(checkpoint)),
    )


def _adapter_of(checkpoint: Path) -> adapters.AdapterFiles:
    return adapters.read_adapter(str(checkpoint / "adapter"))


def _refuse_continued(run: Path) -> None:
    """Raises: UserError when a run without a checkpoint began with another run's weights, which its
    config does not name: it would begin without them."""
    resolved = read_yaml(run / "config.yaml").get("resolved")
    if isinstance(resolved, dict) and resolved.get("begins") == "continue":
        raise UserError(
            "this run continues another one and was stopped before its first checkpoint",
            where=str(run),
            fix="Give its --continue_from again, with another --output_dir.",
        )


def _must_be_run(run: Path) -> None:
    if not (run / "config.yaml").is_file() or not is_run(run):
        raise UserError(
            "no run in this folder to resume",
            where=str(run),
            fix="Check --output_dir, or start the run without --resume.",
        )


def _run_and_checkpoint(place: str) -> tuple[Path, Path]:
    """(run, checkpoint) of a run folder, a checkpoint folder, or a hub id that holds a run."""
    path = Path(place)
    if not path.exists() and must_be_hub_id(place):
        path = snapshot(place, where=f"resume {place}")
    if (path / "state.json").is_file():
        run = path.resolve().parent.parent
        _must_be_run(run)
        return run, path
    _must_be_run(path)
    return path, checkpoints.last_whole(path)[0]


def _old_settings(run: Path, named: Collection[str], begins: bool = False) -> dict[str, Any]:
    """The settings of an older run, its relative paths as they lead from here.

    Args:
        named: settings that are not taken from it. begins: whether it starts from its beginning.
    """
    recipe = config.read_recipe(run / "config.yaml")
    old = {k: v for k, v in recipe.items() if k in TrainSettings.model_fields}
    return _resolve_paths(old, _began_in(run), set(old) - set(named), begins)


# -- relative paths --------------------------------------------------------------------------------


def _began_in(run: Path) -> str:
    """The working directory in which a run began; "" for runs of before it was noted."""
    environment = read_yaml(run / "config.yaml").get("environment")
    noted = environment.get("directory") if isinstance(environment, dict) else None
    return noted if isinstance(noted, str) else ""


def _resolve_paths(
    old: dict[str, Any], directory: str, needed: Collection[str], begins: bool
) -> dict[str, Any]:
    """A run's settings; relative paths that lead nowhere from here are taken from where it began.

    Args:
        directory: the folder in which the run began; "" if it is not known.
        needed: the settings that will be used: a file that is missing for them is a mistake.
        begins: whether the run starts from its beginning. Otherwise its checkpoint brings the
            template, and its name must stay as it is there.

    Raises: UserError if a file is in neither folder.
    """
    settings = dict(old)
    for name in ("dataset", "val_dataset"):
        value = settings.get(name) or []
        entries = [entry(e) for e in (value if isinstance(value, list) else [value])]
        for item in entries:
            if isinstance(item, dict) and isinstance(path := item.get("path"), str):
                item["path"] = _resolve(path, directory)
                if name in needed and not _matches(item["path"]) and not is_hub_id(path):
                    _refuse_missing(name, path, directory)
        settings[name] = entries
    for name in ("model", "init_adapter", "adapter", *(["template"] if begins else [])):
        if isinstance(text := settings.get(name), str) and text not in ("", "auto", EMBEDDED):
            settings[name] = _resolve(text, directory)
            is_file = text.endswith((".gguf", ".yaml", ".yml")) or text.startswith(".")
            if name in needed and is_file and not exists(settings[name]):
                _refuse_missing(name, text, directory)
    prompts = settings.get("sample_prompts")
    if isinstance(prompts, list):
        settings["sample_prompts"] = [
            _resolve(p, directory) if isinstance(p, str) and p.endswith(".txt") else p
            for p in prompts
        ]
    return settings


def _resolve(text: str, directory: str) -> str:
    """A path as it is if it leads somewhere from here or is absolute; else from `directory`."""
    if not directory or user_path(text).is_absolute() or _matches(text):
        return text
    moved = os.path.join(directory, text)
    return os.path.normpath(moved) if _matches(moved) else text


def _matches(text: str) -> bool:
    return exists(text) or bool(glob.glob(text, recursive=True))


def _refuse_missing(name: str, path: str, directory: str) -> None:
    """Raises: UserError for a relative path; opening a missing absolute one reports it."""
    if user_path(path).is_absolute():
        return
    folder = directory or "not noted by this run"
    raise UserError(
        "{name}: no such file here, nor in the folder in which the run began ({folder})",
        name=name,
        folder=folder,
        where=path,
        fix="The path is relative to that folder: resume there, or give --{name} PATH.",
    )
