"""A reader that has gone, as behind `| head -c 3`: exit code 141 and not a word, in any command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))
from run_kit import save_tiny_model, write_data


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and data."""
    folder = tmp_path_factory.mktemp("place")
    save_tiny_model(folder / "tiny")
    write_data(folder / "data.jsonl", 12)
    return folder


@pytest.mark.parametrize(
    "words",
    [
        "--help",
        "generate --help",
        "version",
        "data check data.jsonl",
        "data check data.jsonl --json",
        "generate --model tiny Write --max_new_tokens 9",
        "generate --model tiny Write --max_new_tokens 9 --num_beams 2",
        "generate --model tiny Write --max_new_tokens 9 --json",
        "chat --model tiny --max_new_tokens 9",
    ],
)
def test_a_reader_that_has_gone(place: Path, words: str) -> None:
    environment = {
        **os.environ,
        "VICUNA_CACHE": str(place / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "vicuna", *words.split()],
            cwd=place, env=environment, input="Hi\nWho?\n", stdout=write, stderr=subprocess.PIPE,
            text=True, timeout=300,
        )  # fmt: skip
    finally:
        os.close(write)
    # What was told before (of the template, say) stays; of the pipe nothing is said.
    assert [line for line in done.stderr.splitlines() if not line.startswith("note: ")] == []
    assert done.returncode == 141
