"""Frozen weights of any type as plain matrices: what backward multiplies a gradient with.

A plain linear layer hands its weight out; a quantised one is dequantised into a temporary that the
caller drops as soon as it is used. Layers of other libraries join by `register`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Dense = Callable[[Any, torch.dtype], Tensor]
_KINDS: dict[str, Dense] = {}


def register(kind: str, dense: Dense) -> None:
    """Make the linear layers of a class (by its name) known.

    Args:
        dense: (layer, type) -> its weight (O, D) in that type.
    """
    _KINDS[kind] = dense


def known(layer: nn.Module) -> bool:
    """Whether `dense` can read this layer."""
    return type(layer) is nn.Linear or type(layer).__name__ in _KINDS


def dense(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight (O, D) of a linear layer in the type that it computes in."""
    if type(layer) is nn.Linear:
        return layer.weight
    return _KINDS[type(layer).__name__](layer, dtype)


def _linear4bit(layer: Any, dtype: torch.dtype) -> Tensor:
    """bitsandbytes' nf4 and fp4, whose block scales may be quantised themselves (QLoRA, arXiv
    2305.14314)."""
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight.to(dtype)


def _linear8bit(layer: Any, dtype: torch.dtype) -> Tensor:
    """bitsandbytes' int8 with a scale for each row (LLM.int8(), arXiv 2208.07339)."""
    state = layer.state
    codes = layer.weight.CB if state.CB is None else state.CB
    scales = layer.weight.SCB if state.SCB is None else state.SCB
    return codes.to(dtype).mul_((scales[:, None] / 127.0).to(dtype))


register("Linear4bit", _linear4bit)
register("Linear8bitLt", _linear8bit)
