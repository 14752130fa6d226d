"""Where a run begins: nowhere, in a checkpoint of its own, in another run, or in an adapter.

Which settings are taken over from there, which must not differ, and the state of the first step.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vicuna import config
from vicuna.config import TrainSettings
from vicuna.data import dataset as datasets
from vicuna.data.tokenizer import TokenizerData
from vicuna.errors import SettingsError, UserError
from vicuna.files import sweep
from vicuna.hub import must_be_hub_id, snapshot
from vicuna.json_yaml import read_yaml
from vicuna.model import adapter as adapters
from vicuna.model import load
from vicuna.model.adapter_base import named_base
from vicuna.train import checkpoint as checkpoints
from vicuna.train.checkpoint import State
from vicuna.train.old_digest import same_data
from vicuna.train.progress import Screen
from vicuna.train.resume_paths import began_in, settle
from vicuna.train.run_folder import is_run
from vicuna.train.schedule import Schedule, continued_total, warmup_steps

# Settings that decide which weights a run ends with; on resume they must be the checkpoint's.
DECISIVE = (
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
SCHEDULE = {"num_train_epochs", "max_steps", "warmup_ratio", "warmup_steps", "batch_size", "data"}
OTHER_DATA = "the data are not those of the checkpoint: records were changed, added or left out"
INITIAL_FP16_SCALE = 4096.0
# Settings that an incremental run does not take over from the run it continues.
_OWN = {
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
class Origin:
    """Where a run begins: nowhere, a checkpoint of its own, another run's, or an adapter."""

    kind: str = "new"  # new, resume, continue, adapter
    checkpoint: Path | None = None
    state: State | None = None
    adapter: adapters.AdapterFiles | None = None


def find(
    settings: TrainSettings, given: dict[str, Any], screen: Screen
) -> tuple[TrainSettings, Origin]:
    """What to begin from, and the settings with what the older run had set filled in.

    Raises: UserError where it is not there, SettingsError where settings contradict it.
    """
    if settings.adapter and settings.init_adapter:
        raise SettingsError(["adapter and init_adapter are the same setting: give one of them"])
    ways = [
        w for w in ("resume", "init_adapter", "adapter", "continue_from") if getattr(settings, w)
    ]
    if len(ways) > 1:
        raise SettingsError([f"{' and '.join(ways)} exclude each other: give one of them"])
    if settings.resume:
        return _resume(settings, given, screen)
    if not settings.output_dir:
        settings = settings.model_copy(update={"output_dir": time.strftime("runs/%Y%m%d-%H%M%S")})
    if settings.continue_from:
        run, checkpoint = _run_and_checkpoint(settings.continue_from)
        state = checkpoints.read_state(checkpoint)
        old = {k: v for k, v in _old_settings(run, _OWN | set(given)).items() if k not in _OWN}
        merged = {**settings.model_dump(include=_OWN), **old, **given}
        settings = config.build(TrainSettings, merged)
        return settings, Origin("continue", checkpoint, state, _adapter_of(checkpoint))
    start = settings.init_adapter or settings.adapter
    if start:
        files = adapters.read_adapter(start)
        lora = files.lora
        named = {"lora_rank": lora.rank, "lora_alpha": lora.alpha, "use_rslora": lora.rslora}
        wrong = [
            f"{k} is {getattr(settings, k)}, but the adapter {start} has {v}"
            for k, v in named.items()
            if k in given and getattr(settings, k) != v
        ]
        if wrong:
            raise SettingsError(wrong)
        settings = settings.model_copy(update={**named, "lora_target": list(lora.target)})
        for note in files.notes:
            screen.warn(note)
        if "model" not in given and files.base:
            settings = settings.model_copy(update={"model": named_base(files)})
        return settings, Origin("adapter", adapter=files)
    return settings, Origin()


