"""The optimisers and their state on disk. bitsandbytes' 8-bit AdamW runs on a CPU, unpaged."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from run_kit import largest_difference, same, train, weights

from vicuna.config import TrainSettings, build
from vicuna.errors import SettingsError
from vicuna.train import optimizer as optimizers

CPU = torch.device("cpu")
KINDS = ["adamw", "paged_adamw_8bit"]


@pytest.fixture
def paged_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(optimizers, "PAGED_ON", ("cpu", "cuda"))
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")


def make(kind: str) -> tuple[dict[str, torch.nn.Parameter], Any]:
    """One parameter large enough for moments of 8 bits, one that is not."""
    torch.manual_seed(0)
    parameters = {
        "large": torch.nn.Parameter(torch.randn(96, 64)),
        "small": torch.nn.Parameter(torch.randn(8, 8)),
    }
    settings = build(TrainSettings, {"optimizer": kind, "learning_rate": 1e-2})
    return parameters, optimizers.build(settings, parameters, CPU)


def step(parameters: dict[str, torch.nn.Parameter], optimizer: Any, seed: int) -> None:
    torch.manual_seed(seed)
    for p in parameters.values():
        p.grad = torch.randn_like(p)
    optimizer.step()


@pytest.mark.usefixtures("paged_on_cpu")
@pytest.mark.parametrize("kind", KINDS)
def test_the_state_goes_to_disk_and_back_to_the_bit(kind: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    parameters, optimizer = make(kind)
    for seed in range(3):
        step(parameters, optimizer, seed)
    names = list(parameters)
    save_file(optimizers.state_of(optimizer, names), tmp_path / "x.safetensors")
    tensors = load_file(tmp_path / "x.safetensors")
    others, fresh = make(kind)
    for name, p in parameters.items():
        others[name].data.copy_(p.data)
    assert optimizers.load_state(fresh, names, tensors) == []
    for seed in range(3, 6):
        step(parameters, optimizer, seed)
        step(others, fresh, seed)
    assert all(torch.equal(parameters[n], others[n]) for n in names)
    if kind != "adamw":
        assert tensors["state1:large"].dtype is torch.uint8


def test_parameters_without_state_are_named() -> None:
    parameters, optimizer = make("adamw")
    step(parameters, optimizer, 0)
    tensors = optimizers.state_of(optimizer, ["large", "else"])
    assert optimizers.load_state(make("adamw")[1], ["large", "small"], tensors) == ["small"]


def test_what_is_missing_is_said_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tiny: Path, data: Path, tmp_path: Path
) -> None:
    words = f"--model {tiny} --dataset {data} --output_dir {tmp_path / 'r'} --optimizer".split()
    with pytest.raises(SettingsError, match="needs a CUDA GPU, and this is cpu: use adamw"):
        train(*words, "paged_adamw_8bit")
    assert not (tmp_path / "r").exists()
    settings = build(TrainSettings, {"optimizer": "paged_adamw_8bit"})
    monkeypatch.setattr(optimizers, "find_spec", lambda _: None)
    (missing,) = optimizers.mistakes(settings, torch.device("cuda"))
    assert "pip install -e '.[gpu]'" in missing


@pytest.mark.usefixtures("paged_on_cpu")
def test_a_run_with_8_bits_resumes_in_the_same_bits(tiny: Path, data: Path, tmp_path: Path) -> None:
    words = (
        f"--model {tiny} --dataset {data} --batch_size 8 --max_steps 4 --save_steps 2 "
        "--lora_rank 128 --optimizer"
    ).split()
    whole, plain = tmp_path / "whole", tmp_path / "plain"
    train(*words, "paged_adamw_8bit", "--output_dir", str(whole))
    train(*words, "adamw", "--output_dir", str(plain))
    assert 0 < largest_difference(weights(whole), weights(plain)) < 2e-3
    again = Path(shutil.copytree(whole, tmp_path / "again"))
    train("--resume", str(again / "checkpoints/step-000002"))
    assert same(weights(again), weights(whole))
    with pytest.raises(SettingsError, match="optimizer was paged_adamw_8bit"):
        train("--resume", str(again / "checkpoints/step-000002"), "--optimizer", "adamw")
    # A checkpoint of before this setting was there.
    state = plain / "checkpoints/step-000002/state.json"
    noted = json.loads(state.read_text())
    del noted["settings"]["optimizer"]
    state.write_text(json.dumps(noted))
    before = weights(plain)
    train("--resume", str(state.parent))
    assert same(weights(plain), before)
