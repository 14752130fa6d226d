"""The two halves of a decoder layer as autograd functions that keep what backward needs, no more.

    attention's inputs   x -> norm -> q, k, v -> (norms of q, k) -> rotary embedding
    output               a, x -> x + o(a)
    mlp                  x -> x + down(silu(gate(norm(x))) * up(norm(x)))

Kept are inputs, q, k, v and the outputs of gate and up; what follows from them by arithmetic on
elements (the normalised input, silu times up) is computed again in backward. Rows are computed in
pieces that stay in the caches of the chip. On two dimensions throughout: rows (T, D), a pack has no
batch dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vicuna.model.decoder_view import Heads
from vicuna.model.elementwise import PLAIN, Kernels
from vicuna.model.linear import Group

# Rows computed at a time in the MLP: its widest temporaries stay in the cache, or small.
PIECE = {"cpu": 512, "cuda": 2048, "mps": 1024, "meta": 2048}


def pieces(x: Tensor, group: Group) -> Iterator[slice]:
    """Slices of the rows of x; all at once where weights must be dequantised for each piece."""
    rows = x.shape[0]
    size = PIECE.get(x.device.type, 2048) if group.whole else max(rows, 1)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


# -- attention's inputs ----------------------------------------------------------------------------


class AttentionInputs:
    """x (T, D) -> q, k and v side by side (T, O), rotated."""

    def __init__(
        self,
        group: Group,
        heads: Heads,
        norm: Tensor,
        eps: float,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        kernels: Kernels = PLAIN,
    ) -> None:
        self.kernels = kernels
        self.group, self.heads, self.norm, self.eps = group, heads, norm, eps
        self.head_norms = (q_norm, k_norm)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, hashes: Tensor | None) -> Tensor:
        """cos, sin: (T, D). hashes: int64 (T,), where there is dropout."""
        result: Tensor = _AttentionInputs.apply(x, self, cos, sin, hashes, *self.group.parameters)
        return result

    def rotated(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Views of q (T, H, D) and k (T, K, D) in the group's output."""
        heads = self.heads
        split = heads.query * heads.size
        stop = split + heads.key * heads.size
        return (
            y[:, :split].unflatten(1, (heads.query, heads.size)),
            y[:, split:stop].unflatten(1, (heads.key, heads.size)),
        )


class _AttentionInputs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        op: AttentionInputs,
        cos: Tensor,
        sin: Tensor,
        hashes: Tensor | None,
        *params: Tensor,  # noqa: ARG004  named so that autograd gives them gradients
    ) -> Tensor:
        k = op.kernels
        rstd = k.rms(x, op.eps)
        h = k.normalised(x, rstd, op.norm)
        y = x.new_empty(x.shape[0], op.group.width)
        call = op.group.call(x.shape[0], h)
        op.group.forward(h, call, slice(None), y, hashes)
        raw: list[Tensor | None] = [None, None]
        for i, (part, weight) in enumerate(zip(op.rotated(y), op.head_norms)):
            if weight is not None:
                raw[i] = before = part.clone()
                part.copy_(k.normalised(before, k.rms(before, op.eps), weight))
            k.rotate(part, cos, sin)
        ctx.op = op
        ctx.save_for_backward(x, rstd, cos, sin, hashes, call.u, *raw)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        op: AttentionInputs = ctx.op
        x, rstd, cos, sin, hashes, u, *raw = ctx.saved_tensors
        # The gradient is attention's own buffer, used by nobody else: it may be changed in place.
        g, k = gradients[0], op.kernels
        for part, kept, weight in zip(op.rotated(g), raw, op.head_norms):
            k.rotate(part, cos, sin, True)
            if weight is not None:
                part.copy_(k.norm_backward(part, kept, k.rms(kept, op.eps), weight))
        h = k.normalised(x, rstd, op.norm)
        sums = _sums(op.group)
        call = op.group.again(u, x.dtype)
        dh = op.group.backward(g, h, call, slice(None), sums, ctx.needs_input_grad[0], hashes)
        dx = None if dh is None else k.norm_backward(dh, x, rstd, op.norm)
        return dx, None, None, None, None, *sums


def _sums(*groups: Group) -> list[Tensor]:
    return [torch.zeros_like(p, dtype=torch.float32) for g in groups for p in g.parameters]


# -- attention's output ----------------------------------------------------------------------------


