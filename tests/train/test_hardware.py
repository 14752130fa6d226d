"""What a run takes of the hardware: chosen by a plan where it is left open, kept where it is not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from run_kit import largest_difference, train, weights

from kit import config_of
from vicuna.config import TrainSettings, build
from vicuna.memory import auto_settings, devices
from vicuna.memory.devices import GIB
from vicuna.train.progress import RunConsole

CPU = torch.device("cpu")
# What the libraries take beside the tensors of a step, in a plan.
RUNTIME = devices.cpu(GIB).runtime


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(RunConsole, "say", lambda _, text: lines.append(text))
    monkeypatch.setattr(RunConsole, "warn", lambda _, text: lines.append(f"warning: {text}"))
    return lines


def with_memory(monkeypatch: pytest.MonkeyPatch, nbytes: int, bf16: bool = False) -> None:
    place = devices.cpu(nbytes, bf16)
    monkeypatch.setattr(auto_settings, "at_hand", lambda _: place)


def decide(folder: Path, longest: int = 60, **given: Any) -> auto_settings.Hardware:
    console = RunConsole()
    return auto_settings.plan_hardware(
        build(TrainSettings, given), given, folder, longest, CPU, console.say, console.warn
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a small model, which is all that a plan needs."""
    place = tmp_path_factory.mktemp("config")
    config_of(
        "llama", hidden_size=256, intermediate_size=1024, num_hidden_layers=4
    ).save_pretrained(place)
    return place


def test_where_there_is_room_nothing_changes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    with_memory(monkeypatch, 64 * GIB)
    found = decide(folder)
    assert (found.tokens, found.settings.gradient_checkpointing) == (1024, "none")
    assert found.settings.precision == "auto"
    assert "1,024 tokens at a time" in said[0]
    assert "less than half of the 64.0 GiB" in said[0]


def test_less_is_taken_where_it_is_tight_and_the_reason_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    with_memory(monkeypatch, 64 * GIB)
    from vicuna.memory.auto_settings import choose
    from vicuna.memory.model_shapes import config_of as read

    settings = build(TrainSettings, {"precision": "fp32"})
    need = choose(settings, read(str(folder)), devices.cpu(64 * GIB, False), 60).footprint
    with_memory(monkeypatch, need.peak - need.parts["activations"] // 3)
    found = decide(folder, precision="fp32")
    assert found.tokens < 1024 or found.settings.gradient_checkpointing != "none"
    assert "would need" in said[0]
    kept = decide(folder, precision="fp32", gradient_checkpointing="none", micro_batch_tokens=300)
    assert (kept.tokens, kept.settings.gradient_checkpointing) == (300, "none")


def test_nothing_that_fits_is_warned_of_and_tried(
    folder: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    with_memory(monkeypatch, RUNTIME + (1 << 20))
    found = decide(folder, precision="fp32")
    assert said[0].startswith("warning: memory:")
    assert "does not fit" in said[0]
    assert found.tokens == 60


def test_rows_have_an_upper_bound_on_a_cpu(
    folder: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    place = dataclasses.replace(devices.cpu(64 * GIB, False))
    monkeypatch.setattr(auto_settings, "at_hand", lambda _: place)
    monkeypatch.setattr(auto_settings, "_upper_bound", lambda *_: None)
    found = decide(folder, longest=2000)
    assert found.tokens == 1024
    assert "GiB" in said[0]


def test_manual_leaves_everything_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    with_memory(monkeypatch, 1)
    found = decide(folder, memory="manual")
    assert (found.tokens, found.settings.gradient_checkpointing, said) == (1024, "none", [])


def test_a_plan_that_fails_is_no_reason_not_to_train(
    folder: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    def fails(*_: Any) -> Any:
        raise NotImplementedError("no such operation on meta")

    with_memory(monkeypatch, 1)
    monkeypatch.setattr(auto_settings, "choose", fails)
    assert decide(folder).tokens == 1024
    assert "could not be planned" in said[0]


def test_the_rough_count_is_above_the_plan(folder: Path) -> None:
    from transformers import AutoConfig

    from vicuna.memory.auto_settings import choose

    for config, longest in ((AutoConfig.from_pretrained(folder), 60), (config_of("qwen3"), 2048)):
        settings = build(TrainSettings, {"precision": "fp32"})
        found = choose(settings, config, devices.cpu(64 * GIB, False), longest).footprint
        rough = auto_settings._upper_bound(config, max(1024, longest))
        assert rough is not None
        assert rough > found.allocated


def test_a_run_takes_what_was_chosen_and_resumes_with_it(
    tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = f"--model {tiny} --dataset {data} --batch_size 8 --max_steps 2 --precision fp32".split()
    train(*words, "--output_dir", str(tmp_path / "wide"))
    with_memory(monkeypatch, RUNTIME)
    run = tmp_path / "tight"
    train(*words, "--output_dir", str(run))
    assert largest_difference(weights(run), weights(tmp_path / "wide")) < 1e-5
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["gradient_checkpointing"] in ("full", "offload")
    assert config["resolved"]["micro_batch"]["tokens"] < 100
    assert train("--resume", str(run)) == 0
    again = yaml.safe_load((run / "config.yaml").read_text())
    assert again["resolved"]["micro_batch"] == config["resolved"]["micro_batch"]
    assert again["gradient_checkpointing"] == config["gradient_checkpointing"]
