"""What a user sees of the reading of a large file: how far it is, how fast, and how long still."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "generate"))
from generate_kit import byte_level, vocabulary

from vicuna import console
from vicuna.data import prepare
from vicuna.data.prepare import ReadingProgress
from vicuna.data.templates.registry import find_template


@pytest.mark.parametrize(
    ("seconds", "records", "share", "words"),
    [
        (10, 3_000, 0.5, "a.jsonl ━━━━━━──────  50%  3,000 records, 300/s, 10 s left"),
        (600, 60_000, 0.25, "━━━─────────  25%  60,000 records, 100/s, 30 min left"),
        (3600, 36_000, 0.25, "36,000 records, 10/s, 3 h 0 min left"),
        (10, 3_000, 1.0, "100%  3,000 records, 300/s, 0 s left"),
        (10, 3_000, 0.0, "a.jsonl: 3,000 records, 300/s"),
    ],
)  # fmt: skip
def test_words_tell_records_speed_and_time_left(
    seconds: float, records: int, share: float, words: str
) -> None:
    clock = iter([5.0, 5.0 + seconds])
    said: list[str] = []
    ReadingProgress("a.jsonl", said.append, lambda: next(clock))(records, share)
    assert len(said) == 1
    assert words in said[0]


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Rows in the format that the ending names."""
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    packers = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        path.write_text(
            "instruction,output\n" + "".join(f"{r['instruction']},{r['output']}\n" for r in rows),
            encoding="utf-8",
        )
    else:
        data = text.encode()
        path.write_bytes(packers[path.suffix](data) if path.suffix in packers else data)


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet", "jsonl.gz", "jsonl.bz2", "jsonl.xz"])
@pytest.mark.parametrize("in_processes", [False, True])
def test_the_share_of_a_file_grows_to_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, in_processes: bool
) -> None:
    if in_processes and ending != "jsonl":
        pytest.skip("one format is enough to see the processes")
    monkeypatch.setenv("VICUNA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prepare, "SMALL", 0 if in_processes else 1 << 40)
    monkeypatch.setattr(prepare, "CHUNK", 100)
    monkeypatch.setattr(prepare, "_cores", lambda: 2)
    path = tmp_path / f"rows.{ending}"
    filler = "".join(chr(0x4E00 + (i * 7919) % 20000) for i in range(1000))
    rows = [
        {"instruction": f"问题{i}", "output": filler[i % 50 :] + str(i * i)} for i in range(2000)
    ]
    write_rows(path, rows)
    words = vocabulary(byte_level())
    spec = prepare.PreparationSpec(words, find_template("alpaca", words).to_dict())
    told: list[tuple[int, float]] = []
    prepare.prepare_file(path, spec, lambda records, share: told.append((records, share)))
    records, shares = zip(*told)
    assert records[-1] == len(rows)
    assert list(records) == sorted(records)
    assert list(shares) == sorted(shares)
    assert shares[-1] == 1
    if not ending.endswith(("gz", "bz2", "xz")):  # a packed file is read in few pieces
        assert len({round(s, 2) for s in shares}) > (1 if ending == "parquet" else 5)


def test_a_log_gets_a_line_now_and_then() -> None:
    out = io.StringIO()
    times = iter([0.0, 10.0, 31.0, 31.0, 40.0, 62.0, 62.0])
    with console.working(console.Console(file=out), "reading data", lambda: next(times)) as say:
        for text in ("one", "two", "three", "[four]"):
            say(text)
    assert out.getvalue() == "reading data: two\nreading data: [four]\n"
