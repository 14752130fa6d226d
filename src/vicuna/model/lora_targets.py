"""Which layers an adapter is put on, and which of a model cannot have one.

transformers keeps the experts of a mixture as parameters of all of them together, and the router
beside them; PEFT would train these under names of its own, in adapters that no merge, GGUF file or
engine here reads. A few models have linear layers that return more than a product. Neither gets an
adapter: `all` leaves them out and says so, and who names them is refused before any work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vicuna.errors import UserError
from vicuna.messages import Message
from vicuna.model.linear import is_supported

# Model types whose out_proj PEFT refuses: their fused kernels use its weight alone.
_MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
# Names that linear layers of experts, and routers, had before they were joined.
_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def find(model: Any, wanted: Sequence[str]) -> str | list[str]:
    """What PEFT takes as `target_modules`.

    Args:
        model: a causal language model, or a PEFT model around one.
        wanted: `all`, or names of linear layers.

    Raises: UserError where a layer is named that cannot have an adapter.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    left = left_out(causal)
    if tuple(wanted) == ("all",):
        if not left:
            return "all-linear"
        names = [n for n, m in _linear(causal) if _leaf(n) not in left and not _odd(m)]
        if not names:
            raise UserError("no layer of this model can have an adapter", where="lora_target")
        return names
    refused = sorted({_leaf(name) for name in wanted} & set(left))
    if refused:
        names = sorted({_leaf(n) for n, m in _linear(causal)} - set(left))
        raise UserError(
            "{refused} cannot have an adapter: {left}",
            refused=refused[0],
            left=left[refused[0]],
            names=", ".join(names),
            where="lora_target",
            fix="Use all, or some of: {names}.",
        )
    return list(wanted)


def left_out(causal: Any) -> dict[str, str]:
    """The names of layers that cannot have an adapter, and why."""
    kind = str(getattr(causal.config, "model_type", "?"))
    left: dict[str, str] = dict.fromkeys(
        _joined(causal), Message("it belongs to experts that are computed together")
    )
    for name, module in _linear(causal):
        if _odd(module):
            left[_leaf(name)] = f"{type(module).__name__} is more than a linear layer"
    if kind in _MAMBA:
        left["out_proj"] = f"the kernels of {kind} pass adapters by"
    return left


def words(causal: Any) -> str:
    """What `all` leaves out of a model, in a line; "" where it leaves nothing."""
    there = {_leaf(n) for n, _ in causal.named_modules()}
    reasons = {n: why for n, why in left_out(causal).items() if n in there}
    experts = [n for n, p in causal.named_parameters() if p.dim() == 3 and "expert" in n]
    if not reasons and not experts:
        return ""
    parts = [f"{name} ({why})" for name, why in sorted(reasons.items())]
    parts += ["the experts of its mixtures"] * bool(experts)
    return f"not trained: {', '.join(parts)}"


def _linear(causal: Any) -> list[tuple[str, nn.Module]]:
    """The linear layers but the output matrix, by name."""
    from transformers.pytorch_utils import Conv1D

    head = causal.get_output_embeddings()
    found = []
    for name, module in causal.named_modules():
        linear = isinstance(module, nn.Linear | Conv1D) or is_supported(module)
        # Inside PEFT's layers around them are linear layers that are the adapter's.
        if linear and module is not head and ".lora_" not in name:
            found.append((name.removesuffix(".base_layer"), module))
    return found


@torch.no_grad()
def _odd(module: Any) -> bool:
    """Whether a kind of linear layer gives something else than rows of its width (a router's
    choices; groups): then nothing can be added to it. Asked of zeros."""
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return False
    if is_supported(module):
        return False
    try:
        out = module(module.weight.new_zeros(1, 2, module.in_features))
    except Exception:  # whatever it wants, it is not rows
        return True
    return not (isinstance(out, torch.Tensor) and out.shape == (1, 2, module.out_features))


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _joined(causal: Any) -> set[str]:
    """The names that PEFT takes for parts of joined experts in this kind of model."""
    from peft import LoraConfig

    try:
        from peft.utils.transformers_weight_conversion import (
            convert_peft_config_for_transformers,
            get_model_conversion_mapping,
        )
    except ImportError:  # a PEFT that knows of no such models
        return set()
    config = LoraConfig(target_modules=list(_EXPERTS))
    convert_peft_config_for_transformers(
        config, model=causal, conversions=get_model_conversion_mapping(causal)
    )
    return set(_EXPERTS) - set(config.target_modules or ())
