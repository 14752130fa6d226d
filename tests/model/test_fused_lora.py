"""The fused LoRA layer equals PEFT's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kit import tiny_model, with_adapter
from vicuna.model import fused_lora
from vicuna.model.adapter import LoraSettings, attach


def layer_of(peft: Any) -> Any:
    return peft.get_base_model().model.layers[0].self_attn.q_proj


def run(layer: Any, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.grad.dtype == b.grad.dtype == torch.float32
    return [y.detach(), x.grad, a.grad.clone(), b.grad.clone()]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("shape", [(1, 7, 32), (2, 3, 32), (5, 32), (1, 0, 32)], ids=str)
def test_output_and_gradients_equal_pefts(family: str, rslora: bool, shape: tuple[int]) -> None:
    peft = with_adapter(tiny_model(family), rslora=rslora, alpha=12)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    wanted = run(layer_of(peft), x)
    assert fused_lora.install(peft) == (14, 0)
    for found, right in zip(run(layer_of(peft), x), wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


def test_bf16_weights_give_bf16_outputs_and_fp32_gradients() -> None:
    peft = with_adapter(tiny_model("llama").bfloat16())
    x = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = run(layer_of(peft), x)
    fused_lora.install(peft)
    found = run(layer_of(peft), x)
    assert found[0].dtype == found[1].dtype == torch.bfloat16
    for one, right in zip(found, wanted, strict=True):
        assert (one.float() - right.float()).norm() < 2e-2 * right.float().norm()


def test_a_frozen_input_gets_no_gradient() -> None:
    peft = with_adapter(tiny_model("llama"))
    fused_lora.install(peft)
    x = torch.randn(1, 3, 32)
    layer_of(peft)(x).sum().backward()
    assert x.grad is None
    assert layer_of(peft).lora_A["default"].weight.grad is not None


def test_a_disabled_adapter_is_the_base_alone() -> None:
    model = tiny_model("llama")
    ids = torch.arange(3, 20)[None]
    plain = model(ids).logits
    peft = with_adapter(model)
    fused_lora.install(peft)
    assert not torch.allclose(peft(ids).logits, plain)
    with peft.disable_adapter():
        assert torch.equal(peft(ids).logits, plain)


def test_a_merged_adapter_is_not_added_twice() -> None:
    peft = with_adapter(tiny_model("llama"))
    fused_lora.install(peft)
    ids = torch.arange(3, 20)[None]
    before = peft(ids).logits
    peft.merge_adapter()
    torch.testing.assert_close(peft(ids).logits, before, rtol=1e-4, atol=1e-5)


def test_dropout_is_left_to_peft() -> None:
    peft = attach(tiny_model("llama"), LoraSettings(rank=4, dropout=0.5), seed=0)
    nn.init.normal_(layer_of(peft).lora_B["default"].weight)
    fused_lora.install(peft)
    x = torch.randn(1, 50, 32)
    peft.train()
    assert not torch.equal(layer_of(peft)(x), layer_of(peft)(x))
    peft.eval()
    assert torch.equal(layer_of(peft)(x), layer_of(peft)(x))