def _resume(
    settings: TrainSettings, given: dict[str, Any], screen: Screen
) -> tuple[TrainSettings, Origin]:
    named = Path(settings.resume)
    if settings.resume == "last" or (named / "config.yaml").is_file():
        if settings.resume == "last" and not settings.output_dir:
            raise SettingsError(["resume: which run? Give --output_dir RUN, or --resume RUN"])
        run = Path(settings.output_dir) if settings.resume == "last" else named
        _must_be_run(run)
        sweep(run / "checkpoints")  # one that was being replaced when the process was killed
        if not checkpoints.all_of(run / "checkpoints"):
            _refuse_continued(run)
            screen.warn("no checkpoint in this run yet: it starts from its beginning")
            merged = {**_old_settings(run, given, begins=True), **given, "output_dir": str(run)}
            settings = config.build(TrainSettings, merged)
            start = settings.init_adapter or settings.adapter
            files = adapters.read_adapter(start) if start else None
            return settings, Origin("resume", adapter=files)
        checkpoint, state, warnings = checkpoints.last_whole(run)
        for words in warnings:
            screen.warn(words)
    else:
        run, checkpoint = _run_and_checkpoint(settings.resume)
        state = checkpoints.read_state(checkpoint)
        if not Path(settings.resume).exists() and not settings.output_dir:
            raise SettingsError(["resume from the hub needs a place to go on: give --output_dir"])
    merged = {**_old_settings(run, given), "from_data_beginning": None, **given}
    # A checkpoint of another place (a copy, the hub) goes on in the folder that was asked for.
    merged["output_dir"] = given.get("output_dir") or str(run)
    merged["resume"] = str(checkpoint)
    return (
        config.build(TrainSettings, merged),
        Origin("resume", checkpoint, state, _adapter_of(checkpoint)),
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


def _old_settings(run: Path, own: Collection[str], begins: bool = False) -> dict[str, Any]:
    """The settings of a run that is gone on with, its relative paths as they lead from here.

    Args:
        own: settings that are not taken from it. begins: whether it starts from its beginning.
    """
    recipe = config.read_recipe(run / "config.yaml")
    old = {k: v for k, v in recipe.items() if k in TrainSettings.model_fields}
    return settle(old, began_in(run), set(old) - set(own), begins)


# -- the state it begins with --------------------------------------------------------------------


def begin(
    settings: TrainSettings,
    given: dict[str, Any],
    origin: Origin,
    split: datasets.Split,
    precision: str,
    rows: int,
    vocabulary: TokenizerData,
) -> tuple[State, Schedule]:
    """The state before the first step, and the schedule of learning rates.

    Args:
        given: what the user said by name.
        precision: the type of the base that was chosen. rows: tokens to compute at a time, where no
            checkpoint says it.
        vocabulary: of the base.

    Raises: SettingsError where a resumed run would not be the one it was.
    """
    wanted = settings.model_dump(include=set(DECISIVE), mode="json") | {"precision": precision}
    own_steps = settings.max_steps or split.sampler.steps(settings.num_train_epochs)
    cut = {
        "tokens": rows,
        "evaluation": rows,
        "examples": settings.micro_batch_size,
        "share": int(settings.share_prefixes),
    }
    old = origin.state
    if origin.kind == "resume" and old is not None:
        template = origin.adapter.meta.get("template", {}) if origin.adapter else {}
        same = old.data == split.digest or same_data(old, split, settings, vocabulary, template)
        changed = _refuse_changes(settings, wanted, old, same)
        state = State(**{**old.__dict__, "settings": wanted, "data": split.digest})
        if changed & SCHEDULE:
            state.total = own_steps
            state.warmup = warmup_steps(own_steps, settings.warmup_ratio, settings.warmup_steps)
        if settings.from_data_beginning:
            state.data_offset = state.step
        if {"micro_batch_tokens", "micro_batch_size", "share_prefixes"} & set(given):
            state.cut = cut
    elif origin.kind == "continue" and old is not None:
        total = continued_total(old.total, old.step, own_steps)
        offset = 0 if settings.from_data_beginning is False else old.step
        state = State(step=old.step, total=total, warmup=old.warmup, data_offset=offset, cut=cut)
        state.loss_scale = old.loss_scale
    else:
        warmup = warmup_steps(own_steps, settings.warmup_ratio, settings.warmup_steps)
        state = State(total=own_steps, warmup=warmup, cut=cut)
        # nf4 and int8 compute in fp16, too, where the chip has no bf16 (Turing, Volta).
        fp16 = load.Chosen(precision, "").dtype is torch.float16
        state.loss_scale = INITIAL_FP16_SCALE if fp16 else 1.0
    state.settings, state.data = wanted, split.digest
    schedule = Schedule(
        settings.lr_scheduler_type, settings.learning_rate, state.total, state.warmup
    )
    return state, schedule


def _refuse_changes(
    settings: TrainSettings, wanted: dict[str, Any], old: State, same_data: bool
) -> set[str]:
    """What differs from the checkpoint, all of it allowed.

    Args:
        same_data: whether the records are the checkpoint's.

    Raises: SettingsError that lists what is not.
    """
    # A setting that is newer than the checkpoint had its default then.
    before = {k: old.settings.get(k, TrainSettings.model_fields[k].default) for k in wanted}
    differs = {
        k: (before[k], v) for k, v in wanted.items() if _unordered(before[k]) != _unordered(v)
    }
    if not same_data:
        differs["data"] = (old.data, "")
    refused = [k for k in differs if k not in settings.allow_changes]
    if refused:
        raise SettingsError(
            [
                OTHER_DATA
                if k == "data"
                else f"{k} was {differs[k][0]} in the checkpoint and is now {differs[k][1]}"
                for k in refused
            ],
            fix="Give the old values, allow them by name (--allow_changes "
            f"{','.join(refused)}), or begin a new run from the weights (--init_adapter).",
        )
    return set(differs)


def _unordered(value: Any) -> Any:
    """A setting without the order of its words, which decides nothing."""
    return sorted(value) if isinstance(value, list) else value
