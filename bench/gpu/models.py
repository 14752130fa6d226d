"""Llama-2 shapes with random weights, made on the device layer by layer: no download, no host copy.

A layer's weights are drawn in bf16 on the device, quantised there where asked for, and only then
the next layer's are made, so that building needs little more memory than the result. What is timed
and measured does not depend on the weights' values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

STD = 0.02
SHAPES = {"7b": "llama-2-7b", "13b": "llama-2-13b"}
# For trying the script out where there is no GPU.
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 512,
}


def config_of(shape: str, tiny: bool) -> Any:
    """transformers' config of a shape; with `tiny`, a small one that has the same form."""
    from vicuna.memory.model_shapes import config_of as known

    config = known(SHAPES[shape])
    if tiny:
        for key, value in TINY.items():
            setattr(config, key, value)
        config.head_dim = TINY["hidden_size"] // TINY["num_attention_heads"]
    config.use_cache = False
    return config


def build(config: Any, precision: str, device: torch.device, seed: int = 0) -> Any:
    """A frozen causal language model with random weights on a device.

    Args:
        precision: bf16, nf4 (double quantised, computing in bf16) or int8. Embedding, norms and
            head stay bf16, as when bitsandbytes quantises on loading.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not name.endswith("lm_head"):
            _replace(model, name, _linear(module, precision, device, generator))
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                drawn = _drawn(tuple(parameter.shape), device, generator)
                data = drawn if parameter.dim() > 1 else torch.ones_like(drawn)
                setattr(module, key, nn.Parameter(data, requires_grad=False))
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=config).to(device)
    model.is_loaded_in_4bit = precision == "nf4"
    model.is_loaded_in_8bit = precision == "int8"
    model.requires_grad_(False)
    return model.eval()


def _drawn(shape: tuple[int, ...], device: torch.device, generator: torch.Generator) -> Any:
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(
        0.0, STD, generator=generator
    )


def _linear(
    old: nn.Linear, precision: str, device: torch.device, generator: torch.Generator
) -> nn.Module:
    """A linear layer of the same size with random frozen weights (O, I)."""
    weight = _drawn((old.out_features, old.in_features), device, generator)
    if precision == "bf16":
        with torch.device("meta"):
            made = nn.Linear(old.in_features, old.out_features, bias=False)
        made.weight = nn.Parameter(weight, requires_grad=False)
        return made
    import bitsandbytes as bnb

    codes: Any
    if precision == "nf4":
        with torch.device("meta"):
            quantised: Any = bnb.nn.Linear4bit(
                old.in_features, old.out_features, bias=False, compute_dtype=torch.bfloat16,
                compress_statistics=True, quant_type="nf4",
            )  # fmt: skip
        codes = bnb.nn.Params4bit(
            weight, requires_grad=False, compress_statistics=True, quant_type="nf4",
            module=quantised,
        )  # fmt: skip
    else:
        with torch.device("meta"):
            quantised = bnb.nn.Linear8bitLt(
                old.in_features, old.out_features, bias=False, has_fp16_weights=False
            )
        codes = bnb.nn.Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False)
    quantised.weight = codes.to(device)  # moving is what quantises
    return quantised


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)
