"""A tiny random model of each family: saved, loaded, given an adapter, and one step taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kit import END, FAMILIES, VOCAB, random_examples, tiny_model
from vicuna.data.pack import build_packs
from vicuna.errors import UserError
from vicuna.model import fused_lora
from vicuna.model.adapter import LoraSettings, attach, identify
from vicuna.model.base import locate
from vicuna.model.load import Chosen, context_length, load_base
from vicuna.model.trainable import TrainableModel

CPU = torch.device("cpu")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_loads_and_learns(family: str, precision: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    model = load_base(locate(str(tmp_path)), Chosen(precision, "asked for"), CPU)
    assert not any(p.requires_grad for p in model.parameters())
    assert context_length(model) == 512
    assert identify(tmp_path)["vocab_size"] == VOCAB
    trainable = TrainableModel(attach(model, LoraSettings(rank=2), seed=0), CPU)
    assert fused_lora.install(trainable.model)[1] == 0
    trainable.packed_attention()
    packs = build_packs(random_examples(), END, 200)
    optimiser = torch.optim.AdamW(trainable.parameters.values(), lr=1e-2)
    losses = []
    for _ in range(3):
        losses.append(trainable.backward(packs, sum(p.supervised for p in packs)))
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < losses[0]


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    tiny_model("llama").config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="safetensors"):
        load_base(tmp_path, Chosen("fp32", ""), CPU)


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "camel"}')
    with pytest.raises(UserError, match="transformers cannot load"):
        load_base(tmp_path, Chosen("fp32", ""), CPU)
