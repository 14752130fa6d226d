"""The data digest of runs of before: how records were read, not what they became.

Checkpoints once noted a hash of each file and of all that decided how it was read: the template
among them, its control tokens in an order that changed from process to process. The order of back
then stands in the checkpoint's adapter, so the digest can be made again, and such a run can still
be resumed. Beside it, the tokens that were counted up to the checkpoint must be today's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from vicuna.config import DatasetEntry, DataSettings
from vicuna.data.dataset import Dataset, Split
from vicuna.data.tokenizer import TokenizerData
from vicuna.files import file_hash
from vicuna.train.checkpoint import State

# What went into it then; both stay as they were.
_FORMAT = 2
_VOCABULARY = (
    "tokenizer_json",
    "bos_id",
    "eos_id",
    "pad_id",
    "bos_token",
    "eos_token",
    "end_ids",
    "special_tokens",
)


def same_data(
    state: State,
    split: Split,
    settings: Any,
    vocabulary: TokenizerData,
    template: dict[str, Any],
) -> bool:
    """Whether a checkpoint of before was made from these examples.

    Args:
        settings: `TrainSettings`.
        template: as the checkpoint's adapter has it, untouched.
    """
    return state.data == _of_split(split, settings, vocabulary, template) and _same_tokens(
        state, split
    )


def _of_split(
    split: Split, settings: Any, vocabulary: TokenizerData, template: dict[str, Any]
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
    fields = {name: getattr(vocabulary, name) for name in _VOCABULARY}
    words = _hash(fields)
    digest = hashlib.sha256(f"{dataset.cutoff};".encode())
    for source in dataset.files:
        parts = [
            _FORMAT,
            file_hash(source.path),
            words,
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


def _same_tokens(state: State, split: Split) -> bool:
    """Whether the updates done had as many tokens as these examples have: files that are read
    otherwise today than they were would show here."""
    steps = state.step - state.data_offset
    if state.examples != steps * split.sampler.batch_size:
        return True  # begun from the data's beginning in between: not to be counted
    lengths = np.minimum(split.dataset.column("length"), split.dataset.cutoff)
    return state.tokens == sum(int(lengths[split.sampler.step(k)].sum()) for k in range(steps))
