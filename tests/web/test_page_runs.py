"""Trainings started from the page: real processes on a tiny model, and states told from folders."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))
from app_kit import write_run
from run_kit import save_tiny_model, write_data

from vicuna.config import WebSettings
from vicuna.errors import SettingsError, UserError
from vicuna.runs import process
from vicuna.runs.manager import Run, Runs
from vicuna.web import train_html
from vicuna.web.i18n import catalog
from vicuna.web.state import App


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    save_tiny_model(folder / "tiny")
    write_data(folder / "data.jsonl", 24)
    return folder


def recipe(place: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": str(place / "tiny"),
        "dataset": [str(place / "data.jsonl")],
        "batch_size": 4,
        "max_steps": 4,
        **more,
    }


def wait(look: Callable[[], Run], until: Callable[[Run], bool], seconds: float = 120) -> Run:
    """A run, once it is as wanted."""
    end = time.monotonic() + seconds
    while not until(run := look()):
        assert time.monotonic() < end, (run.state, run.error, process.tail(run.path))
        time.sleep(0.1)
    return run


START = (
    "import json, sys; from pathlib import Path; from vicuna.runs.manager import Runs; "
    "Runs(Path(sys.argv[1])).start(json.loads(sys.argv[2]), '一号 run')"
)


def test_a_run_is_paused_found_by_another_server_resumed_and_finished(place: Path) -> None:
    runs = Runs(place / "runs")
    assert runs.all() == []
    long = recipe(place, max_steps=100_000, sample_prompts=["第1题"], sample_steps=100_000)
    # Started by a server that is gone at once.
    subprocess.run([sys.executable, "-c", START, str(place / "runs"), json.dumps(long)], check=True)
    run = runs.get("一号 run")
    assert run.state in ("starting", "running")
    with pytest.raises(UserError, match="another training works already"):
        runs.start(recipe(place), "second")
    assert not (place / "runs" / "second").exists()
    with pytest.raises(UserError, match="Stop it first"):
        runs.delete(run.name)
    wait(lambda: runs.get("一号 run"), lambda r: r.log.step > 1)
    # Another server: nothing is known but what lies in the folder.
    other = Runs(place / "runs")
    assert [(r.name, r.state) for r in other.all()] == [("一号 run", "running")]
    assert other.pause("一号 run").state in ("pausing", "paused")
    paused = wait(lambda: other.get("一号 run"), lambda r: not r.working)
    assert (paused.state, paused.error) == ("paused", "")
    assert list((paused.path / "checkpoints").glob("step-*"))
    assert not paused.has_adapter
    done = paused.log.step
    other.resume("一号 run")
    again = wait(lambda: runs.get("一号 run"), lambda r: r.log.step > done)
    assert again.log.began["step"] == done
    assert runs.stop("一号 run").state in ("pausing", "stopped")
    assert wait(lambda: runs.get("一号 run"), lambda r: not r.working).state == "stopped"
    runs.delete("一号 run")
    assert runs.all() == []
    assert list((place / "runs").glob("*run*")) == []


def test_a_run_that_ends_by_itself_is_finished_and_is_not_resumed(place: Path) -> None:
    runs = Runs(place / "runs")
    run = runs.start(recipe(place), "short")
    assert process.find(run.path) is not None
    run = wait(lambda: runs.get("short"), lambda r: not r.working)
    assert (run.state, run.log.step, run.log.total) == ("finished", 4, 4)
    assert run.has_adapter
    assert run.settings()["batch_size"] == 4
    with pytest.raises(UserError, match="finished"):
        runs.resume("short")
    with pytest.raises(UserError, match="does not run"):
        runs.pause("short")
    with pytest.raises(UserError, match="already holds a run"):
        runs.start(recipe(place), "short")
    output = (run.path / "output.txt").read_text(encoding="utf-8")
    assert output.startswith("$ vicuna train ")
    assert "vicuna chat --adapter" in output


def test_a_run_that_fails_has_the_message_and_is_begun_again_once_it_is_mended(place: Path) -> None:
    runs = Runs(place / "runs")
    runs.start(recipe(place, lora_target=["nope"]), "bad")
    run = wait(lambda: runs.get("bad"), lambda r: not r.working)
    assert run.state == "failed"
    assert "q_proj" in run.error
    assert "Traceback" not in run.error


def test_mistakes_in_settings_start_nothing(place: Path, tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs")
    with pytest.raises(SettingsError) as e:
        runs.start({"learning_rate": 7, "batch_size": 0, "nonsense": 1})
    assert len(e.value.mistakes) == 3
    for name in ("../out", "a/b", "", ".hidden", "x" * 99, "a\n"):
        with pytest.raises(UserError):
            runs.get(name)
    assert runs.all() == []


def test_a_page_that_only_looks_does_nothing(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "old", {"event": "end", "reason": "done", "step": 3, "time": 5.0})
    runs = Runs(tmp_path / "runs", App(WebSettings(read_only=True)).may_write)
    assert [r.state for r in runs.all()] == ["finished"]
    for act in (runs.resume, runs.pause, runs.stop, runs.delete, lambda n: runs.start({}, n)):
        with pytest.raises(UserError, match="read-only"):
            act("old")
    assert (tmp_path / "runs" / "old").is_dir()


WARNED = {"event": "warning", "step": 3, "time": 9.0}


@pytest.mark.parametrize(
    ("events", "output", "state", "words"),
    [
        ([{"event": "end", "reason": "interrupted", "step": 3, "time": 5.0}], "", "paused", ""),
        ([{"event": "end", "reason": "done", "step": 9, "time": 5.0}], "", "finished", ""),
        ([], "$ vicuna train x\n1/9  loss 2\n", "killed", ""),
        (
            [],
            "1/9\nerror: disk: full\nFree some space.\n",
            "failed",
            "disk: full\nFree some space.",
        ),
        ([], "1/9\n\ninterrupted\n", "stopped", ""),
        ([], "1/9\ninterrupted: update 3 is lost\n", "stopped", ""),
        ([], "error: old\n$ vicuna train\nerror: new\n", "failed", "new"),
        # Started in a terminal: there is the log alone.
        ([{**WARNED, "message": "UserError: out of memory"}], None, "failed", "out of memory"),
        ([{**WARNED, "message": "KeyboardInterrupt: "}], None, "stopped", ""),
        ([{**WARNED, "message": "update 3 skipped: loss is not finite"}], None, "killed", ""),
    ],
)
def test_the_state_of_a_run_whose_process_is_gone(
    tmp_path: Path, events: list[dict[str, Any]], output: str | None, state: str, words: str
) -> None:
    write_run(tmp_path / "runs" / "r", *events, output=output)
    run = Runs(tmp_path / "runs").get("r")
    assert (run.state, run.error) == (state, words)


def test_a_paused_run_that_is_refused_stays_paused_and_says_what_differs(place: Path) -> None:
    """Its data was changed since: nothing of it is touched, and it goes on once that is undone."""
    data = place / "changing.jsonl"
    write_data(data, 24)
    before = data.read_bytes()
    runs = Runs(place / "runs")
    runs.start(recipe(place, dataset=[str(data)], max_steps=100_000), "refused")
    wait(lambda: runs.get("refused"), lambda r: r.log.step > 1)
    runs.pause("refused")
    wait(lambda: runs.get("refused"), lambda r: not r.working)
    write_data(data, 24, shift=7)
    runs.resume("refused")
    run = wait(lambda: runs.get("refused"), lambda r: not r.working)
    assert run.state == "paused"
    what, way_out = run.error.split("\n")
    assert what.startswith("the data are not those of the checkpoint: ")
    assert "--allow_changes data" in way_out
    html = train_html.head(run, lambda key, **fields: catalog()[key][1].format(**fields))
    assert "仍为暂停" in html
    assert "数据不是检查点的数据" in html
    assert "失败" not in html
    data.write_bytes(before)
    done = run.log.step
    runs.resume("refused")
    wait(lambda: runs.get("refused"), lambda r: r.log.step > done)
    runs.stop("refused")
    wait(lambda: runs.get("refused"), lambda r: not r.working)
    runs.delete("refused")


HOLD = (
    "import sys, time; from pathlib import Path; from vicuna.train.run_folder import RunFolder; "
    "run = RunFolder(Path(sys.argv[1])); print('locked', flush=True); time.sleep(600)"
)


def test_a_training_in_a_terminal_is_seen_and_can_be_told_to_stop(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "r")
    runs = Runs(tmp_path / "runs")
    assert runs.get("r").state == "killed"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "runs" / "r")], stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert runs.get("r").working
        with pytest.raises(UserError, match="another training"):
            runs.start({}, "second")
        runs.pause("r")
        holder.wait(30)
    finally:
        holder.kill()
        holder.stdout.close()
    assert not runs.get("r").working


def test_a_pid_that_belongs_to_somebody_else_now_is_never_told_anything(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "r"
    write_run(folder, output="")
    mine = psutil.Process()
    stale = {"pid": os.getpid(), "created": mine.create_time() - 1000, "output_at": 0, "asked": ""}
    (folder / ".process.json").write_text(json.dumps(stale))
    (folder / ".lock").write_text(f"pid {os.getpid()}")
    os.utime(folder / ".lock", (1000, 1000))
    runs = Runs(tmp_path / "runs")
    assert runs.get("r").state == "killed"
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(UserError, match="does not run"):
        runs.stop("r")
    assert signal.getsignal(signal.SIGINT) is before
