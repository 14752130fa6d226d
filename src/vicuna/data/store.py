"""Examples on disk: token ids and labels of one file's records, read back without copying.

A store is a folder: `ids.bin` (int32), `labels.bin` (uint8), `index.npy` (one row an example),
`exact.npy` and `near.npy` (for duplicates), `report.json` (what happened to each record).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from vicuna.data.encode import NEXT_TOKEN, NO_TARGET, Example

INDEX = np.dtype(
    [
        ("offset", np.int64),
        ("length", np.int32),
        ("first_target", np.int32),
        ("targets", np.int32),
        ("line", np.int32),
        ("question", np.uint64),
    ]
)


class StoreWriter:
    """Appends examples to a folder that is being made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ids = (folder / "ids.bin").open("wb")
        self._labels = (folder / "labels.bin").open("wb")
        self._index: list[np.ndarray] = []
        self._offset = 0

    def add(self, ids: np.ndarray, labels: np.ndarray, index: np.ndarray) -> None:
        """A batch of examples; the offsets in `index` count from the batch's beginning."""
        self._ids.write(ids.tobytes())
        self._labels.write(labels.tobytes())
        index = index.copy()
        index["offset"] += self._offset
        self._index.append(index)
        self._offset += len(ids)

    def finish(self, exact: np.ndarray, near: np.ndarray, report: dict[str, Any]) -> None:
        """Write what is written once."""
        self._ids.close()
        self._labels.close()
        index = np.concatenate(self._index) if self._index else np.zeros(0, INDEX)
        np.save(self.folder / "index.npy", index)
        np.save(self.folder / "exact.npy", exact)
        np.save(self.folder / "near.npy", near)
        text = json.dumps(report, ensure_ascii=False)
        (self.folder / "report.json").write_text(text, encoding="utf-8", errors="replace")


class Store:
    """The examples of one file, mapped into memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index: np.ndarray = np.load(folder / "index.npy")
        self.exact: np.ndarray = np.load(folder / "exact.npy", mmap_mode="r")
        self.near: np.ndarray = np.load(folder / "near.npy", mmap_mode="r")
        self._ids = _map(folder / "ids.bin", np.int32)
        self._labels = _map(folder / "labels.bin", np.uint8)

    @property
    def report(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.folder / "report.json").read_text("utf-8"))
        return loaded

    def __len__(self) -> int:
        return len(self.index)

    def example(self, i: int, cutoff: int = 0) -> Example:
        """Example i, cut to `cutoff` tokens where that is not 0.

        A cut example is not taught what followed the cut: least of all an end that was not there.
        """
        row = self.index[i]
        start, length = int(row["offset"]), int(row["length"])
        if cutoff and length > cutoff:
            ids = np.array(self._ids[start : start + cutoff])
            labels = np.array(self._labels[start : start + cutoff])
            if labels[-1] == NEXT_TOKEN:
                labels[-1] = NO_TARGET
            return Example(ids, labels)
        stop = start + length
        return Example(np.array(self._ids[start:stop]), np.array(self._labels[start:stop]))


def _map(path: Path, dtype: Any) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r")


def index_rows(examples: list[Example], lines: list[int], questions: list[int]) -> np.ndarray:
    """Index rows of a batch, offsets from its beginning."""
    rows = np.zeros(len(examples), INDEX)
    offset = 0
    for k, example in enumerate(examples):
        where = np.flatnonzero(example.labels != NO_TARGET)
        first = int(where[0]) + 1 if len(where) else len(example.ids)
        rows[k] = (offset, len(example.ids), first, len(where), lines[k], questions[k])
        offset += len(example.ids)
    return rows
