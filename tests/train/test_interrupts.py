"""Ctrl-C: what is kept is said, what is lost is said, nothing is half-made, and the exit code is
130; for training at any moment and any number of times, and for the other commands."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from run_kit import events, train

from vicuna import files, interrupts
from vicuna.model.trainable import TrainableModel
from vicuna.train import checkpoint as checkpoints
from vicuna.train import loop


@pytest.fixture(scope="module")
def words(tiny: Path, data: Path) -> list[str]:
    return (
        f"--model {tiny} --dataset {data} --batch_size 8 --max_steps 8 --save_steps 3 "
        "--val_size 6 --eval_steps 2 --save_total_limit 0 --precision fp32 --lora_dropout 0.1"
    ).split()


@pytest.fixture(scope="module")
def whole(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    train(*words, "--output_dir", str(run))
    return run


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The process's own handlers are there again afterwards."""
    before = signal.getsignal(signal.SIGINT)
    hook = sys.unraisablehook
    yield
    signal.signal(signal.SIGINT, before)
    sys.unraisablehook = hook
    interrupts._caught = interrupts._waiting = False
    interrupts.keeps("nothing was written")


def press_at(
    monkeypatch: pytest.MonkeyPatch, place: Any, name: str, call: int, times: int
) -> list[int]:
    """Press Ctrl-C so many times when a function is called for the `call`-th time."""
    real: Callable[..., Any] = getattr(place, name)
    calls: list[int] = []

    def pressed(*args: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return real(*args, **more)

    monkeypatch.setattr(place, name, pressed)
    return calls


def same_as(run: Path, whole: Path) -> None:
    """Every file of the adapter, and what was evaluated."""
    for path in sorted((whole / "adapter").iterdir()):
        assert (run / "adapter" / path.name).read_bytes() == path.read_bytes(), path.name
    losses = [[(e["step"], e["loss"]) for e in events(r, "eval")] for r in (run, whole)]
    assert losses[0] == losses[1]


def saved(run: Path) -> list[str]:
    assert not list((run / "checkpoints").glob(".*"))
    return [p.name for p in checkpoints.all_of(run / "checkpoints")]


@pytest.mark.parametrize(
    ("place", "name", "call", "times", "last", "said"),
    [
        (TrainableModel, "backward", 5, 1, 5, "stopping after step 5; everything"),
        (TrainableModel, "backward", 5, 2, 4, "step 5 was interrupted and is lost"),
        (loop.Training, "_change_weights", 5, 2, 5, "nothing is lost"),
        (TrainableModel, "mean_loss", 3, 1, 4, "stopping after step 4;"),
        (TrainableModel, "mean_loss", 3, 2, 4, "the evaluation was interrupted"),
        (checkpoints, "file_hash", 2, 1, 2, "stopping after step 2;"),
        (checkpoints, "file_hash", 2, 2, 2, "a checkpoint is being written"),
    ],
    ids=["once", "twice", "weights", "evaluation", "evaluation twice", "saving", "saving twice"],
)
def test_one_or_two_lose_no_step_that_was_done(
    words: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], place: Any, name: str, call: int, times: int, last: int,
    said: str,
) -> None:  # fmt: skip
    run = tmp_path / "run"
    press_at(monkeypatch, place, name, call, times)
    assert train(*words, "--output_dir", str(run)) == 130
    monkeypatch.undo()
    monkeypatch.setenv("VICUNA_CACHE", str(tmp_path / "cache"))
    output = " ".join(capsys.readouterr().out.split())
    assert said in output
    assert f"resume with: vicuna train --resume {run}" in output
    done = checkpoints.read_state(run / "checkpoints" / saved(run)[-1]).step
    assert done == last
    assert train("--resume", str(run)) == 0
    same_as(run, whole)


