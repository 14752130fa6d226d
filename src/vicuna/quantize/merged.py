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

from vicuna.cache import scratch_folder

if TYPE_CHECKING:
    from vicuna.export.source import Source
    from vicuna.model.merging import Addition
    from vicuna.model.weights import Weights

_LARGEST = 2 << 30  # bytes of a file of weights


@contextmanager
def merged_folder(source: Source) -> Iterator[Path]:
    """The base's own folder; where there is an adapter, one with it merged, removed afterwards.

    Sums are rounded to the base's own type once.

    Raises: UserError where the adapter does not fit, or the disk has no room.
    """
    from vicuna.convert.output import check_space, copy_side_files
    from vicuna.convert.shards import copies, write_sharded
    from vicuna.model.merging import Addition
    from vicuna.model.weights import open_weights, shapes

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
