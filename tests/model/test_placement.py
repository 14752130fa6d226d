"""Where a base is put: what a setting means, and what is refused. GPUs are played by a stand-in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from generate_kit import tiny_llama

from vicuna.errors import UserError
from vicuna.generate.engines.torch import TorchEngine
from vicuna.model import device_map, load


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs of 10 and 20 GB free."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    free = {0: 10**10, 1: 2 * 10**10}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d: (free[d.index], 0))


@pytest.mark.parametrize("wanted", ["cuda:0,cpu", "cpu,cpu", "meta", "disk", "", "gpu0", "cpu:x"])
def test_what_is_no_list_of_devices_is_refused(wanted: str) -> None:
    with pytest.raises(UserError, match="no list of devices") as e:
        device_map.devices(wanted)
    assert "cuda:0,cuda:1" in str(e.value.fix)


def test_names_of_devices(gpus: None) -> None:
    assert device_map.devices("cpu") == [torch.device("cpu")]
    assert device_map.devices("cuda:1") == [torch.device("cuda:1")]
    both = [torch.device("cuda:0"), torch.device("cuda:1")]
    assert device_map.devices("cuda:0, cuda:1") == both
    assert device_map.devices("auto") == both
    with pytest.raises(UserError, match="no cuda:2: PyTorch sees 2 GPUs"):
        device_map.devices("cuda:0,cuda:2")
    with pytest.raises(UserError, match="twice"):
        device_map.devices("cuda:1,cuda:1")


def test_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_map.devices("auto") == [load.pick_device()]
    with pytest.raises(UserError, match="no cuda:0: PyTorch sees 0 GPUs"):
        device_map.devices("cuda:0")


def test_room_is_left_beside_the_weights(gpus: None) -> None:
    told = device_map.spread(device_map.devices("auto"), fill=True)
    assert told["device_map"] == "sequential"
    assert told["max_memory"][0] == 0.85 * 10**10
    assert told["max_memory"][1] == 1.7 * 10**10
    assert device_map.spread(device_map.devices("auto"), fill=False)["device_map"] == "balanced"


def test_a_part_that_found_no_room_is_refused() -> None:
    """accelerate leaves a part for the host or the disk without data, as meta tensors."""
    model = tiny_llama(50)
    cpu = torch.device("cpu")
    device_map.check(model, [cpu])
    with pytest.raises(UserError, match=r"fit cuda:0, cuda:1: from model\.embed_tokens") as e:
        device_map.check(model, [torch.device("cuda:0"), torch.device("cuda:1")])
    assert "nf4" in str(e.value.fix)
    model.model.layers[1].to("meta")
    with pytest.raises(UserError, match=r"from model\.layers\.1\."):
        device_map.check(model, [cpu])


def test_a_map_of_modules_loads_and_answers_alike(tmp_path: Path) -> None:
    """The way through accelerate, as far as a machine without GPUs has one."""
    model = tiny_llama(50)
    model.save_pretrained(tmp_path)
    chosen, cpu = load.Chosen("fp32", ""), torch.device("cpu")
    told: dict[str, Any] = {"device_map": "sequential", "max_memory": {"cpu": 1 << 40}}
    spread = load.load_base(tmp_path, chosen, cpu, told)
    device_map.check(spread, [cpu])
    one = TorchEngine(load.load_base(tmp_path, chosen, cpu), 64)
    many = TorchEngine(spread, 64, alone=True)
    prompt = [3, 1, 4, 1, 5]
    assert torch.allclose(one.prefill(prompt), many.prefill(prompt), atol=1e-5)
    assert torch.allclose(one.step([9, 2], [0, 0]), many.step([9, 2], [0, 0]), atol=1e-5)
