"""A LoRA linear layer as one autograd function; the parameters stay PEFT's, so adapters stay plain.

With y = x W' + b + s (x A') B' and the gradient g of y:

    u  = x A'        (kept: T x r)
    t  = s g B       (T x r)
    dA = t' x        dB = s g' u        dx = g W + t A

Nothing of the output's size is made besides y and dx themselves, and W is frozen, so its gradient
is never formed. PEFT's own layers build four temporaries of the output's size instead.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        """x: (..., D), weight: (O, D), a: (r, D), b: (O, r), all of x's type but a and b."""
        rows = x.reshape(-1, x.shape[-1])
        low, high = a.to(x.dtype), b.to(x.dtype)
        u = rows @ low.t()
        y = F.linear(rows, weight, bias).addmm_(u, high.t(), alpha=scale)
        ctx.save_for_backward(rows, weight, low, high, u)
        ctx.scale = scale
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, u = ctx.saved_tensors
        g = gradients[0].reshape(-1, gradients[0].shape[-1])
        t = (g @ b).mul_(ctx.scale)
        dx = da = db = None
        if ctx.needs_input_grad[3]:
            da = (t.t() @ rows).float()
        if ctx.needs_input_grad[4]:
            db = (g.t() @ u).float().mul_(ctx.scale)
        if ctx.needs_input_grad[0]:
            dx = (g @ weight).addmm_(t, a).view(*gradients[0].shape[:-1], rows.shape[-1])
        return dx, None, None, da, db, None


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    names = self.active_adapters
    name = names[0] if len(names) == 1 and names[0] in self.lora_A else None
    dropping = self.training and name and not isinstance(self.lora_dropout[name], nn.Identity)
    more = name in self.lora_variant or self.lora_bias.get(name)
    if not name or self.disable_adapters or self.merged or dropping or more or args or kwargs:
        plain: Tensor = type(self).forward(self, x, *args, **kwargs)
        return plain
    base = self.base_layer
    result: Tensor = _LoraLinear.apply(
        x,
        base.weight,
        base.bias,
        self.lora_A[name].weight,
        self.lora_B[name].weight,
        self.scaling[name],
    )
    return result


def install(peft: nn.Module) -> tuple[int, int]:
    """Use the fused function in all LoRA layers over plain linear ones; the others stay PEFT's.

    Returns: how many layers use it, and how many LoRA layers do not.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import Linear

    fused = others = 0
    for module in peft.modules():
        if not isinstance(module, LoraLayer):
            continue
        plain = type(module) is Linear and type(module.base_layer) is nn.Linear
        single = len(module.active_adapters) == 1 and not module.lora_variant
        if plain and single and not module.fan_in_fan_out:
            module.forward = types.MethodType(_forward, module)
            fused += 1
        else:
            others += 1
    return fused, others
