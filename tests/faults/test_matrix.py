"""Every command, every way that a file it reads can be wrong: an answer, and nothing half-made.

The quick part breaks the first file of each command, and each table with one command, in some ways;
the slow part breaks every file of every row in every way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_kit import ANY_FILE, TABLES, Done, copied, no_rights, replaced, vicuna
from place_kit import OPTIONAL, ROWS, Row

from vicuna.cli import COMMANDS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and takes rights away")
# These say what is wrong in a table of their own, not in one line of error.
TELLS_BY_ITSELF = ("data check", "doctor")
# Start a server or another Python: tried in the slow half, or where they fail before that.
HEAVY = ("web", "quantize gptq", "quantize awq")
QUICK = ("missing", "truncated", "no permission", "a list", "nested whole", "half a character")
_TABLE_FILES = (".json", ".yaml", ".jsonl")


def test_every_command_is_in_the_matrix() -> None:
    assert {command.name for command in COMMANDS} | {"version"} == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_it_works_as_it_is(place: Path, tmp_path: Path, name: str) -> None:
    """What is broken below works where nothing is broken, so that it is the fault that is seen."""
    if name in (*HEAVY, "demo", "download"):
        pytest.skip("needs what a test does not have")
    for number, row in enumerate(ROWS[name]):
        folder = copied(place, tmp_path / str(number))
        done = vicuna(folder, *row.words.split(), said=row.said)
        assert done.code == 0, done.all
        for made in row.made:
            assert (folder / made).exists(), (row.words, made)


def _faults(read: str, table: bool) -> dict[str, Callable[[Path], None]]:
    return {k: replaced(v) for k, v in TABLES.items()} if table else ANY_FILE


def _quick() -> Iterator[Any]:
    seen = set()
    for name, rows in ROWS.items():
        if name in HEAVY:
            continue
        for row in rows:
            for place, read in enumerate(row.reads):
                if row is rows[0] and place == 0:
                    yield from (
                        pytest.param(name, row, read, f, False) for f in ANY_FILE if f in QUICK
                    )
                if read.endswith(_TABLE_FILES) and read not in seen:
                    seen.add(read)
                    yield from (
                        pytest.param(name, row, read, f, True) for f in TABLES if f in QUICK
                    )


def _id(value: Any) -> str:
    return value.words.split(" --")[0] if isinstance(value, Row) else str(value)


@pytest.mark.parametrize(("name", "row", "read", "fault", "table"), _quick(), ids=_id)
def test_a_broken_file(
    place: Path, tmp_path: Path, name: str, row: Row, read: str, fault: str, table: bool
) -> None:
    _try(place, tmp_path / "copy", name, row, read, fault, table)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in ROWS if n not in ("demo", "download", "version")])
def test_every_broken_file(place: Path, tmp_path: Path, name: str) -> None:
    done_before = {(p.values[0], p.values[2], p.values[3]) for p in _quick()}
    tried = 0
    for row in ROWS[name]:
        for read in row.reads:
            for table in (False, True) if read.endswith(_TABLE_FILES) else (False,):
                for fault in _faults(read, table):
                    if (name, read, fault) not in done_before:
                        _try(place, tmp_path / str(tried), name, row, read, fault, table)
                        tried += 1
    assert tried or name in ("data preview", "data convert")


def _try(
    place: Path, folder: Path, name: str, row: Row, read: str, fault: str, table: bool
) -> None:
    copied(place, folder)
    _faults(read, table)[fault](folder / read)
    before = no_rights if fault == "no permission" else None
    done = vicuna(folder, *row.words.split(), said=row.said, before=before, PIP_NO_INDEX="1")
    check_answered(done, name, row)
    destroyed = not table and not read.endswith(OPTIONAL) and fault != "truncated"
    if destroyed and not read.endswith((".jsonl", "adapter_config.json", "recipe.yaml")):
        assert done.code == 2, f"{read} {fault}, and it went on: {done.all}"


def check_answered(done: Done, name: str, row: Row) -> None:
    """A command ended well, or with one message, exit code 2 and nothing left."""
    assert done.code in (0, 2), done.all
    assert "Traceback" not in done.all
    assert "internal error" not in done.all
    assert not [p for p in done.left if ".part" in p or p.endswith(".old")], done.left
    if done.code == 0:
        return
    if name not in TELLS_BY_ITSELF:
        assert done.err.count("error:") == 1, done.err
    kept = ("out/", "run/") if name == "train" else ("answers.jsonl",)
    assert not [p for p in done.left if not p.startswith(kept)], (done.left, done.err)


@pytest.mark.parametrize(
    "path",
    ["a" * 300, "x/" * 2100, "data.jsonl/inside", "no\udcffname", "new\nline", "bell\x07\x1b[2J"],
    ids=["long name", "long path", "below a file", "not UTF-8", "line feed", "controls"],
)
@pytest.mark.parametrize("name", [n for n in ROWS if n not in HEAVY])
def test_a_path_that_is_none(place: Path, tmp_path: Path, name: str, path: str) -> None:
    """In place of each path that a command is given, what it reads and what it writes."""
    if name not in QUICK_PATHS and path != "a" * 300:
        pytest.skip("the same reader and writer as another command's")
    folder = copied(place, tmp_path / "copy")
    words = ROWS[name][0].words.split()
    places = [i for i, w in enumerate(words) if w in PATHS]
    for i in places:
        tried = [*words[:i], path, *words[i + 1 :]]
        done = vicuna(folder, *tried, said=ROWS[name][0].said)
        assert done.code in (0, 2), (tried, done.all)
        assert "internal error" not in done.all, (tried, done.err)
        assert "Traceback" not in done.all
        assert not any(c in done.all for c in "\x07\x1b"), done.all


PATHS = ("tiny", "data.jsonl", "recipe.yaml", "out", "run", "new", "new.jsonl", "new.gguf",
         "tiny.gguf", "answers.jsonl")  # fmt: skip
QUICK_PATHS = ("train", "generate", "export gguf", "data convert", "adapter upgrade", "run")
