"""A kill at any instant, and the resumed run ends in the same bits as one that was never stopped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_kit import events, same, train, weights, write_data

from vicuna import files
from vicuna.errors import SettingsError, UserError
from vicuna.train import checkpoint as checkpoints


@pytest.fixture(scope="module")
def words(tiny: Path, data: Path) -> list[str]:
    return (
        f"--model {tiny} --dataset {data} --batch_size 8 --max_steps 8 --save_steps 2 "
        "--val_size 6 --eval_steps 4 --save_total_limit 0 --precision fp32"
    ).split()


@pytest.fixture(scope="module")
def whole(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    train(*words, "--output_dir", str(run))
    return run


def cut_after(whole: Path, step: int, target: Path) -> Path:
    """The folder as a kill after `step` and some more work would have left it."""
    shutil.copytree(whole, target)
    shutil.rmtree(target / "adapter")
    for checkpoint in checkpoints.all_of(target / "checkpoints"):
        if int(checkpoint.name[5:]) > step:
            shutil.rmtree(checkpoint)
    with (target / "log.jsonl").open("a") as log:
        log.write('{"event": "step", "step":')
    return target


@pytest.mark.parametrize("step", [2, 4, 6])
def test_resumed_runs_end_in_the_same_bits(whole: Path, tmp_path: Path, step: int) -> None:
    run = cut_after(whole, step, tmp_path / "run")
    assert train("--resume", str(run)) == 0
    assert same(weights(run), weights(whole))
    assert [e["step"] for e in events(run, "step")] == list(range(1, 9))
    old, new = ({e["step"]: e["loss"] for e in events(r, "step")} for r in (whole, run))
    assert old == new


def test_resume_takes_a_checkpoint_or_the_output_dir(whole: Path, tmp_path: Path) -> None:
    run = cut_after(whole, 6, tmp_path / "run")
    train("--resume", str(run / "checkpoints/step-000002"))
    assert same(weights(run), weights(whole))
    again = cut_after(whole, 4, tmp_path / "again")
    train("--output_dir", str(again), "--resume")
    assert same(weights(again), weights(whole))


def test_a_damaged_checkpoint_is_passed_over(whole: Path, tmp_path: Path) -> None:
    run = cut_after(whole, 6, tmp_path / "run")
    damaged = run / "checkpoints/step-000006/optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    train("--resume", str(run))
    assert same(weights(run), weights(whole))
    with pytest.raises(UserError, match="damaged"):
        checkpoints.read_state(
            Path(shutil.copytree(run / "checkpoints/step-000004", tmp_path / "x")).parent / "no"
        )


def test_changed_settings_are_refused_by_name(whole: Path, tmp_path: Path) -> None:
    run = cut_after(whole, 4, tmp_path / "run")
    with pytest.raises(SettingsError) as caught:
        train("--resume", str(run), "--learning_rate", "1e-5", "--batch_size", "4")
    assert "learning_rate was 0.0003" in str(caught.value)
    assert "batch_size was 8" in str(caught.value)
    train("--resume", str(run), "--learning_rate", "1e-5", "--allow_changes", "learning_rate")
    assert not same(weights(run), weights(whole))


def test_changed_data_is_refused(whole: Path, tmp_path: Path) -> None:
    run = cut_after(whole, 4, tmp_path / "run")
    other = write_data(tmp_path / "other.jsonl", 30, shift=500)
    with pytest.raises(SettingsError, match="the data are not those of the checkpoint"):
        train("--resume", str(run), "--dataset", str(other))
    train("--resume", str(run), "--dataset", str(other), "--allow_changes", "data")


def test_the_same_data_under_another_name_is_the_same_data(
    whole: Path, data: Path, tmp_path: Path
) -> None:
    run = cut_after(whole, 4, tmp_path / "run")
    moved = Path(shutil.copy(data, tmp_path / "moved.jsonl"))
    train("--resume", str(run), "--dataset", str(moved))
    assert same(weights(run), weights(whole))


@pytest.mark.parametrize("step", [0, 4])
def test_a_run_is_resumed_from_any_folder(
    tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    home, away = tmp_path / "home", tmp_path / "away"
    shutil.copytree(tiny, home / "base")
    shutil.copy(data, home / "mine.jsonl")
    shutil.copy(write_data(tmp_path / "other.jsonl", 6), home / "held.jsonl")
    (home / "ask.txt").write_text("你好\n", encoding="utf-8")
    away.mkdir()
    monkeypatch.chdir(home)
    words = "--model base --dataset mine.jsonl@weight=2 --val_dataset he*.jsonl --batch_size 8 "
    words += "--max_steps 8 --save_steps 2 --save_total_limit 0 --precision fp32 "
    words += "--sample_prompts ask.txt --sample_steps 4 --sample_tokens 2"
    train(*words.split(), "--output_dir", "done")
    run = cut_after(home / "done", step, tmp_path / "run")
    monkeypatch.chdir(away)
    assert train("--resume", str(run)) == 0
    assert same(weights(run), weights(home / "done"))
    assert {e["prompt"] for e in events(run, "sample")} == {"你好"}
    # Once more, from a third place: what was noted anew still leads there.
    shutil.rmtree(run / "checkpoints/step-000008")
    shutil.rmtree(run / "adapter")
    monkeypatch.chdir(tmp_path)
    assert train("--resume", str(run)) == 0
    assert same(weights(run), weights(home / "done"))


def test_a_run_that_noted_no_folder_says_what_its_paths_are_relative_to(
    whole: Path, data: Path, tmp_path: Path
) -> None:
    run = cut_after(whole, 4, tmp_path / "run")
    text = (run / "config.yaml").read_text(encoding="utf-8").replace(str(data), "gone/mine.jsonl")
    text = "".join(x for x in text.splitlines(True) if not x.startswith("  directory:"))
    (run / "config.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="in which the run began") as caught:
        train("--resume", str(run))
    assert "--dataset PATH" in caught.value.fix
    assert train("--resume", str(run), "--dataset", str(data)) == 0
    assert same(weights(run), weights(whole))


def test_data_can_start_again_from_the_beginning(whole: Path, tmp_path: Path) -> None:
    run = cut_after(whole, 4, tmp_path / "run")
    train("--resume", str(run), "--from_data_beginning")
    state = checkpoints.read_state(run / "checkpoints/step-000008")
    assert state.data_offset == 4
    assert not same(weights(run), weights(whole))


def test_a_finished_run_resumes_to_itself(whole: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    assert train("--resume", str(run)) == 0
    assert same(weights(run), weights(whole))


def test_continue_from_carries_optimiser_and_schedule_on(
    whole: Path, tiny: Path, tmp_path: Path
) -> None:
    new = write_data(tmp_path / "new.jsonl", 24, shift=900)
    run = tmp_path / "run"
    train("--continue_from", str(whole), "--dataset", str(new), "--output_dir", str(run),
          "--num_train_epochs", "2")  # fmt: skip
    steps = events(run, "step")
    # The old run was finished at 8 of 8; the new data takes 24 * 2 / 8 = 6 steps.
    assert [e["step"] for e in steps] == list(range(9, 15))
    assert steps[0]["learning_rate"] == pytest.approx(3e-4 * (1 - (8 - 1) / (14 - 1)))
    assert checkpoints.read_state(run / "checkpoints/step-000014").data_offset == 8


def test_continue_from_can_skip_what_the_old_run_took(whole: Path, tmp_path: Path) -> None:
    new = write_data(tmp_path / "new.jsonl", 24, shift=900)
    run = tmp_path / "run"
    train("--continue_from", str(whole), "--dataset", str(new), "--output_dir", str(run),
          "--max_steps", "10", "--from_data_beginning", "false")  # fmt: skip
    assert checkpoints.read_state(run / "checkpoints/step-000010").data_offset == 0


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["step", "checkpoint"])
def test_kill_9_in_the_middle(words: list[str], whole: Path, tmp_path: Path, moment: str) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "vicuna", "train", *words, "--output_dir", str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    log = run / "log.jsonl"
    deadline = time.monotonic() + 300
    mark = '"step": 5' if moment == "step" else "checkpoints/step-000004"
    while process.poll() is None and time.monotonic() < deadline:
        if log.is_file() and mark in log.read_text():
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(
        [sys.executable, "-m", "vicuna", "train", "--resume", str(run)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert same(weights(run), weights(whole))


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(words: list[str], whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "vicuna", "train", *words, "--output_dir", str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    log = run / "log.jsonl"
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if log.is_file() and '"event": "step"' in log.read_text():
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.002)
    output, _ = process.communicate()
    if process.returncode == 130:  # else the run was faster than the signal
        assert f"vicuna train --resume {run}" in output
        assert train("--resume", str(run)) == 0
    assert same(weights(run), weights(whole))


def test_a_full_disk_leaves_the_last_checkpoint(
    words: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    real = files.sync
    written: list[Path] = []

    def full(path: Path) -> None:
        if path.name == "optimizer.safetensors":
            written.append(path)
            if len(written) == 2:
                raise OSError(28, "No space left on device")
        real(path)

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(UserError, match="cannot write: the disk is full"):
        train(*words, "--output_dir", str(run))
    monkeypatch.undo()
    assert [p.name for p in checkpoints.all_of(run / "checkpoints")] == ["step-000002"]
    assert not list((run / "checkpoints").glob(".*"))
    os.environ["VICUNA_CACHE"] = str(tmp_path / "cache")
    train("--resume", str(run))
    assert same(weights(run), weights(whole))


def test_a_run_killed_before_its_first_checkpoint_starts_again(whole: Path, tmp_path: Path) -> None:
    run = cut_after(whole, 0, tmp_path / "run")
    assert train("--resume", str(run)) == 0
    assert same(weights(run), weights(whole))


def test_a_run_from_an_adapter_killed_at_once_starts_from_that_adapter_again(
    words: list[str], whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(*words, "--init_adapter", str(whole), "--output_dir", str(run))
    undisturbed = weights(run)
    shutil.copytree(run, tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints")
    shutil.rmtree(tmp_path / "killed" / "adapter")
    assert train("--resume", str(tmp_path / "killed")) == 0
    assert same(weights(tmp_path / "killed"), undisturbed)
    config = "adapter/adapter_config.json"
    assert (tmp_path / "killed" / config).read_bytes() == (run / config).read_bytes()


def test_a_run_that_continued_another_and_has_no_checkpoint_is_refused(
    words: list[str], whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train("--continue_from", str(whole), *words[2:4], "--output_dir", str(run))
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "adapter")
    with pytest.raises(UserError, match="continues another one"):
        train("--resume", str(run))


def test_later_checkpoints_of_an_abandoned_branch_are_kept_aside(
    whole: Path, tmp_path: Path
) -> None:
    run = cut_after(whole, 6, tmp_path / "run")
    train("--resume", str(run / "checkpoints/step-000002"))
    (aside,) = (run / "checkpoints").glob("abandoned-*")
    assert sorted(p.name for p in aside.iterdir()) == ["step-000004", "step-000006"]


def test_config_yaml_of_a_resumed_run_is_a_clean_recipe(whole: Path, tmp_path: Path) -> None:
    run = cut_after(whole, 4, tmp_path / "run")
    train("--resume", str(run))
    text = (run / "config.yaml").read_text()
    assert "resume:" not in text
    assert "allow_changes" not in text


def test_weights_of_sources_are_part_of_the_data(whole: Path, data: Path, tmp_path: Path) -> None:
    run = cut_after(whole, 4, tmp_path / "run")
    with pytest.raises(SettingsError, match="the data are not those"):
        train("--resume", str(run), "--dataset", f"{data}@weight=2")


def test_a_disk_that_is_really_full_is_one_message(
    words: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file may grow beyond 40 kB: safetensors has an error of its own for that."""
    import resource

    run = tmp_path / "run"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    real = checkpoints.save

    def save(*args: object, **more: object) -> Path:
        if (run / "checkpoints" / "step-000002").is_dir():
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
        return real(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoints, "save", save)
    try:
        with pytest.raises(UserError, match="cannot write: the file would be larger than"):
            train(*words, "--output_dir", str(run))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    monkeypatch.setattr(checkpoints, "save", real)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-000002"]
    train("--resume", str(run))
    assert same(weights(run), weights(whole))


