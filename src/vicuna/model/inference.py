"""A decoder layer for answering: no gradients, nothing kept, as few operations as it takes.

With one row, or a few beams, a layer's time is that of reading its weights and that of starting
operations; so there are few of them. The numbers are those of `blocks`, which training uses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vicuna.model import onednn_linear
from vicuna.model.elementwise import Kernels
from vicuna.model.linear import Group
from vicuna.model.llama import Layer


def apply(group: Group, h: Tensor) -> Tensor:
    """The linear layers of a group, adapters included: h (t, D) -> (t, O)."""
    weight = group.weight if group.packed is None else group.packed
    if weight is None:
        out = h.new_empty(h.shape[0], group.width)
        group.forward(h, group.call(h.shape[0], h), slice(None), out)
        return out
    y = onednn_linear.product(h, weight, group.bias)
    low, high = group.adapters(h.dtype)
    if low is not None and high is not None:
        y.addmm_(h @ low.t(), high.t())
    return y


def normalised(k: Kernels, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The RMS norm of rows x (..., D), scaled."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    return k.normalised(x, k.rms(x, eps), weight)  # rounded where transformers rounds


def signed(sin: Tensor) -> Tensor:
    """sin (t, D) as `rotate` takes it: its first half negated."""
    first, second = sin.chunk(2, -1)
    return torch.cat([-first, second], -1)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """`kernels.rotate`, in three operations: heads (t, H, D) in place; cos, sin: (t, D), from
    `signed`."""
    turned = heads.roll(heads.shape[-1] // 2, -1)
    heads.mul_(cos[:, None]).addcmul_(turned, sin[:, None])


def attention_inputs(layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (t, D) -> q, k and v side by side, rotated (t, O). cos, sin: (t, D of a head), as `rotate`
    takes them."""
    op = layer.inputs
    heads = op.heads
    y = apply(op.group, normalised(op.kernels, x, op.norm, op.eps))
    for part, weight in zip(op.rotated(y), op.head_norms):
        if weight is not None:
            part.copy_(normalised(op.kernels, part, weight, op.eps))
    rotate(y[:, : (heads.query + heads.key) * heads.size].unflatten(1, (-1, heads.size)), cos, sin)
    return y


def rest(layer: Layer, attended: Tensor, x: Tensor) -> Tensor:
    """What follows attention: its output, and the MLP. attended (t, H D), x (t, D) -> (t, D)."""
    mlp = layer.mlp
    x = apply(layer.out, attended).add_(x)
    wide = apply(mlp.gate_up, normalised(mlp.kernels, x, mlp.norm, mlp.eps))
    gate, up = wide.chunk(2, -1)
    return apply(mlp.down, F.silu(gate).mul_(up)).add_(x)