def attention_output(
    group: Group, attended: Tensor, residual: Tensor, hashes: Tensor | None
) -> Tensor:
    """residual (T, D) + o(attended (T, H D))."""
    result: Tensor = _Output.apply(attended, residual, group, hashes, *group.parameters)
    return result


class _Output(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        group: Group,
        hashes: Tensor | None,
        *params: Tensor,  # noqa: ARG004  named so that autograd gives them gradients
    ) -> Tensor:
        y = x.new_empty(x.shape[0], group.width)
        call = group.call(x.shape[0], x)
        group.forward(x, call, slice(None), y, hashes)
        ctx.group = group
        # Without an adapter only the frozen weight is needed.
        ctx.save_for_backward(x if group.loras else None, call.u, hashes)
        return y.add_(residual)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, u, hashes = ctx.saved_tensors
        g = gradients[0]
        sums = _sums(ctx.group)
        call = ctx.group.again(u, g.dtype)
        dx = ctx.group.backward(g, x, call, slice(None), sums, ctx.needs_input_grad[0], hashes)
        return dx, (g if ctx.needs_input_grad[1] else None), None, None, *sums


# -- the mlp ---------------------------------------------------------------------------------------


class Mlp:
    """x (T, D) -> x + down(silu(gate(h)) * up(h)) with h = norm(x) (SwiGLU, arXiv 2002.05202).

    keep: whether the outputs of gate and up are kept for backward, or computed again there.
    """

    def __init__(
        self, gate_up: Group, down: Group, norm: Tensor, eps: float, kernels: Kernels = PLAIN
    ) -> None:
        self.gate_up, self.down, self.norm, self.eps = gate_up, down, norm, eps
        self.kernels = kernels
        self.keep = True

    def __call__(self, x: Tensor, hashes: Tensor | None) -> Tensor:
        """hashes: int64 (T,), where there is dropout."""
        parameters = [*self.gate_up.parameters, *self.down.parameters]
        result: Tensor = _Mlp.apply(x, self, hashes, torch.is_grad_enabled(), *parameters)
        return result


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        op: Mlp,
        hashes: Tensor | None,
        training: bool,
        *params: Tensor,  # noqa: ARG004  as above
    ) -> Tensor:
        count, inner = x.shape[0], op.gate_up.width // 2
        k = op.kernels
        rstd = k.rms(x, op.eps)
        first, second = op.gate_up.call(count, x), op.down.call(count, x)
        keep = training and op.keep
        kept = x.new_empty(count, 2 * inner) if keep else None
        y = torch.empty_like(x)
        scratch: Tensor | None = None
        for at in pieces(x, op.gate_up):
            h = k.normalised(x[at], rstd[at], op.norm)
            own = None if hashes is None else hashes[at]
            if kept is None and (scratch is None or scratch.shape[0] != h.shape[0]):
                scratch = x.new_empty(h.shape[0], 2 * inner)
            wide = scratch if kept is None else kept[at]
            assert wide is not None
            op.gate_up.forward(h, first, at, wide, own)
            op.down.forward(k.swiglu(wide), second, at, y[at], own)
            y[at] += x[at]
        ctx.op = op
        ctx.save_for_backward(x, rstd, kept, hashes, first.u, second.u)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        op: Mlp = ctx.op
        x, rstd, kept, hashes, *us = ctx.saved_tensors
        first, second = op.gate_up.again(us[0], x.dtype), op.down.again(us[1], x.dtype)
        inner, k = op.gate_up.width // 2, op.kernels
        sums, sums_down = _sums(op.gate_up), _sums(op.down)
        needed = ctx.needs_input_grad[0]
        dx = torch.empty_like(x) if needed else None
        for at in pieces(x, op.gate_up):
            g, rows = gradients[0][at], x[at]
            own = None if hashes is None else hashes[at]
            h = k.normalised(rows, rstd[at], op.norm)
            if kept is None:
                wide = x.new_empty(h.shape[0], 2 * inner)
                op.gate_up.forward(h, first, at, wide, own)
            else:
                wide = kept[at]
            active, soft = k.swiglu_again(wide)
            d = op.down.backward(g, active, second, at, sums_down, True, own)
            assert d is not None
            dwide = k.swiglu_backward(d, wide, soft)
            dh = op.gate_up.backward(dwide, h, first, at, sums, needed, own)
            if dh is not None and dx is not None:
                torch.add(k.norm_backward(dh, rows, rstd[at], op.norm), g, out=dx[at])
        return dx, None, None, None, *sums, *sums_down
