"""`vicuna quantize`: what is handed to the library and what is made of its result. The library is a
stand-in here; `test_worker.py` has what runs with it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from gguf_kit import tiny_base
from kit import with_adapter
from vicuna.commands.quantize import run
from vicuna.data.templates.registry import builtin_templates
from vicuna.errors import SettingsError, UserError
from vicuna.model.adapter import save
from vicuna.quantize import environment, process

FAKE = Path(__file__).parent / "fake_gptqmodel.py"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantize")
    model = tiny_base(folder / "base", "llama", hidden_size=64, intermediate_size=128)
    (folder / "adapter").mkdir()
    spec = {k: v for k, v in builtin_templates()["alpaca"].items() if k != "about"}
    meta = {"template": {"kind": "literal", "name": "alpaca", **spec}}
    save(with_adapter(model), folder / "adapter", meta)
    return folder


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in in place of the worker and of the environment it needs."""
    monkeypatch.setattr(process.worker, "__file__", str(FAKE))
    monkeypatch.setattr(environment, "_named", lambda _: Path(sys.executable))


def words(shelf: Path, target: Path, *more: str) -> list[str]:
    given = {
        "--model": shelf / "base", "--output_dir": target, "--environment": "there",
        "--verify_tokens": 48, "--num_samples": 3,
    }  # fmt: skip
    return [*(str(w) for pair in given.items() for w in pair), *more]


def test_the_result_stands_alone(shelf: Path, tmp_path: Path, library: None) -> None:
    target = tmp_path / "out"
    more = ("--adapter", str(shelf / "adapter"), "--act_order", "--damp", "0.1")
    assert run("gptq", words(shelf, target, *more)) == 0
    job = json.loads((target / "job.json").read_text())
    assert (job["bits"], job["group_size"], job["act_order"], job["damp"]) == (4, 64, True, 0.1)
    assert len(job["texts"]) == 3
    report = json.loads((target / "report.json").read_text())
    assert report["passed"]
    assert report["verified"]
    assert (report["kind"], report["method"], report["bits"]) == ("4bit", "gptq", 4)
    assert list(report["answers"]) == ["What is the capital of France?"]
    assert isinstance(report["answers"]["What is the capital of France?"], str)
    assert any("group_size 64" in note for note in report["notes"])
    assert not (target / "quant_log.csv").exists()
    assert "### Response" in (target / "chat_template.jinja").read_text()
    assert json.loads((target / "vicuna.json").read_text())["template"]["name"] == "alpaca"
    assert json.loads((target / "generation_config.json").read_text())["eos_token_id"] == [1]
    assert "quantization_config" in json.loads((target / "config.json").read_text())
    assert (target / "tokenizer.json").is_file()


