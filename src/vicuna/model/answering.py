"""A decoder layer for answering: no gradients, nothing kept, as few operations as it takes.

With one row, or a few beams, a layer's time is that of reading its weights and that of starting
operations; so there are few of them. The numbers are those of `blocks`, which training uses.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vicuna.model import products
from vicuna.model.decoder import Layer
from vicuna.model.linear import Group


def apply(group: Group, h: Tensor) -> Tensor:
    """The linear layers of a group, adapters included: h (t, D) -> (t, O)."""
    if group.weight is None:
        out = h.new_empty(h.shape[0], group.width)
        group.forward(h, group.call(h.shape[0], h), slice(None), out)
        return out
    y = products.product(h, group.weight, group.bias)
    low, high = group.adapters(h.dtype)
    if low is not None and high is not None:
        y.addmm_(h @ low.t(), high.t())
    return y


def attention_inputs(layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (t, D) -> q, k and v side by side, rotated (t, O). cos, sin: (t, D of a head)."""
    op = layer.inputs
    k, heads = op.kernels, op.heads
    y = apply(op.group, k.normalised(x, k.rms(x, op.eps), op.norm))
    if op.head_norms == (None, None):
        both = y[:, : (heads.query + heads.key) * heads.size]
        k.rotate(both.unflatten(1, (-1, heads.size)), cos, sin)
        return y
    for part, weight in zip(op.rotated(y), op.head_norms):
        if weight is not None:
            before = part.clone()
            part.copy_(k.normalised(before, k.rms(before, op.eps), weight))
        k.rotate(part, cos, sin)
    return y


def rest(layer: Layer, attended: Tensor, x: Tensor) -> Tensor:
    """What follows attention: its output, and the MLP. attended (t, H D), x (t, D) -> (t, D)."""
    mlp, k = layer.mlp, layer.mlp.kernels
    x = apply(layer.out, attended).add_(x)
    wide = apply(mlp.gate_up, k.normalised(x, k.rms(x, mlp.eps), mlp.norm))
    gate, up = wide.chunk(2, -1)
    return apply(mlp.down, F.silu(gate).mul_(up)).add_(x)