def test_the_third_says_what_is_lost(
    words: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    press_at(monkeypatch, TrainableModel, "backward", 6, 2)
    # The checkpoint that is then written has step 5.
    real = files.sync

    def third(path: Path) -> None:
        if "step-000005" in str(path):
            signal.raise_signal(signal.SIGINT)
        real(path)

    monkeypatch.setattr(files, "sync", third)
    with pytest.raises(KeyboardInterrupt):
        train(*words, "--output_dir", str(run))
    assert "step 5 is lost, those up to 4 are saved" in interrupts.line()
    assert f"resume with: vicuna train --resume {run}" in interrupts.line()
    monkeypatch.undo()
    monkeypatch.setenv("VICUNA_CACHE", str(tmp_path / "cache"))
    assert "step-000005" not in saved(run)
    assert train("--resume", str(run)) == 0
    same_as(run, whole)


def test_answers_to_sample_prompts_are_cut_off(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vicuna.generate.strategies import BranchBuilder

    run = tmp_path / "run"
    calls = press_at(monkeypatch, BranchBuilder, "grow", 4, 1)
    more = ["--sample_prompts", "你好", "再见", "--sample_steps", "2", "--sample_tokens", "200"]
    assert train(*words, "--output_dir", str(run), *more) == 130
    assert 4 <= len(calls) < 8
    assert [e["whole"] for e in events(run, "sample")] == [False, False]
    assert saved(run)[-1] == "step-000002"


def test_a_finished_run_says_so(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    assert train("--resume", str(run)) == 0
    assert train("--output_dir", str(run), "--resume") == 0
    assert capsys.readouterr().out.count("this run is finished: 8 steps") == 2
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    # More of it can still be asked for, and less of it taken up again.
    assert train("--resume", str(run), "--max_steps", "9", "--allow_changes", "max_steps") == 0
    assert events(run, "end")[-1]["step"] == 9


# -- other commands ----


def command(*words: str) -> int:
    """`vicuna WORDS` in this process: its exit code."""
    from vicuna.cli import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["vicuna", *words])
        with pytest.raises(SystemExit) as caught:
            main()
    return int(caught.value.code or 0)


COMMANDS = {
    "merge": "merge --model {base} --adapter {run} --output_dir {out}/x",
    "export": "export gguf --model {base} --adapter {run} --type f16 --output {out}/x.gguf",
    "adapter alone": "export gguf --model {base} --adapter {run} --adapter_only --output {out}/x.gguf",
    "convert": "convert --model {base} --to meta --output_dir {out}/x",
    "upgrade": "adapter upgrade {run}/adapter --output_dir {out}/x",
    "check": "data check {data} --model {base}",
    "train": "train --model {base} --dataset {data} --max_steps 2 --output_dir {out}/x",
}


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_writes_leaves_nothing_half_made(
    name: str, times: int, tiny: Path, data: Path, whole: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setenv("VICUNA_CACHE", str(tmp_path / "cache"))
    line = COMMANDS[name].format(base=tiny, run=whole, out=out, data=data)
    calls = press_at(monkeypatch, files, "sync", 1, times)
    assert command(*line.split()) == 130
    assert calls
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("interrupted: ")
    assert "Traceback" not in "".join(error)
    assert not list(tmp_path.rglob("*.part"))
    assert not list(tmp_path.rglob("*.old"))
    if name != "train":
        assert not list(out.iterdir())


@pytest.mark.slow
def test_ctrl_c_before_anything_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys, signal; sys.argv = ['vicuna', 'version']; import vicuna;"
        "signal.raise_signal(signal.SIGINT); print('not reached')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr.strip() == "interrupted: nothing was written"
    assert not done.stdout


def test_answers_of_a_file_that_are_whole_are_kept(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vicuna.generate import batch

    asked, answers = tmp_path / "asked.jsonl", tmp_path / "answers.jsonl"
    asked.write_text("".join(json.dumps({"instruction": f"第{i}题"}) + "\n" for i in range(5)))
    line = f"generate --model {tiny} --input {asked} --output {answers} --max_new_tokens 3"
    press_at(monkeypatch, batch, "_answer", 3, 2)
    assert command(*line.split()) == 130
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == (
        f"interrupted: 2 answers are kept in {answers}; the same command goes on after them"
    )
    monkeypatch.undo()
    monkeypatch.setenv("VICUNA_CACHE", str(tmp_path / "cache"))
    assert len(answers.read_text().splitlines()) == 2
    assert command(*line.split()) == 0
    assert len(answers.read_text().splitlines()) == 5
