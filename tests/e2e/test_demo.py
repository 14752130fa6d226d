"""The demo: what it asks is fair, and the answers that it shows are the ones of `vicuna generate`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from vicuna.files import cache_dir

SAMPLES = Path(str(resources.files("vicuna.samples")))
COUNTS = "一两三四五六七八九十"


def records(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (SAMPLES / name).read_text("utf-8").splitlines()]


TRAINED, HELD_OUT = records("orders_zh.jsonl"), records("orders_heldout_zh.jsonl")


def fields(record: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(record["output"])
    return found


def test_there_are_enough_records_and_all_ask_the_same() -> None:
    assert len(TRAINED) >= 300
    assert len(HELD_OUT) == 60
    assert len({r["instruction"] for r in TRAINED + HELD_OUT}) == 1


def test_every_answer_is_in_its_sentence() -> None:
    for record in TRAINED + HELD_OUT:
        answer = fields(record)
        assert list(answer) == ["who", "item", "count"]
        assert answer["who"] in record["input"]
        assert answer["item"] in record["input"]
        rest = record["input"].replace(answer["who"], "").replace(answer["item"], "")
        said = [c for c in re.sub("一共|五金店", "", rest) if c in COUNTS]
        assert said == [COUNTS[answer["count"] - 1]], record["input"]
        plain = json.dumps(answer, ensure_ascii=False, separators=(",", ":"))
        assert record["output"] == plain


def test_what_is_held_out_is_not_in_the_training_data() -> None:
    sentences = [r["input"] for r in TRAINED + HELD_OUT]
    assert len(set(sentences)) == len(sentences)
    # Not as a part of a longer one, and not with other punctuation or at another time of day.
    core = [re.sub(r"昨天|今天|早上|中午|周末|前天|傍晚|刚才|\W", "", s) for s in sentences]
    trained, held_out = core[: len(TRAINED)], core[len(TRAINED) :]
    assert not [h for h in held_out if any(h in t or t in h for t in trained)]
    # No answer of one file is an answer of the other.
    assert not {r["output"] for r in TRAINED} & {r["output"] for r in HELD_OUT}
    # The names of many were never seen, nor part of what was: these answers cannot be remembered.
    known = {fields(r)["who"] for r in TRAINED}
    new = [w for w in (fields(r)["who"] for r in HELD_OUT) if w not in known]
    assert len(new) >= 20
    assert not [w for w in new if any(w in r["input"] for r in TRAINED)]


def test_both_files_ask_for_the_same_things_equally_often() -> None:
    for file in (TRAINED, HELD_OUT):
        counts = Counter(fields(r)["count"] for r in file)
        assert counts == dict.fromkeys(range(1, 11), len(file) // 10)
    items = {fields(r)["item"] for r in TRAINED}
    assert {fields(r)["item"] for r in HELD_OUT} <= items
    # Guessing what is commonest is no way to a right answer.
    for file in (TRAINED, HELD_OUT):
        for key in ("who", "item"):
            commonest = Counter(fields(r)[key] for r in file).most_common(1)[0][1]
            assert commonest <= len(file) // 10


# The demo in a process of its own; the answers that it shows are printed as JSON as well.
PROGRAM = """
import json, sys
from vicuna.commands import demo
real = demo.answers
def noted(*given, **named):
    found = real(*given, **named)
    print("SHOWN " + json.dumps(found.shown))
    return found
demo.answers = noted
sys.exit(demo.run(["--quick", "--output_dir", "demo"]))
"""


@pytest.mark.slow
def test_answers_before_and_after_are_those_of_generate(tmp_path: Path) -> None:
    def python(*words: str) -> str:
        environment = {**os.environ, "VICUNA_CACHE": str(cache_dir()), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def generate(*words: str) -> list[str]:
        output = tmp_path / f"answers{words[0]}.jsonl"
        asked = ["--input", "asked.jsonl", "--output", str(output), "--max_new_tokens", "40"]
        python("-m", "vicuna", "generate", *words, *asked)
        return [json.loads(line)["output"] for line in output.read_text("utf-8").splitlines()]

    said = python("-c", PROGRAM)
    before, after = (
        json.loads(line.removeprefix("SHOWN "))
        for line in said.splitlines()
        if line.startswith("SHOWN ")
    )
    assert len(before) == len(after) == 3
    counted = re.search(r"^eval answers exactly right: \d of 6 before, \d of 6 after$", said, re.M)
    assert counted
    assert counted.end() > len(said) - 500, "among the last lines"
    assert "short form" in said
    first = "".join(json.dumps(r) + "\n" for r in HELD_OUT[:3])
    (tmp_path / "asked.jsonl").write_text(first, encoding="utf-8")
    assert generate("--model", "smollm2-135m") == before
    assert generate("--adapter", "demo") == after
    assert before != after
