"""A base with its adapter merged, in a folder that is there for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vicuna.files import scratch_folder

if TYPE_CHECKING:
    from vicuna.commands.model_source import Source
    from vicuna.model.lora_delta import Addition
    from vicuna.weights.read import Weights

_LARGEST = 2 << 30  # bytes of a file of weights


@contextmanager
def merged_folder(source: Source) -> Iterator[Path]:
    """The base's own folder; where there is an adapter, one with it merged, removed afterwards.

    Sums are rounded to the base's own type once.

    Raises: UserError where the adapter does not fit, or the disk has no room.
    """
    from vicuna.model.lora_delta import Addition
    from vicuna.weights.output_folder import check_space, copy_side_files
    from vicuna.weights.read import open_weights, shapes
    from vicuna.weights.safetensors_writer import copies, write_sharded

    if source.adapter is None:
        yield source.folder
        return
    weights = open_weights(source.folder)
    addition = Addition(source.adapter)
    addition.check(shapes(weights), bool(source.config.get("tie_word_embeddings")))
    plan = [
        replace(p, read=partial(_sum, weights, addition, p.name, p.dtype)) for p in copies(weights)
    ]
    with scratch_folder("merged") as name:
        folder = Path(name)
        check_space(folder, sum(p.size for p in plan))
        copy_side_files(source.folder, folder)
        write_sharded(folder, plan, _LARGEST)
        yield folder


def _sum(
    weights: Weights, addition: Addition, name: str, dtype: torch.dtype, rows: slice
) -> Tensor:
    return addition.of_rows(rows).to(name, weights.read(name, rows)).to(dtype)
