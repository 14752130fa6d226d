"""A disk that is full at each write: one message with exit code 2, and nothing half-made.

Two ways of being full. A file may not grow beyond a limit, as the system applies it, so that what
libraries in other languages write is met as well; a limit just below each file's size makes that
file the one that fails. And from the n-th file on none can be opened for writing.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import pytest
from fault_kit import Done, copied, files_at_most, full_at, vicuna
from place_kit import ROWS, Row

from vicuna.append_lines import Lines
from vicuna.errors import UserError
from vicuna.system_errors import cannot_write, describe, explain, system_error, writing

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and limits files")
_WRITE = [
    pytest.param(name, row, id=f"{name} {number}",
                 marks=[pytest.mark.slow] if name in ("train", "merge", "quantize bnb") else [])
    for name, rows in ROWS.items()
    for number, row in enumerate(rows)
    if (row.made or row.said) and name not in ("quantize gptq", "quantize awq", "run")
]  # fmt: skip
_MOST = 60  # files that a command opens for writing


def _told(done: Done, folder: Path, row: Row) -> None:
    assert done.code in (0, 2), done.all
    assert "Traceback" not in done.all
    assert "internal error" not in done.all
    assert not [p for p in folder.rglob(".*") if p.suffix in (".part", ".old")], done.left
    if done.code == 2:
        assert done.err.count("error:") == 1, done.err
        assert "cannot write" in done.err
        assert "full" in done.err or "larger than" in done.err
        assert ".part" not in done.err  # the name that the user knows
        made = [p for p in done.left if not p.startswith(("out/", "run/"))]
        assert made in ([], ["answers.jsonl"]), made


@pytest.mark.parametrize(("name", "row"), _WRITE)
def test_a_file_that_may_not_grow(place: Path, tmp_path: Path, name: str, row: Row) -> None:
    good = copied(place, tmp_path / "good")
    done = vicuna(good, *row.words.split(), said=row.said)
    assert done.code == 0, done.all
    sizes = {(good / p).stat().st_size for p in done.left}
    assert sizes
    failed = 0
    for limit in sorted({max(0, s - 1) for s in sizes if s}):
        folder = copied(place, tmp_path / str(limit))
        done = vicuna(folder, *row.words.split(), said=row.said, before=files_at_most(limit))
        _told(done, folder, row)
        failed += done.code == 2
    assert failed or name == "chat"


@pytest.mark.parametrize(("name", "row"), _WRITE)
def test_no_more_files(place: Path, tmp_path: Path, name: str, row: Row) -> None:
    for number in range(1, _MOST):
        folder = copied(place, tmp_path / str(number))
        done = vicuna(folder, *row.words.split(), said=row.said, before=full_at(number))
        _told(done, folder, row)
        if done.code == 0 and all((folder / made).exists() for made in row.made):
            return
    pytest.fail(f"more than {_MOST} files are written")


def test_answers_go_on_after_a_full_disk(place: Path, tmp_path: Path) -> None:
    folder = copied(place, tmp_path / "copy")
    words = "generate --model tiny --max_new_tokens 2 --input data.jsonl --output answers.jsonl"
    done = vicuna(folder, *words.split(), before=files_at_most(400))
    assert done.code == 2
    lines = (folder / "answers.jsonl").read_text().splitlines()
    assert lines
    assert all(json.loads(line)["finish_reason"] for line in lines)
    done = vicuna(folder, *words.split())
    assert done.code == 0, done.all
    assert f"already has {len(lines)} answers" in done.err
    assert len((folder / "answers.jsonl").read_text().splitlines()) == 12


def test_output_that_cannot_be_printed(place: Path, tmp_path: Path) -> None:
    def into_a_full_device() -> None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)

    def into_nothing() -> None:
        read, write = os.pipe()
        os.close(read)
        os.dup2(write, 1)

    folder = copied(place, tmp_path / "copy")
    words = ("data", "check", "data.jsonl", "--model", "tiny")
    done = vicuna(folder, *words, before=into_a_full_device)
    assert done.code == 2
    assert "the disk is full" in done.err
    assert vicuna(folder, *words, before=into_nothing).code == 141


# -- in words ----


def test_a_line_is_whole_or_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl"
    with Lines(path) as lines:
        lines.add("one")
        assert lines._file is not None
        whole = lines._file

        class Short:
            """Takes three bytes, then is full."""

            taken = 0

            def write(self, data: memoryview) -> int:
                if self.taken:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self.taken = 3
                return whole.write(data[:3])

            def __getattr__(self, name: str) -> object:
                return getattr(whole, name)

        monkeypatch.setattr(lines, "_file", Short())
        with pytest.raises(UserError, match="the disk is full"):
            lines.add("second")
    assert path.read_text() == "one\n"


def test_a_library_tells_of_the_system(tmp_path: Path) -> None:
    error = RuntimeError("Error while serializing: I/O error: No space left (os error 28)")
    found = system_error(error)
    assert found is not None
    assert found.errno == errno.ENOSPC
    full = r"x\.bin: cannot write: the disk is full \(.* MiB free"
    with pytest.raises(UserError, match=full), writing(tmp_path / "x.bin"):
        raise error
    told = cannot_write(error, tmp_path / ".x.bin.0123ab-77.part")
    assert told.where == str(tmp_path / "x.bin")


def test_what_was_read_is_not_told_as_what_was_to_be_written(tmp_path: Path) -> None:
    missing = tmp_path / "base" / "config.json"
    target = tmp_path / "out" / "new"
    target.parent.mkdir()
    with pytest.raises(UserError, match=r"config\.json: no such file"), writing(target):
        missing.read_text()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "x", "f"), "f: the disk is full"),
        (OSError(errno.EMFILE, "x"), "too many files are open"),
        (PermissionError(errno.EACCES, "x", "f"), "f: no permission"),
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), "out of memory"),
        (RuntimeError("CUDA out of memory. Tried"), "out of memory"),
        (RecursionError("x"), "nested too deeply"),
        (ValueError("embedded null byte"), "NUL"),
        (OSError("Can't load tokenizer"), "Can't load tokenizer"),
    ],
    ids=str,
)
def test_errors_in_words(error: Exception, said: str) -> None:
    assert said in str(explain(error))
    if isinstance(error, OSError) and error.errno:
        assert describe(error)[1]


def test_a_fault_of_this_program_is_one() -> None:
    assert explain(KeyError("x")) is None
    assert explain(AssertionError()) is None
