"""The state that a run begins with, and whether a resumed run is the one that it was.

Checkpoints up to commit f1de0b9 noted a hash of each data file and of all that decided how it was
read: the template among it, its special tokens in an order that changed from process to process.
That order stands in the checkpoint's adapter, so the digest can be made again (`_old_digest`), and
such a run can still be resumed. The tokens counted up to the checkpoint must then be today's, too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vicuna.config import DatasetEntry, DataSettings, TrainSettings
from vicuna.data import dataset as datasets
from vicuna.data.dataset import Dataset
from vicuna.data.tokenizer import TokenizerData
from vicuna.errors import SettingsError
from vicuna.files import file_hash
from vicuna.messages import Message
from vicuna.model import load
from vicuna.train.checkpoint import State
from vicuna.train.micro_batch import MicroBatch
from vicuna.train.optimizer import Schedule, continued_total, warmup_steps
from vicuna.train.resume import RESULT_SETTINGS, StartingPoint

SCHEDULE_SETTINGS = {
    "num_train_epochs", "max_steps", "warmup_ratio", "warmup_steps", "batch_size", "data",
}  # fmt: skip
OTHER_DATA = Message(
    "the data are not those of the checkpoint: records were changed, added or left out"
)
INITIAL_FP16_SCALE = 4096.0


def first_state(
    settings: TrainSettings,
    start: StartingPoint,
    split: datasets.Split,
    precision: str,
    micro_batch: MicroBatch,
    vocabulary: TokenizerData,
) -> tuple[State, Schedule]:
    """The state before the first step, and the schedule of learning rates.

    Args:
        precision: the type of the base that was chosen.
        micro_batch: from `micro_batch.for_run`.
        vocabulary: of the base.

    Raises: SettingsError if a resumed run would not be the one it was.
    """
    now = settings.model_dump(include=set(RESULT_SETTINGS), mode="json") | {"precision": precision}
    own_steps = settings.max_steps or split.sampler.steps(settings.num_train_epochs)
    old = start.state
    if start.kind == "resume" and old is not None:
        template = start.adapter.meta.get("template", {}) if start.adapter else {}
        same_data = old.data == split.digest or _is_old_digest(
            old, split, settings, vocabulary, template
        )
        changed = _refuse_changes(settings, now, old, same_data)
        state = State(**old.__dict__)
        if changed & SCHEDULE_SETTINGS:
            state.total = own_steps
            state.warmup = warmup_steps(own_steps, settings.warmup_ratio, settings.warmup_steps)
        if settings.from_data_beginning:
            state.data_offset = state.step
    elif start.kind == "continue" and old is not None:
        total = continued_total(old.total, old.step, own_steps)
        offset = 0 if settings.from_data_beginning is False else old.step
        state = State(step=old.step, total=total, warmup=old.warmup, data_offset=offset)
        state.loss_scale = old.loss_scale
    else:
        warmup = warmup_steps(own_steps, settings.warmup_ratio, settings.warmup_steps)
        state = State(total=own_steps, warmup=warmup)
        # nf4 and int8 compute in fp16, too, if the chip has no bf16 (Turing, Volta).
        fp16 = load.Chosen(precision, "").dtype is torch.float16
        state.loss_scale = INITIAL_FP16_SCALE if fp16 else 1.0
    state.settings, state.data, state.micro_batch = now, split.digest, micro_batch
    schedule = Schedule(
        settings.lr_scheduler_type, settings.learning_rate, state.total, state.warmup
    )
    return state, schedule


def _refuse_changes(
    settings: TrainSettings, now: dict[str, Any], old: State, same_data: bool
) -> set[str]:
    """The settings that differ from the checkpoint's, all of them allowed to.

    Args:
        now: today's settings that decide the result. same_data: whether the records are the
            checkpoint's.

    Raises: SettingsError that lists those that are not allowed to differ.
    """
    # A setting that is newer than the checkpoint had its default then.
    before = {k: old.settings.get(k, TrainSettings.model_fields[k].default) for k in now}
    differs = {k: (before[k], v) for k, v in now.items() if _unordered(before[k]) != _unordered(v)}
    if not same_data:
        differs["data"] = (old.data, "")
    refused = [k for k in differs if k not in settings.allow_changes]
    if refused:
        raise SettingsError(
            [
                OTHER_DATA
                if k == "data"
                else Message(
                    "{key} was {before} in the checkpoint and is now {now}",
                    key=k,
                    before=differs[k][0],
                    now=differs[k][1],
                )
                for k in refused
            ],
            fix=Message(
                "Give the old values, allow them by name (--allow_changes "
                "{refused}), or begin a new run from the weights (--init_adapter).",
                refused=",".join(refused),
            ),
        )
    return set(differs)


def _unordered(value: Any) -> Any:
    """A setting without the order of its items, which decides nothing."""
    return sorted(value) if isinstance(value, list) else value


# -- the data digest of commit f1de0b9 and before --------------------------------------------------

# What went into it then; both stay as they were.
_FORMAT = 2
_VOCABULARY_FIELDS = (
    "tokenizer_json",
    "bos_id",
    "eos_id",
    "pad_id",
    "bos_token",
    "eos_token",
    "end_ids",
    "special_tokens",
)


def _is_old_digest(
    state: State,
    split: datasets.Split,
    settings: TrainSettings,
    vocabulary: TokenizerData,
    template: dict[str, Any],
) -> bool:
    """Whether a checkpoint with an old digest was made from these examples.

    Args:
        template: as the checkpoint's adapter has it, untouched.
    """
    same = state.data == _old_digest(split, settings, vocabulary, template)
    return same and _same_tokens(state, split)


def _old_digest(
    split: datasets.Split,
    settings: TrainSettings,
    vocabulary: TokenizerData,
    template: dict[str, Any],
) -> str:
    def of(dataset: Dataset, entries: Sequence[DatasetEntry]) -> str:
        return _of_dataset(dataset, entries, settings, vocabulary, template)

    digest = hashlib.sha256(of(split.dataset, settings.dataset).encode())
    for group in split.sampler.groups:
        digest.update(group.indices.tobytes() + f";{group.weight};".encode())
    held_out = split.held_out
    digest.update(of(held_out, settings.val_dataset).encode() if held_out is not None else b"")
    return digest.hexdigest()[:32]


def _of_dataset(
    dataset: Dataset,
    entries: Sequence[DatasetEntry],
    settings: DataSettings,
    vocabulary: TokenizerData,
    template: dict[str, Any],
) -> str:
    tokenizer = _hash({name: getattr(vocabulary, name) for name in _VOCABULARY_FIELDS})
    digest = hashlib.sha256(f"{dataset.cutoff};".encode())
    for source in dataset.files:
        parts = [
            _FORMAT,
            file_hash(source.path),
            tokenizer,
            template,
            settings.train_turns,
            settings.cutoff_len if settings.overlong == "split" else 0,
            entries[source.entry].max_samples or settings.max_samples,
            settings.encoding,
        ]
        digest.update(_hash(parts)[:32].encode())
        digest.update(source.keep.tobytes())
    return digest.hexdigest()[:32]


def _hash(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _same_tokens(state: State, split: datasets.Split) -> bool:
    """Whether the steps done had as many tokens as these examples have: files that are read
    otherwise today than they were would show here."""
    steps = state.step - state.data_offset
    if state.examples != steps * split.sampler.batch_size:
        return True  # begun from the data's beginning in between: cannot be counted
    lengths = np.minimum(split.dataset.column("length"), split.dataset.cutoff)
    return state.tokens == sum(int(lengths[split.sampler.step(k)].sum()) for k in range(steps))
