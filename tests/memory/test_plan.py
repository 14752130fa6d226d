"""Plans and choices: what fits, what is chosen and why, what else would fit; the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vicuna.commands import plan as command
from vicuna.config import PlanSettings, TrainSettings, parse
from vicuna.config.checkpointing import LEVELS
from vicuna.errors import SettingsError, UserError
from vicuna.memory import devices, model_shapes, plan
from vicuna.memory.auto_settings import choose, most_tokens
from vicuna.memory.devices import GIB
from vicuna.memory.footprint import Footprint, Planner
from vicuna.memory.traced_step import StepSpec, shortened

SHARE = {"none": 4, "selective": 3, "full": 1, "offload": 0.5}
BASE = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "nf4": 4}


class Arithmetic(Planner):
    """Footprints by a formula instead of a trace: the choice's logic, in no time."""

    def footprint(self, job: StepSpec, pack: Any = None) -> Footprint:
        assert pack is None
        parts = {
            "base": int(BASE[job.precision] * GIB),
            "activations": int(SHARE[job.checkpointing] * job.tokens / 1024 * GIB),
            "runtime": 0,
            "margin": 0,
        }
        return Footprint(parts)


def chosen(memory: float, given: tuple[str, ...] = (), **settings: Any) -> Any:
    device = devices.by_memory(int(memory * GIB))
    return choose(
        TrainSettings(**settings), None, device, 512, given, planner=Arithmetic(None, device)
    )


@pytest.mark.parametrize(
    ("memory", "wanted"),
    [
        (40, ("bf16", "none", 4096)),
        (24, ("bf16", "none", 2048)),
        (20, ("bf16", "none", 1024)),
        (19.5, ("bf16", "selective", 1024)),
        (18, ("bf16", "full", 2048)),
        (16.5, ("bf16", "offload", 1024)),
        (16.3, ("bf16", "offload", 512)),
        (12, ("nf4", "none", 2048)),
        (5.5, ("nf4", "full", 1024)),
    ],
)
def test_what_costs_least_is_changed_first(memory: float, wanted: tuple[str, str, int]) -> None:
    choice = chosen(memory)
    assert choice.fits
    assert (choice.precision, choice.gradient_checkpointing, choice.micro_batch_tokens) == wanted
    assert choice.precision in choice.reason
    assert f"{memory:.1f} GiB" in choice.reason


def test_what_the_user_has_set_is_kept() -> None:
    choice = chosen(12, precision="bf16")
    assert (choice.precision, choice.fits) == ("bf16", False)
    assert "does not fit" in choice.reason
    assert chosen(40, micro_batch_tokens=1000).micro_batch_tokens == 1000
    assert chosen(40, micro_batch_tokens=100).micro_batch_tokens == 512, "the longest example"
    fixed = chosen(19.5, given=("gradient_checkpointing",), gradient_checkpointing="none")
    assert (fixed.gradient_checkpointing, fixed.micro_batch_tokens) == ("none", 512)


def test_the_reason_says_what_was_given_up() -> None:
    assert "would need" not in chosen(40).reason
    reason = chosen(12).reason
    assert "precision bf16" in reason
    assert "32.0 GiB" in reason


def test_the_most_tokens_that_fit() -> None:
    planner = Arithmetic(None, devices.by_memory(20 * GIB))
    job = StepSpec("bf16", "none", 0, 64)
    assert most_tokens(planner, job, (4096, 2048, 1024, 512)) == 1024
    assert most_tokens(planner, job, (4096, 2048)) is None


def test_alternatives_are_ranked_and_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "Planner", Arithmetic)
    settings = TrainSettings(precision="bf16", cutoff_len=512, micro_batch_tokens=4096)
    device = devices.by_memory(18 * GIB)
    given = ("gradient_checkpointing",)
    found = plan.make(settings, object(), device, given)
    assert not found.fits
    first, *others = found.alternatives
    assert first.settings == {"micro_batch_tokens": 512}
    assert first.cost == plan.COSTS["tokens"]
    assert [a.settings.get("precision") for a in others] == [None, None, "int8", "nf4"]
    assert all(a.peak <= device.memory for a in found.alternatives)
    fits = plan.make(settings, object(), devices.by_memory(40 * GIB), given)
    assert fits.fits
    assert not fits.alternatives


