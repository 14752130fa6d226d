"""A base with its adapter merged, in a temporary folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vicuna.files import scratch_folder

if TYPE_CHECKING:
    from vicuna.commands.model_source import ModelSource

_LARGEST = 2 << 30  # bytes of a file of weights


@contextmanager
def merged_folder(source: ModelSource) -> Iterator[Path]:
    """The base's own folder; if there is an adapter, a temporary one with it merged.

    Sums are rounded to the base's own type once.

    Raises: UserError if the adapter does not fit, or the disk has no room.
    """
    from vicuna.convert.merge import Merge
    from vicuna.model.lora_delta import LoraDelta
    from vicuna.weights.output_folder import check_space
    from vicuna.weights.read import open_weights

    if source.adapter is None:
        yield source.folder
        return
    merge = Merge(source.config, open_weights(source.folder), LoraDelta(source.adapter))
    with scratch_folder("merged") as name:
        folder = Path(name)
        check_space(folder, merge.size)
        merge.write(source.folder, folder, _LARGEST)
        yield folder
