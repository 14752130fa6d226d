"""Examples on disk: token ids and labels of one file's records, read back without copying.

A store is a folder: `ids.bin` (int32), `labels.bin` (uint8), `index.npy` (one row an example),
`lines.npy`, `exact.npy`, `near.npy` (one row a used record; the latter two to find duplicates),
`report.json` (what happened to each record), `digest` (of the tokens and labels).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from vicuna.data.loss_mask import NEXT_TOKEN, NO_TARGET, Example

INDEX = np.dtype(
    [
        ("offset", np.int64),
        ("length", np.int32),
        ("first_target", np.int32),
        ("targets", np.int32),
        ("line", np.int32),
        ("record", np.int32),
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
        self._lines: list[np.ndarray] = []
        self._offset = self._records = 0
        self._hashes = hashlib.sha256(), hashlib.sha256()

    def add(
        self, ids: np.ndarray, labels: np.ndarray, index: np.ndarray, lines: np.ndarray
    ) -> None:
        """A batch of examples; offsets and records in `index` count from the batch's beginning.

        Args:
            lines: int32, the line of each record of the batch.
        """
        for file, digest, values in zip((self._ids, self._labels), self._hashes, (ids, labels)):
            content = values.tobytes()
            digest.update(content)
            file.write(content)
        index = index.copy()
        index["offset"] += self._offset
        index["record"] += self._records
        self._lines.append(lines)
        self._records += len(lines)
        self._index.append(index)
        self._offset += len(ids)

    def finish(self, exact: np.ndarray, near: np.ndarray, report: dict[str, Any]) -> None:
        """Write what is written once."""
        self._ids.close()
        self._labels.close()
        index = np.concatenate(self._index) if self._index else np.zeros(0, INDEX)
        np.save(self.folder / "index.npy", index)
        lines = np.concatenate(self._lines) if self._lines else np.zeros(0, np.int32)
        np.save(self.folder / "lines.npy", lines)
        np.save(self.folder / "exact.npy", exact)
        np.save(self.folder / "near.npy", near)
        (self.folder / "digest").write_text(_digest(*self._hashes, index))
        text = json.dumps(report, ensure_ascii=False)
        (self.folder / "report.json").write_text(text, encoding="utf-8", errors="replace")


class Store:
    """The examples of one file, mapped into memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index: np.ndarray = np.load(folder / "index.npy")
        self.lines: np.ndarray = np.load(folder / "lines.npy")
        self.exact: np.ndarray = np.load(folder / "exact.npy", mmap_mode="r")
        self.near: np.ndarray = np.load(folder / "near.npy", mmap_mode="r")
        self._ids = _map(folder / "ids.bin", np.int32)
        self._labels = _map(folder / "labels.bin", np.uint8)

    @property
    def report(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.folder / "report.json").read_text("utf-8"))
        return loaded

    def digest(self) -> str:
        """A hash of all examples: of what records became, not of how that came about."""
        noted = self.folder / "digest"
        if noted.is_file():
            return noted.read_text()
        # Made before it was noted.
        ids, labels = (
            hashlib.sha256(np.ascontiguousarray(part).data) for part in (self._ids, self._labels)
        )
        return _digest(ids, labels, self.index)

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


def _digest(ids: Any, labels: Any, index: np.ndarray) -> str:
    """One hash of tokens, labels and where one example ends and the next begins."""
    whole = hashlib.sha256(ids.digest() + labels.digest())
    whole.update(np.ascontiguousarray(index["length"]).tobytes())
    return whole.hexdigest()


def _map(path: Path, dtype: Any) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r")


def index_rows(
    examples: list[Example], records: list[int], lines: list[int], questions: list[int]
) -> np.ndarray:
    """Index rows of a batch, offsets from its beginning.

    Args:
        records: for each example, which of the batch's records it comes from.
        lines, questions: for each record, its line and its question's hash.
    """
    rows = np.zeros(len(examples), INDEX)
    if not examples:
        return rows
    length = np.array([len(e.ids) for e in examples], np.int64)
    stop = np.cumsum(length)
    targets = np.flatnonzero(np.concatenate([e.labels for e in examples]) != NO_TARGET)
    # How many targets stand before each example, and which is its first.
    before = np.searchsorted(targets, stop - length)
    count = np.searchsorted(targets, stop) - before
    first = np.append(targets, 0)[before] - (stop - length) + 1
    rows["offset"], rows["length"], rows["targets"] = stop - length, length, count
    rows["first_target"] = np.where(count > 0, first, length)
    rows["record"] = records
    rows["line"] = np.array(lines, np.int64)[records]
    rows["question"] = np.array(questions, np.uint64)[records]
    return rows