def test_shorter_examples_or_fewer_layers_where_nothing_else_helps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "Planner", Arithmetic)
    found = plan.make(TrainSettings(cutoff_len=2048), object(), devices.by_memory(int(4.4 * GIB)))
    (only,) = found.alternatives
    assert only.settings["cutoff_len"] == 512
    assert plan.COSTS["cutoff"] in only.cost
    found = plan.make(TrainSettings(), object(), devices.by_memory(3 * GIB))
    assert found.alternatives == []
    assert plan.larger_devices(15 * GIB)[0] in ("RTX 4060 Ti 16GB", "RTX 5080", "RTX 5060 Ti 16GB")


def test_examples_longer_than_the_base_can_see_are_refused() -> None:
    with pytest.raises(UserError, match="context length is 2048"):
        plan.make(
            TrainSettings(cutoff_len=4096), model_shapes.config_of("llama-7b"), devices.cpu(GIB)
        )


def test_a_real_choice_on_a_real_shape() -> None:
    config = shortened(model_shapes.config_of("llama-7b"), 4)
    device = devices.by_memory(3 * GIB)
    choice = choose(TrainSettings(), config, device, 512)
    assert choice.fits
    assert choice.footprint.peak <= device.memory
    planner = Planner(config, device)
    job = StepSpec(choice.precision, choice.gradient_checkpointing, choice.micro_batch_tokens, 512)
    assert planner.footprint(job).peak == choice.footprint.peak
    assert choice.gradient_checkpointing in LEVELS
    if choice.precision == "bf16" and choice.gradient_checkpointing != "none":
        assert not planner.fits(replace(job, checkpointing="none", tokens=4096))


# -- devices and shapes --------------------------------------------------------------------------


def test_devices_however_they_are_written() -> None:
    for name in ("RTX 2080 Ti", "2080ti", "NVIDIA GeForce RTX 2080 Ti", "rtx-2080-ti"):
        assert devices.by_name(name).name == "RTX 2080 Ti"
    assert devices.by_name("A100").memory > 70 * GIB
    assert devices.by_name("a100-40").memory < 40 * GIB
    assert devices.by_name("2080Ti").fastest()[0] == "fp16"
    assert devices.by_name("3090").fastest()[0] == "bf16"
    assert devices.by_name("P40").fastest()[0] == "fp32"
    with pytest.raises(UserError, match="RTX 2080 Ti"):
        devices.by_name("RTX 2080 Ty")
    for name in devices.names():
        assert devices.by_name(name).name == name


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("11GiB", 11 << 30), ("24 GB", 24 * 10**9), ("11264MiB", 11 << 30), ("0.5g", 1 << 29)],
)
def test_amounts_of_memory(text: str, wanted: int) -> None:
    assert devices.parse_memory(text) == wanted


@pytest.mark.parametrize("text", ["11Gx", "", "GiB", "-3GiB", "0GiB"])
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(UserError, match="amount of memory"):
        devices.parse_memory(text)


