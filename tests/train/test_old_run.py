"""A run folder of commit f1de0b9 (`run_f1de0b9`) works with today's code as it did with its own."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
from run_kit import events, largest_difference, train, weights
from safetensors.torch import load_file

import vicuna
from vicuna.commands.merge import run as merge
from vicuna.runs.log import RunLog
from vicuna.runs.manager import Runs
from vicuna.train import checkpoint as checkpoints
from vicuna.train.micro_batch import MicroBatch
from vicuna.train.progress import plot_loss


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The finished run, in the folder in which its relative paths lead to its base and its data."""
    shutil.copytree(Path(__file__).parent / "run_f1de0b9", tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old" / "run"


def test_its_checkpoint_is_read(run: Path) -> None:
    checkpoint, state, warnings = checkpoints.last_whole(run)
    assert (checkpoint.name, state.step, state.total, warnings) == ("step-000004", 4, 6, [])
    assert state.micro_batch == MicroBatch(1024, 1024, examples=0, share_prefixes=True)
    assert state.to_json().keys() >= {"cut", "settings", "data", "step"}


def test_it_is_resumed_and_ends_as_it_did_then(run: Path) -> None:
    ended = {"step": events(run, "step"), "eval": events(run, "eval")}
    (run / "adapter").rename(run.parent / "adapter-then")
    assert train("--resume", "run") == 0
    then = load_file(run.parent / "adapter-then" / "adapter_model.safetensors")
    assert largest_difference(weights(run), then) < 1e-5
    for kind, old in ended.items():
        new = events(run, kind)
        assert [e["step"] for e in new] == [e["step"] for e in old]
        assert [e["loss"] for e in new] == pytest.approx([e["loss"] for e in old], abs=1e-5)


def test_it_is_listed_with_its_log_and_settings(run: Path) -> None:
    (listed,) = Runs(run.parent).all()
    assert (listed.name, listed.state, listed.has_adapter) == ("run", "finished", True)
    assert listed.settings()["batch_size"] == 8
    log = RunLog(run / "log.jsonl")
    assert log.read()
    assert (log.step, log.total, log.odd, len(log.evaluations)) == (6, 6, 0, 4)
    assert not any(map(math.isnan, log.steps["loss"]))
    assert plot_loss(run) == run / "loss.png"


def test_a_new_run_begins_with_its_adapter_or_continues_it(run: Path) -> None:
    data = ["--dataset", "data.jsonl", "--max_steps", "7", "--learning_rate", "1e-9"]
    assert train("--init_adapter", "run", "--model", "base", *data, "--output_dir", "new") == 0
    assert largest_difference(weights(run.parent / "new"), weights(run)) < 1e-6
    checkpoint = str(run / "checkpoints" / "step-000004")
    assert train("--continue_from", checkpoint, *data, "--output_dir", "more") == 0
    assert [e["step"] for e in events(run.parent / "more", "step")] == [5, 6, 7]


def test_its_adapter_answers_and_merges(run: Path) -> None:
    how = {"precision": "fp32", "engine": "torch"}
    with vicuna.load("base", adapter="run", **how) as model:
        answer = model.generate("第3题：3加一？", max_new_tokens=8).answers[0].token_ids
    with vicuna.load("base", **how) as model:
        assert model.generate("第3题：3加一？", max_new_tokens=8).answers[0].token_ids != answer
    words = ["--model", "base", "--adapter", "run", "--output_dir", "merged", "--dtype", "fp32"]
    assert merge(words) == 0
    with vicuna.load("merged", template="auto", **how) as model:
        assert model.generate("第3题：3加一？", max_new_tokens=8).answers[0].token_ids == answer