@pytest.mark.parametrize("words_of", ["step", "end"])
def test_a_log_that_has_no_room_is_one_message(
    words: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words_of: str
) -> None:
    """The plot at the end, too: nothing that is written ends otherwise."""
    import resource

    from vicuna.train.run_folder import RunFolder

    run = tmp_path / "run"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    real = RunFolder.log

    def log(self: RunFolder, event: str, **fields: object) -> object:
        if event == words_of and fields["step"] in (3, 8):
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
        return real(self, event, **fields)

    monkeypatch.setattr(RunFolder, "log", log)
    try:
        with pytest.raises(UserError, match="cannot write: the file would be larger than"):
            train(*words, "--output_dir", str(run))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    monkeypatch.setattr(RunFolder, "log", real)
    assert train("--resume", str(run)) == 0
    assert same(weights(run), weights(whole))


def test_every_file_of_a_resumed_run_s_adapter_has_the_same_bytes(
    whole: Path, tmp_path: Path
) -> None:
    run = cut_after(whole, 4, tmp_path / "run")
    assert train("--resume", str(run)) == 0
    names = sorted(p.name for p in (whole / "adapter").iterdir())
    assert names == sorted(p.name for p in (run / "adapter").iterdir())
    for name in names:
        assert (run / "adapter" / name).read_bytes() == (whole / "adapter" / name).read_bytes()


def test_what_a_killed_checkpoint_left_is_swept_at_the_next_start(
    whole: Path, tmp_path: Path
) -> None:
    run = cut_after(whole, 4, tmp_path / "run")
    for name in (".step-000006.17623.part", ".step-000002.old", ".step-000005.abcdef-1.part"):
        shutil.copytree(run / "checkpoints" / "step-000002", run / "checkpoints" / name)
    # Killed between two renames: what was there before comes back.
    (run / "checkpoints" / "step-000004").rename(run / "checkpoints" / ".step-000004.17623.old")
    shutil.copytree(whole / "adapter", run / ".adapter.4194300.part")
    (run / ".config.yaml.part").write_text("half")
    assert train("--resume", str(run)) == 0
    assert not [p for p in run.rglob(".*") if p.name != ".lock"]
    assert same(weights(run), weights(whole))
    assert events(run, "start")[-1]["step"] == 4
