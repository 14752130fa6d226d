"""Files that grow line by line, each line whole or not at all, on a full disk too."""

from __future__ import annotations

import contextlib
import os
from io import FileIO
from pathlib import Path

from vicuna.system_errors import cannot_write


class Lines:
    """Adds lines to a file, each of them whole or not at all; makes the file with the first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._there = path.exists()
        self._file: FileIO | None = None

    def __enter__(self) -> Lines:
        """Raises: UserError where nothing can be written, before anything is computed for it."""
        self._open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; if it was not there and nothing was added, it is not there again."""
        if self._file is not None:
            self._file.close()
            self._remove_empty()

    def add(self, line: str) -> None:
        """Write a line and hand it to the system.

        Raises: UserError where it cannot be written; what was there before still is.
        """
        before = None
        try:
            if self._file is None:
                self._file = self._open()
            before = os.fstat(self._file.fileno()).st_size
            left = memoryview((line + "\n").encode("utf-8", "replace"))
            while left:
                left = left[self._file.write(left) or 0 :]
        except OSError as e:
            self._take_back(before)
            raise cannot_write(e, self.path) from e

    def _take_back(self, size: int | None) -> None:
        with contextlib.suppress(OSError):
            if self._file is not None and size is not None:
                self._file.truncate(size)
        self._remove_empty()

    def _open(self) -> FileIO:
        try:
            self._file = FileIO(self.path, "ab")
        except (OSError, ValueError) as e:
            raise cannot_write(e, self.path) from e
        return self._file

    def _remove_empty(self) -> None:
        with contextlib.suppress(OSError):
            if not self._there and not self.path.stat().st_size:
                self.path.unlink()


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, whole or not at all. Raises: UserError where it cannot be written."""
    with Lines(path) as lines:
        lines.add(line)
