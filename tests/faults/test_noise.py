"""Only this project speaks: no library writes a line of its own into what a command says.

In processes of their own, since most such lines are printed when a library is imported. One process
runs the commands one after another, so that the libraries are imported once.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fault_kit import copied
from place_kit import ROWS

# What a command may say on standard error.
OURS = re.compile(
    r"note: .*|Writing .* once as .*|Converting .* once into .*|data\.jsonl:\d+: \w+|"
)
# What libraries say, wherever it lands.
THEIRS = re.compile(
    r"\w*Warning\b|\bWARN|bitsandbytes|transformers\b|huggingface|Failed to load|Loading weights|"
    r"it/s|deprecat|site-packages|\[W\d|fork|Retrying|gemm|torch\.|peft\b|kernels?\b",
    re.IGNORECASE,
)
ONE_BY_ONE = """
import os, sys
from vicuna.cli import main
for line in sys.stdin.read().splitlines():
    sys.argv = ["vicuna", *line.split()]
    sys.stdin = open(os.devnull)
    code = 0
    try:
        main()
    except SystemExit as e:
        code = e.code
    for stream in (sys.stdout, sys.stderr):
        print(f"== {line} == {code}", file=stream, flush=True)
"""


def _run(folder: Path, *lines: str, **env: str) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", ONE_BY_ONE], cwd=folder, input="\n".join(lines),
        capture_output=True, text=True, timeout=580,
        env={**os.environ, "VICUNA_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def _check(out: str, err: str, lines: list[str]) -> None:
    for stream in (out, err):
        ended = re.findall(r"^== (.*) == (\d+)$", stream, re.M)
        assert ended == [(line, "0") for line in lines], stream
    said = [line for line in err.splitlines() if not line.startswith("== ")]
    assert [line for line in said if not OURS.fullmatch(line)] == []
    assert [line for line in out.splitlines() if THEIRS.search(line) and "==" not in line] == []


def test_a_plan_says_nothing_but_the_plan(place: Path, tmp_path: Path) -> None:
    """nf4 on a shape known by name: it imports what training in 4 bits does."""
    line = "plan --model smollm2-135m --precision nf4 --memory 4GiB --cutoff_len 128"
    out, err = _run(tmp_path, line)
    _check(out, err, [line])


def test_commands_say_nothing_but_their_own(place: Path, tmp_path: Path) -> None:
    folder = copied(place, tmp_path / "copy")
    left_out = ("web", "demo", "download", "quantize gptq", "quantize awq", "run", "train")
    rows = [rows[0] for name, rows in ROWS.items() if name not in left_out]
    lines = [re.sub(r" new\b", f" new{i}", row.words) for i, row in enumerate(rows)]
    lines.append(ROWS["train"][0].words.replace("fp32", "nf4"))
    lines.append("generate --model tiny --precision int8 --max_new_tokens 2 hi")
    out, err = _run(folder, *lines)
    _check(out, err, lines)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "train", "merge"])
def test_it_is_so_alone(place: Path, tmp_path: Path, name: str) -> None:
    """Imports in another order; llama.cpp's own log."""
    folder = copied(place, tmp_path / "copy")
    line = ROWS[name][0].words
    _check(*_run(folder, line), [line])