def test_this_machine() -> None:
    device = devices.at_hand("cpu")
    assert 0 < device.memory < 1 << 50
    assert device.runtime > 0


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-7b", 6.738), ("llama-13b", 13.016), ("llama-30b", 32.529), ("llama-65b", 65.286),
        ("llama-2-70b", 68.977), ("llama-3-8b", 8.030), ("llama-3-70b", 70.554),
        ("llama-3.2-1b", 1.236), ("llama-3.2-3b", 3.213), ("qwen2.5-0.5b", 0.494),
        ("qwen2.5-1.5b", 1.544), ("qwen2.5-3b", 3.086), ("qwen2.5-7b", 7.616),
        ("qwen2.5-14b", 14.770), ("qwen2.5-32b", 32.764), ("qwen2.5-72b", 72.706),
        ("qwen3-0.6b", 0.596), ("qwen3-1.7b", 1.721), ("qwen3-4b", 4.022), ("qwen3-8b", 8.191),
        ("qwen3-14b", 14.768), ("qwen3-32b", 32.762), ("mistral-7b", 7.242), ("yi-6b", 6.061),
        ("yi-34b", 34.389), ("tinyllama-1.1b", 1.100), ("smollm2-135m", 0.1345),
        ("smollm2-360m", 0.3618), ("smollm2-1.7b", 1.711),
    ],
)  # fmt: skip
def test_shapes_have_the_published_number_of_weights(name: str, billions: float) -> None:
    s = model_shapes.known()[name]
    head = s.get("head", s["hidden"] // s["heads"])
    attention = s["hidden"] * head * (2 * s["heads"] + 2 * s["kv"])
    layer = attention + 3 * s["hidden"] * s["inter"]
    embeddings = s["vocab"] * s["hidden"] * (1 if s.get("tied") else 2)
    assert (s["layers"] * layer + embeddings) / 1e9 == pytest.approx(billions, rel=2e-3)
    config = model_shapes.config_of(name)
    assert (config.num_hidden_layers, config.vocab_size) == (s["layers"], s["vocab"])


def test_an_unknown_shape_names_the_nearest() -> None:
    with pytest.raises(UserError, match="llama-3-8b"):
        model_shapes.config_of("llama3-8b")


# -- the command ---------------------------------------------------------------------------------


def test_the_commands_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "smollm2-135m", "--memory", "2GiB", "--cutoff_len", "128", "--json"]
    assert command.run(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True
    assert found["peak_bytes"] == sum(found["parts"].values()) <= 2 << 30
    assert found["settings"]["cutoff_len"] == 128
    assert found["alternatives"] == []
    assert found["tokens_per_step"] == 32 * 128


def test_what_does_not_fit_is_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "smollm2-135m", "--memory", "300MiB", "--cutoff_len", "128"]
    assert command.run(words) == 0
    out = capsys.readouterr().out
    assert "It does not fit" in out
    assert "larger device" in out


def test_device_and_memory_exclude_each_other() -> None:
    settings, _ = parse(PlanSettings, ["--device", "T4", "--memory", "11GiB"])
    with pytest.raises(SettingsError, match="exclude"):
        command.device_of(settings)


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    from vicuna.model import base

    def refuse(model: str, **_: object) -> None:
        raise UserError("the hub cannot be reached", where=model, fix="Give a folder.")

    monkeypatch.setattr(base, "locate", refuse)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"), ("Qwen/Qwen2.5-7B", "qwen2.5-7b"),
        ("huggyllama/llama-7b", "llama-7b"), ("meta-llama/Llama-2-13b-chat-hf", "llama-2-13b"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3-8b"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"), ("Qwen/Qwen3-8B-Base", "qwen3-8b"),
        ("Qwen/Qwen3-4B-Instruct-2507", "qwen3-4b"), ("01-ai/Yi-6B-Chat", "yi-6b"),
        ("mistralai/Mistral-7B-Instruct-v0.1", "mistral-7b"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m"),
    ],
)  # fmt: skip
def test_a_known_shape_stands_in_for_a_hub_id_that_cannot_be_reached(
    unreachable: None, capsys: pytest.CaptureFixture[str], model: str, shape: str
) -> None:
    words = ["--memory", "80GiB", "--precision", "bf16", "--micro_batch_tokens", "64"]
    words += ["--cutoff_len", "64"]
    config, notes = model_shapes.config_and_notes(model)
    assert config.hidden_size == model_shapes.known()[shape]["hidden"]
    assert notes == [f"the hub cannot be reached; planned by the known shape {shape}"]
    if shape == "smollm2-135m":
        assert command.run(["--model", model, *words]) == 0
        assert f"note: {notes[0]}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "model", ["someone/qwen2.5-7b-coder-merge", "Qwen/Qwen2.5-Coder-7B", "a/llama-70", "x/other"]
)
def test_no_shape_stands_in_for_another(unreachable: None, model: str) -> None:
    with pytest.raises(UserError, match="the hub cannot be reached"):
        model_shapes.config_of(model)


def test_a_folder_of_a_shapes_name_is_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "qwen2.5-7b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert not model_shapes.is_known("qwen2.5-7b")
    assert model_shapes.is_known("llama-7b")


def test_the_process_is_what_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU a run is its process: libraries count, on both sides."""
    monkeypatch.setattr(devices, "available_host", lambda: devices.GIB)
    device = devices.at_hand("cpu")
    assert device.runtime == devices.cpu(devices.GIB).runtime > devices.CPU_LIBRARIES
    assert device.memory > devices.GIB + 100 * devices.MIB  # this process's own is there, too
