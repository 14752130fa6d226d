"""Tensors from disk to disk in pieces: one is read and computed while another is written.

A piece is some rows of a tensor and knows its place in the file, so a few threads take one each
from reading to writing. Memory holds the pieces under way, whatever the size of the model.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from vicuna.weights.read import ALL

PIECE = 1 << 20  # values: what a core's cache holds, and an allocator gives again and again
_ALONE = Lock()  # how many threads torch takes is the process's, not a writer's


def rows_of(shape: tuple[int, ...], unit: int = 1) -> Iterator[slice]:
    """The rows of a tensor, cut into slices of at most `PIECE` values.

    Args:
        unit: rows that must stay together; 0: all.
    """
    if len(shape) < 2 or not unit or torch.Size(shape).numel() <= PIECE:
        yield ALL
        return
    width = torch.Size(shape[1:]).numel()
    height = max(1, PIECE // width // unit) * unit
    for start in range(0, shape[0], height):
        yield slice(start, min(start + height, shape[0]))


class Pieces:
    """Goes on with an open file, piece by piece. When it is left, all of them are written.

    with path.open("wb") as f, Pieces(f) as out:
        out.put(32, lambda: torch.zeros(8))

    What goes wrong with a piece is raised by a later `put` or on leaving; the others are dropped.
    """

    def __init__(self, f: BinaryIO) -> None:
        self._file, self._lock, self._end = f, Lock(), f.tell()
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> Pieces:
        _ALONE.acquire()
        self._threads = torch.get_num_threads()
        # Each thread works on a piece of its own: torch's threads would only wait for each other.
        torch.set_num_threads(1)
        # With two, the disk has something to do beside the one core.
        self._most = max(2, self._threads)
        self._pool = ThreadPoolExecutor(self._most, "pieces")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                while self._waiting:
                    self._waiting.popleft().result()
                self._file.truncate(self._end)
        finally:
            self._pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self._threads)
            _ALONE.release()

    def put(self, size: int, make: Callable[[], Tensor]) -> None:
        """The next so many bytes are what `make` gives, when a thread comes to it."""
        self._waiting.append(self._pool.submit(self._write, self._end, size, make))
        self._end += size
        if len(self._waiting) > 2 * self._most:  # enough that no thread waits for the next
            self._waiting.popleft().result()

    def align(self, multiple: int) -> None:
        """Fill up with zeros."""
        self._end += -self._end % multiple

    def _write(self, at: int, size: int, make: Callable[[], Tensor]) -> None:
        data = make().contiguous().reshape(-1).view(torch.uint8).numpy().data
        if len(data) != size:
            raise ValueError(f"expected {size} bytes at {at}, got {len(data)}")
        with self._lock:
            self._file.seek(at)
            self._file.write(data)
        # Linux begins to write what it shall forget, so that a last sync has little left to do.
        # What is not on the disk yet it keeps: nothing has to be read again.
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), at, size, os.POSIX_FADV_DONTNEED)


def all_finite(values: Tensor) -> bool:
    """Whether all are finite numbers, by the two extremes: NaN is both where it occurs. Testing
    each value takes longer than converting it."""
    if not values.numel():
        return True
    return all(bool(extreme.isfinite()) for extreme in torch.aminmax(values))
