"""Whole runs on a tiny model: what ends up in the folder, and what may not change the result."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from run_kit import events, largest_difference, same, save_tiny_model, train, weights, write_data

from kit import tiny_model
from vicuna.errors import SettingsError, UserError
from vicuna.train.run_folder import RunFolder


@pytest.fixture(scope="module")
def words(tiny: Path, data: Path) -> list[str]:
    return f"--model {tiny} --dataset {data} --batch_size 8 --max_steps 6 --save_steps 2".split()


@pytest.fixture(scope="module")
def reference(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "reference"
    assert train(*words, "--output_dir", str(run), "--val_size", "6") == 0
    return run


def test_a_run_folder_holds_what_other_tools_rely_on(reference: Path) -> None:
    for name in ("config.yaml", "data.json", "log.jsonl", "loss.png"):
        assert (reference / name).stat().st_size
    assert (reference / "adapter/adapter_config.json").is_file()
    assert (reference / "checkpoints/step-000006/state.json").is_file()
    steps = events(reference, "step")
    assert [e["step"] for e in steps] == [1, 2, 3, 4, 5, 6]
    wanted = {"step", "loss", "learning_rate", "grad_norm", "examples", "tokens"}
    wanted |= {"supervised_tokens", "seconds", "tokens_per_second", "memory_gib"}
    assert all(wanted <= set(e) and e["examples"] == 8 for e in steps)
    config = yaml.safe_load((reference / "config.yaml").read_text())
    assert config["batch_size"] == 8
    assert config["resolved"]["total_steps"] == 6
    assert config["environment"]["versions"]["torch"]


def test_missing_data_is_told_before_a_base_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vicuna.train.setup.locate", lambda _: pytest.fail("the base was fetched"))
    missing = str(tmp_path / "missing.jsonl")
    with pytest.raises(UserError, match="no such file"):
        train("--model", "some/base", "--dataset", missing, "--output_dir", str(tmp_path / "run"))


def test_the_loss_falls_and_the_best_weights_are_kept(reference: Path) -> None:
    losses = [e["loss"] for e in events(reference, "eval")]
    assert losses[-1] < losses[0]
    best = min(events(reference, "eval"), key=lambda e: e["loss"])["step"]
    assert events(reference, "end")[0]["best_step"] == best


@pytest.mark.parametrize(
    "cut",
    [
        ("--micro_batch_size", "1"),
        ("--micro_batch_size", "3"),
        ("--micro_batch_tokens", "60"),
        ("--share_prefixes", "false"),
        ("--gradient_checkpointing", "selective"),
        ("--gradient_checkpointing", "true"),
        ("--gradient_checkpointing", "offload"),
    ],
)
def test_how_a_step_is_cut_changes_nothing_but_rounding(
    reference: Path, words: list[str], tmp_path: Path, cut: tuple[str, str]
) -> None:
    run = tmp_path / "run"
    train(*words, "--output_dir", str(run), "--val_size", "6", *cut)
    assert largest_difference(weights(run), weights(reference)) < 2e-5


def test_two_runs_of_one_config_end_in_the_same_bits(
    reference: Path, words: list[str], tmp_path: Path
) -> None:
    train(*words, "--output_dir", str(tmp_path / "run"), "--val_size", "6")
    assert same(weights(tmp_path / "run"), weights(reference))


def test_another_seed_is_another_run(reference: Path, words: list[str], tmp_path: Path) -> None:
    train(*words, "--output_dir", str(tmp_path / "run"), "--val_size", "6", "--seed", "1")
    assert not same(weights(tmp_path / "run"), weights(reference))


def test_a_run_folder_is_not_overwritten(reference: Path, words: list[str]) -> None:
    with pytest.raises(UserError, match="already holds a run"):
        train(*words, "--output_dir", str(reference))


OWN = ("config.yaml", "data.json", "log.jsonl", "loss.png", "adapter/my.txt", "checkpoints/my.txt")


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("resume", [False, True])
def test_what_is_not_a_runs_is_never_written_over(
    words: list[str], tmp_path: Path, name: str, resume: bool
) -> None:
    own = tmp_path / name
    own.parent.mkdir(exist_ok=True)
    own.write_text('{"event": "mine"}\n')
    before = sorted(tmp_path.rglob("*"))
    again = ["--resume"] if resume else []
    with pytest.raises(UserError) as caught:
        train(*words, "--output_dir", str(tmp_path), *again)
    assert "--output_dir" in caught.value.fix
    assert resume or name.split("/")[0] in caught.value.what
    assert own.read_text() == '{"event": "mine"}\n'
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_that_ended_over_its_data_leaves_its_folder_free(
    words: list[str], tmp_path: Path
) -> None:
    bad, run = tmp_path / "bad.jsonl", tmp_path / "run"
    bad.write_text('{"no": "record"}\n')
    for _ in range(2):
        with pytest.raises(UserError, match="no usable records"):
            train(*words[:2], "--dataset", str(bad), "--output_dir", str(run))
    train(*words, "--max_steps", "1", "--output_dir", str(run))


@pytest.mark.parametrize("text", ["", "\n", '{"no": "record"}\n'])
def test_held_out_data_without_a_usable_record_is_refused(
    words: list[str], tmp_path: Path, text: str
) -> None:
    (tmp_path / "held.jsonl").write_text(text)
    with pytest.raises(UserError, match="nothing to evaluate on") as caught:
        train(*words, "--val_dataset", str(tmp_path / "held.jsonl"), "--output_dir",
              str(tmp_path / "run"))  # fmt: skip
    assert "held.jsonl" in caught.value.where


def test_a_run_folder_in_use_is_refused(words: list[str], tmp_path: Path) -> None:
    held = RunFolder(tmp_path)
    with pytest.raises(UserError, match="another process"):
        train(*words, "--output_dir", str(tmp_path))
    held.close()


def test_sample_prompts_are_answered(words: list[str], tmp_path: Path) -> None:
    train(*words, "--output_dir", str(tmp_path / "r"), "--sample_prompts", "你好", "--sample_steps",
          "3", "--sample_tokens", "5")  # fmt: skip
    samples = events(tmp_path / "r", "sample")
    assert [e["step"] for e in samples] == [3, 6]
    assert samples[0]["prompt"] == "你好"


def test_answering_samples_does_not_change_the_result(
    words: list[str], tmp_path: Path, reference: Path
) -> None:
    train(*words, "--output_dir", str(tmp_path / "r"), "--val_size", "6", "--sample_prompts", "你好",
          "--sample_steps", "2", "--sample_tokens", "3")  # fmt: skip
    assert same(weights(tmp_path / "r"), weights(reference))


def test_early_stopping_ends_the_run(words: list[str], tmp_path: Path) -> None:
    run = tmp_path / "r"
    train(*words, "--output_dir", str(run), "--val_size", "6", "--eval_steps", "1",
          "--max_steps", "40", "--learning_rate", "0.3", "--max_grad_norm", "0",
          "--early_stopping_patience", "2")  # fmt: skip
    end = events(run, "end")[0]
    assert end["step"] < 40
    assert end["reason"] == "no lower validation loss"


def test_dropout_changes_the_run_but_not_with_the_cut(words: list[str], tmp_path: Path) -> None:
    for name, cut in (("a", "0"), ("b", "1")):
        train(*words, "--output_dir", str(tmp_path / name), "--lora_dropout", "0.2",
              "--micro_batch_size", cut)  # fmt: skip
    train(*words, "--output_dir", str(tmp_path / "c"))
    a, b, c = (weights(tmp_path / n) for n in "abc")
    assert largest_difference(a, b) < 2e-5
    assert largest_difference(a, c) > 1e-4


def test_no_usable_rows_stop_before_the_base_is_loaded(tiny: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(UserError, match="no usable records"):
        train("--model", str(tiny), "--dataset", str(empty), "--output_dir", str(tmp_path / "r"))
    assert not (tmp_path / "r/adapter").exists()


def test_strict_stops_at_the_first_bad_record(tiny: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "c"}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl:2"):
        train("--model", str(tiny), "--dataset", str(bad), "--strict", "--output_dir",
              str(tmp_path / "r"))  # fmt: skip


def test_mistakes_come_all_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        train("--data_path", "x", "--lora_rnk", "4", "--batch_size", "0", "--precision", "int3")
    text = str(caught.value)
    for words in ("data_path is now dataset", "did you mean lora_rank", "at least 1", "'nf4'"):
        assert words in text


def test_training_stops_with_advice_when_nothing_is_finite(
    words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="without a finite gradient"):
        train(*words, "--output_dir", str(tmp_path / "r"), "--learning_rate", "1",
              "--max_steps", "60", "--max_grad_norm", "0", "--adam_epsilon", "1e-30",
              "--lora_alpha", "1e30", "--max_nonfinite_steps", "3")  # fmt: skip
    assert len(events(tmp_path / "r", "warning")) >= 3


def test_weights_of_data_sets_decide_how_often_they_are_seen(tiny: Path, tmp_path: Path) -> None:
    a = write_data(tmp_path / "a.jsonl", 10)
    b = write_data(tmp_path / "b.jsonl", 10, shift=100)
    train("--model", str(tiny), "--dataset", f"{a}@weight=2", str(b), "--batch_size", "5",
          "--num_train_epochs", "1", "--output_dir", str(tmp_path / "r"))  # fmt: skip
    assert events(tmp_path / "r", "end")[0]["step"] == 6


def test_init_adapter_begins_with_its_weights_and_template(
    reference: Path, tiny: Path, data: Path, tmp_path: Path
) -> None:
    train("--model", str(tiny), "--dataset", str(data), "--max_steps", "1", "--init_adapter",
          str(reference), "--learning_rate", "1e-9", "--output_dir", str(tmp_path / "r"))  # fmt: skip
    assert largest_difference(weights(tmp_path / "r"), weights(reference)) < 1e-6
    with pytest.raises(UserError, match="trained with template auto"):
        train("--model", str(tiny), "--dataset", str(data), "--init_adapter", str(reference),
              "--template", "alpaca", "--output_dir", str(tmp_path / "s"))  # fmt: skip


def test_an_adapter_of_another_base_is_refused(reference: Path, data: Path, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", seed=9)
    words = ("--model", str(other), "--dataset", str(data), "--max_steps", "1")
    with pytest.raises(UserError, match="trained on other weights"):
        train(*words, "--init_adapter", str(reference), "--output_dir", str(tmp_path / "a"))
    train(*words, "--init_adapter", str(reference), "--output_dir", str(tmp_path / "b"),
          "--allow_other_base")  # fmt: skip


def test_the_data_report_is_in_the_folder(reference: Path) -> None:
    report = json.loads((reference / "data.json").read_text())
    assert report["files"][0]["records"] == 40
    assert report["examples"] == 34
    assert report["validation_examples"] == 6


def test_a_family_that_is_not_known_is_trained_by_transformers_and_said_so_once(
    tiny: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "gemma2"))
    (folder / "model.safetensors").unlink()
    config = json.loads((tiny / "config.json").read_text())
    ids = {"vocab_size": config["vocab_size"], "eos_token_id": config["eos_token_id"]}
    tiny_model("gemma2", **ids).save_pretrained(folder)
    for name, more in (("plain", ()), ("again", ("--gradient_checkpointing",))):
        train("--model", str(folder), "--dataset", str(data), "--batch_size", "8", "--max_steps",
              "3", "--output_dir", str(tmp_path / name), *more)  # fmt: skip
        said = " ".join(capsys.readouterr().out.split())
        assert said.count("transformers' own forward is used") == 1
        assert "gemma2 is not among llama, mistral, qwen2, qwen3" in said
    assert largest_difference(weights(tmp_path / "plain"), weights(tmp_path / "again")) < 2e-5
    train("--model", str(tiny), "--dataset", str(data), "--batch_size", "8", "--max_steps", "1",
          "--output_dir", str(tmp_path / "known"))  # fmt: skip
    assert "own forward" not in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["bf16", "fp16", "int8", "nf4"])
def test_every_precision_trains(tiny: Path, data: Path, tmp_path: Path, precision: str) -> None:
    run = tmp_path / "r"
    train("--model", str(tiny), "--dataset", str(data), "--max_steps", "4", "--batch_size", "8",
          "--val_size", "6", "--precision", precision, "--output_dir", str(run))  # fmt: skip
    losses = [e["loss"] for e in events(run, "eval")]
    assert losses[-1] < losses[0]
    assert all(e["grad_norm"] > 0 for e in events(run, "step"))


def test_sample_answers_keep_to_their_share_of_the_time(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """With a clock that goes on by a second whenever it is asked."""
    from types import SimpleNamespace

    from vicuna.train import samples

    seconds = iter(range(1_000_000))
    monkeypatch.setattr(samples, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    run = tmp_path / "r"
    prompts = [f"第{i}题" for i in range(5)]
    train(*words, "--output_dir", str(run), "--sample_steps", "3", "--sample_tokens", "200",
          "--sample_share", "0.01", "--sample_prompts", *prompts)  # fmt: skip
    found = events(run, "sample")
    assert {e["prompt"] for e in found} == set(prompts)
    assert not all(e["whole"] for e in found)
    output = capsys.readouterr().out
    assert "step 3: answering 5 sample prompts" in output
    assert "their time was used up (1% of the time trained; --sample_share" in output
    assert any("used up" in e["message"] for e in events(run, "warning"))
    # Without a limit they come to their end.
    train(*words, "--output_dir", str(tmp_path / "all"), "--sample_steps", "3", "--sample_tokens",
          "20", "--sample_share", "0", "--sample_prompts", *prompts)  # fmt: skip
    assert all(e["whole"] for e in events(tmp_path / "all", "sample"))
    assert same(weights(run), weights(tmp_path / "all"))


def test_commands_to_copy_hold_paths_with_spaces_as_one_word(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "我的 run"
    train(*words, "--max_steps", "1", "--output_dir", str(run))
    train("--resume", str(run))
    said = [x for x in capsys.readouterr().out.splitlines() if "  vicuna " in x]
    assert len(said) == 2
    assert all(str(run) in shlex.split(line) for line in said)