def test_a_result_that_cannot_be_asked_is_kept(
    shelf: Path, tmp_path: Path, library: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise UserError("gptqmodel failed: no such kernel")

    monkeypatch.setattr(process.QuantizedLogits, "answer", fail)
    assert run("gptq", words(shelf, tmp_path / "out")) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["passed"]
    assert any("no such kernel" in note for note in report["notes"])


def test_calibration_is_what_the_model_was_trained_on(
    shelf: Path, tmp_path: Path, library: None
) -> None:
    from vicuna.data.tokenizer import Tokenizer
    from vicuna.model.vocabulary import load_vocabulary

    data = tmp_path / "mine.jsonl"
    data.write_text(json.dumps({"instruction": "你好吗", "output": "我很好。"}, ensure_ascii=False))
    target = tmp_path / "out"
    more = ("--adapter", str(shelf / "adapter"), "--calibration", str(data), "--no-verify")
    run("awq", words(shelf, target, *more))
    (ids,) = json.loads((target / "job.json").read_text())["texts"]
    encoder = Tokenizer(load_vocabulary(shelf / "base"))
    text = encoder.spelled(ids)
    assert text.startswith("Below is an instruction")
    assert text.endswith("### Instruction:\n你好吗\n\n### Response:\n我很好。</s>")


def test_what_awq_takes_without_a_gpu_is_said_beforehand(
    shelf: Path,
    tmp_path: Path,
    library: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import torch

    for method, gpu, told in (("awq", False, True), ("awq", True, False), ("gptq", False, False)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        run(method, words(shelf, tmp_path / f"{method}-{gpu}", "--no-verify"))
        assert ("minutes of one core" in capsys.readouterr().err) is told


def test_gibberish_is_removed(shelf: Path, tmp_path: Path, library: None) -> None:
    target = tmp_path / "out"
    with pytest.raises(UserError, match="differs too much from its source") as e:
        run("gptq", words(shelf, target, "--bits", "2"))
    assert "--keep_failed" in str(e.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="it was kept"):
        run("gptq", words(shelf, target, "--bits", "2", "--keep_failed"))
    assert json.loads((target / "report.json").read_text())["passed"] is False


def test_the_librarys_failure_comes_back_in_words(
    shelf: Path, tmp_path: Path, library: None
) -> None:
    with pytest.raises(UserError, match="gptqmodel failed: ValueError: no kernel for this") as e:
        run("gptq", words(shelf, tmp_path / "out", "--group_size", "16"))
    assert "a line of the library's own" in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_progress_is_told(shelf: Path, tmp_path: Path, library: None) -> None:
    told: list[tuple[int, int]] = []
    job: dict[str, Any] = {
        "model": str(shelf / "base"), "output": str(tmp_path), "method": "gptq", "bits": 8,
        "group_size": 64, "texts": [],
    }  # fmt: skip
    process.quantize(Path(sys.executable), job, lambda done, of: told.append((done, of)))
    assert told == [(0, 2), (1, 2), (2, 2)]


def test_all_mistakes_are_told_at_once(shelf: Path) -> None:
    with pytest.raises(SettingsError) as e:
        run("bnb", ["--bits", "3", "--group_size", "32", "--calibration", "x.jsonl"])
    said = str(e.value)
    for part in (
        "output_dir is missing", "bnb supports 4, 8 bits, not 3", "group_size has no effect",
        "calibration has no effect",
    ):  # fmt: skip
        assert part in said
    with pytest.raises(SettingsError, match="awq supports 4 bits, not 8"):
        run("awq", ["--bits", "8", "--output_dir", "x"])


def test_a_group_that_does_not_divide_the_rows_is_refused(shelf: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"group_size 48 does not divide .*; 64, 32 or -1 do"):
        run("gptq", words(shelf, tmp_path / "out", "--group_size", "48"))


def test_weights_that_are_quantised_are_not_quantised_again(shelf: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(shelf / "base", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="already quantized"):
        run("bnb", ["--model", str(tmp_path / "base"), "--output_dir", str(tmp_path / "out")])


def test_on_one_core_the_library_gets_the_two_workers_it_insists_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vicuna.quantize import process

    monkeypatch.delenv("GPTQMODEL_CPU_WORKERS", raising=False)
    for cores, workers in ((1, "2"), (8, "8")):
        given = set(range(cores))
        monkeypatch.setattr(process.os, "sched_getaffinity", lambda _, g=given: g, raising=False)
        assert process._environment()["GPTQMODEL_CPU_WORKERS"] == workers


def test_an_environment_without_the_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no Python environment here"):
        environment.python_of(str(tmp_path))
    with pytest.raises(UserError, match="gptqmodel is not installed"):
        environment.python_of(sys.executable)


@pytest.mark.parametrize("bits", ["4", "8"])
def test_bitsandbytes(shelf: Path, tmp_path: Path, bits: str) -> None:
    pytest.importorskip("bitsandbytes")
    target = tmp_path / "out"
    more = ["--adapter", str(shelf / "adapter"), "--bits", bits, "--verify_tokens", "48"]
    more += ["--max_kl", "2", "--max_perplexity_ratio", "5"]  # tiny random weights lose much
    assert run("bnb", ["--model", str(shelf / "base"), "--output_dir", str(target), *more]) == 0
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    assert config["load_in_8bit" if bits == "8" else "load_in_4bit"]
    assert json.loads((target / "report.json").read_text())["passed"]
