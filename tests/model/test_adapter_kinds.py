"""Adapters of mlx-lm are read; what is no adapter is named for what it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kit import tiny_model, with_adapter
from vicuna.commands.adapter import inspect
from vicuna.errors import UserError
from vicuna.model.adapter import attach_saved, read_adapter, save

IDS = torch.arange(3, 40)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=IDS).logits
    return result


def plain(folder: Path, **lora: Any) -> torch.Tensor:
    """An adapter of PEFT; the logits it gives."""
    folder.mkdir(parents=True, exist_ok=True)
    peft = with_adapter(tiny_model("llama"), **lora)
    save(peft, folder, {})
    return logits(peft)


def by_mlx(folder: Path, source: Path, scale: float, **changes: Any) -> None:
    """As mlx-lm writes it: A and B transposed, the scale beside them."""
    folder.mkdir()
    weights = {}
    for key, tensor in load_file(source / "adapter_model.safetensors").items():
        key = key.removeprefix("base_model.model.").removesuffix(".weight")
        key = key.replace("lora_A", "lora_a").replace("lora_B", "lora_b")
        weights[key] = tensor.T.contiguous()
    save_file(weights, folder / "adapters.safetensors")
    settings = {"rank": 4, "scale": scale, "dropout": 0.0}
    config = {"model": "x/y", "fine_tune_type": "lora", "num_layers": 4, "train": True}
    text = {**config, "lora_parameters": settings, **changes}
    (folder / "adapter_config.json").write_text(json.dumps(text))


def test_an_adapter_of_mlx_lm(tmp_path: Path) -> None:
    wanted = plain(tmp_path / "peft", alpha=10.0)
    by_mlx(tmp_path / "mlx", tmp_path / "peft", 2.5)
    files = read_adapter(str(tmp_path / "mlx"))
    assert (files.lora.rank, files.lora.alpha, files.base) == (4, 10.0, "x/y")
    assert torch.allclose(logits(attach_saved(tiny_model("llama"), files)), wanted, atol=1e-6)
    assert inspect([str(tmp_path / "mlx")]) == 0


def test_some_layers_and_ranks_of_mlx_lm(tmp_path: Path) -> None:
    plain(tmp_path / "peft", alpha=10.0)
    by_mlx(tmp_path / "mlx", tmp_path / "peft", 2.5)
    path = tmp_path / "mlx" / "adapters.safetensors"
    weights = {k: v for k, v in load_file(path).items() if "layers.1" in k}
    for key in [k for k in weights if "q_proj" in k]:
        weights[key] = (weights[key][:, :2] if "lora_a" in key else weights[key][:2]).contiguous()
    save_file(weights, path)
    files = read_adapter(str(tmp_path / "mlx"))
    model = tiny_model("llama")
    for module, (a, b) in files.pairs().items():
        weight = model.get_submodule(module).weight
        weight.data = weight + 2.5 * b @ a
    assert torch.allclose(
        logits(attach_saved(tiny_model("llama"), files)), logits(model), atol=1e-5
    )


MLX: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"fine_tune_type": "dora"}, "fine_tune_type dora"),
    "full": ({"fine_tune_type": "full"}, "fine_tune_type full"),
    "no scale": ({"lora_parameters": {"rank": 4}}, "no lora_parameters with a scale"),
    "alpha": ({"lora_parameters": {"rank": 4, "scale": 1, "alpha": 16}}, "a scale and an alpha"),
}


@pytest.mark.parametrize("kind", MLX)
def test_what_of_mlx_lm_is_refused(tmp_path: Path, kind: str) -> None:
    changes, said = MLX[kind]
    plain(tmp_path / "peft")
    by_mlx(tmp_path / "mlx", tmp_path / "peft", 2.0, **changes)
    with pytest.raises(UserError, match=said) as found:
        read_adapter(str(tmp_path / "mlx"))
    assert "mlx" in found.value.what
    assert found.value.fix


@pytest.mark.parametrize("key", ["model.layers.0.self_attn.q_proj.m", "model.embed_tokens.lora_a"])
def test_more_than_linear_layers_of_mlx_lm(tmp_path: Path, key: str) -> None:
    plain(tmp_path / "peft")
    by_mlx(tmp_path / "mlx", tmp_path / "peft", 2.0)
    path = tmp_path / "mlx" / "adapters.safetensors"
    save_file({**load_file(path), key: torch.ones(4, 4)}, path)
    with pytest.raises(UserError, match="adapter of mlx-lm is more than a LoRA"):
        read_adapter(str(tmp_path / "mlx"))


# -- what is none ----


def touch(*names: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"x" * 16)
        return folder

    return make


def a_model(folder: Path) -> Path:
    tiny_model("llama").save_pretrained(str(folder))
    return folder


def an_old_model(folder: Path) -> Path:
    a_model(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def a_file(name: str, keys: list[str]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        save_file({k: torch.ones(2, 2) for k in keys}, folder / name)
        return folder / name

    return make


def trainers(folder: Path) -> Path:
    plain(folder / "checkpoint-500")
    (folder / "trainer_state.json").write_text("{}")
    return folder


def lone_config(folder: Path) -> Path:
    plain(folder)
    (folder / "adapter_model.safetensors").unlink()
    return folder


NONE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "whole model": (a_model, r"whole model, not an adapter[\s\S]*--model"),
    "whole model in .bin": (an_old_model, r"whole model, not an adapter[\s\S]*--model"),
    "a trainer's folder": (trainers, "Name a checkpoint in it: checkpoint-500"),
    "config alone": (lone_config, "its weights are not"),
    "LitGPT": (touch("lit_model.pth.lora", "model_config.yaml"), "LitGPT"),
    "npz": (touch("adapters.npz"), "early mlx-lm"),
    "GGUF in a folder": (touch("lora.gguf"), "llama.cpp's"),
    "GGUF": (lambda f: touch("lora.gguf")(f) / "lora.gguf", "llama.cpp's"),
    "Lightning": (touch("epoch=1.ckpt"), "Lightning"),
    "torchtune": (touch("adapter_0.pt"), "torchtune"),
    "diffusers": (touch("pytorch_lora_weights.safetensors"), "diffusers"),
    "DeepSpeed": (touch("global_step10/mp_rank_00_model_states.pt"), "DeepSpeed"),
    "Meta": (touch("consolidated.00.pth", "params.json"), "Meta's layout"),
    "kohya": (a_file("style.safetensors", ["lora_unet_down.lora_down.weight"]), "kohya"),
    "a model's file": (
        a_file("model.safetensors", ["model.embed_tokens.weight"]), "whole model, not an adapter",
    ),
    "the weights themselves": (
        lambda f: plain(f) is not None and f / "adapter_model.safetensors", "an adapter is a folder"
    ),
    "an archive": (lambda f: touch("a.zip")(f) / "a.zip", "archive"),
    "text": (lambda f: touch("a.txt")(f) / "a.txt", "is a file"),
    "a run before its first checkpoint": (
        touch("config.yaml", "checkpoints/x"), "no adapter yet"),
    "empty": (lambda f: f, "no adapter weights in this folder"),
    "nothing": (lambda f: f / "none", "no such adapter"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NONE)
def test_it_is_named_for_what_it_is(tmp_path: Path, kind: str) -> None:
    make, said = NONE[kind]
    with pytest.raises(UserError, match=said) as found:
        read_adapter(str(make(tmp_path)))
    assert found.value.fix


def test_a_checkpoint_of_a_trainer_is_an_adapter(tmp_path: Path) -> None:
    wanted = plain(tmp_path / "checkpoint-500")
    files = read_adapter(str(tmp_path / "checkpoint-500"))
    assert torch.equal(logits(attach_saved(tiny_model("llama"), files)), wanted)
