"""log.jsonl read while it grows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from vicuna.runs.log import RunLog


def line(event: str, **fields: Any) -> str:
    return json.dumps({"event": event, **fields}, ensure_ascii=False) + "\n"


def step(n: int, loss: float | None = 1.0, time: float | None = None) -> str:
    return line(
        "step", step=n, loss=loss, learning_rate=0.1, time=100.0 + n if time is None else time
    )


def test_only_what_is_new_is_taken_in_and_half_a_line_waits(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = RunLog(path)
    assert not log.read()
    path.write_text(line("start", step=0, total_steps=9, time=100.0) + step(1))
    assert log.read()
    assert not log.read()
    assert (log.step, log.total) == (1, 9)
    whole = step(2) + line("sample", step=2, prompt="问", answer="答")
    data = whole.encode()
    with path.open("ab") as file:
        file.write(data[:-9])  # inside of a character
        file.flush()
        assert log.read()
        assert (log.step, log.samples) == (2, [])
        file.write(data[-9:])
    log.read()
    assert [s["answer"] for s in log.samples] == ["答"]


def test_a_log_that_a_resumed_run_began_anew_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(line("start", step=0, total_steps=9, time=100.0) + step(1) + step(2) + step(3))
    log = RunLog(path)
    log.read()
    aside = tmp_path / "aside"
    aside.write_text(step(1) + step(2) + line("start", step=2, total_steps=9, time=200.0) * 5)
    aside.rename(path)
    log.read()
    assert list(log.steps["step"]) == [1, 2]
    assert log.began["step"] == 2


def test_losses_that_are_not_finite_leave_a_gap(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(step(1, 2.5) + step(2, None) + "not json\n[1]\n")
    log = RunLog(path)
    log.read()
    assert math.isnan(log.steps["loss"][1])
    assert log.now("loss") == 2.5
    assert log.now("memory_gib") is None


def test_the_time_left_is_told_from_the_newest_steps_of_this_start(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = RunLog(path)
    path.write_text(line("start", step=0, total_steps=10, time=100.0) + step(1))
    log.read()
    assert log.seconds_left() is None
    # A night of pause between the first steps and the resumption.
    path.write_text(
        step(1) + step(2) + line("start", step=2, total_steps=10, time=9000.0)
        + step(3, time=9010.0) + step(4, time=9013.0)
    )  # fmt: skip
    log.read()
    assert log.seconds_left() == pytest.approx(6 * 3.0)
