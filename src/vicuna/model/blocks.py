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
import torch.nn.functional as F
from torch import Tensor

from vicuna.model.linear import Group
from vicuna.model.parts import Heads

# Rows computed at a time in the MLP: its widest temporaries stay in the cache, or small.
PIECE = {"cpu": 256, "cuda": 2048, "mps": 1024, "meta": 2048}


def pieces(x: Tensor, group: Group) -> Iterator[slice]:
    """Slices of the rows of x; all at once where weights must be dequantised for each piece."""
    rows = x.shape[0]
    size = PIECE.get(x.device.type, 2048) if group.whole else max(rows, 1)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


# -- root mean square norm (Zhang and Sennrich 2019, arXiv 1910.07467) -----------------------------


def rms(x: Tensor, eps: float) -> Tensor:
    """1 / root mean square of each row: float32 (..., 1)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def normalised(x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """x * rstd * weight, rounded where transformers rounds."""
    if x.dtype == torch.float32:
        return torch.mul(x, rstd).mul_(weight)
    return (x.float() * rstd).to(x.dtype).mul_(weight)


def norm_backward(g: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """The gradient of `normalised` with respect to x, given that of its result; may use g's memory.

    With n = x rstd:  dx = rstd (g w - n mean(g w n))
    """
    if g.dtype != torch.float32:
        return norm_backward(g.float(), x.float(), rstd, weight.float()).to(g.dtype)
    g.mul_(weight)
    inner = (g * x).sum(-1, keepdim=True)
    inner.mul_(rstd * rstd).div_(-x.shape[-1])
    return g.addcmul_(x, inner).mul_(rstd)


# -- rotary embedding (Su et al. 2021, arXiv 2104.09864) -------------------------------------------


def rotate(heads: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> None:
    """Rotate (T, H, D) in place by the angles of its rows; `back` is the transpose.

    cos, sin: (T, D), both halves of a head with angles of their own, as transformers gives them.
    """
    half = heads.shape[-1] // 2
    first, second = heads[..., :half], heads[..., half:]
    cos1, cos2 = cos[:, None, :half], cos[:, None, half:]
    sin1, sin2 = sin[:, None, :half], sin[:, None, half:]
    before = first.clone()
    if back:
        first.mul_(cos1).addcmul_(second, sin2)
        second.mul_(cos2).addcmul_(before, sin1, value=-1)
    else:
        first.mul_(cos1).addcmul_(second, sin1, value=-1)
        second.mul_(cos2).addcmul_(before, sin2)


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
    ) -> None:
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
        rstd = rms(x, op.eps)
        h = normalised(x, rstd, op.norm)
        y = x.new_empty(x.shape[0], op.group.width)
        call = op.group.call(x.shape[0], h)
        op.group.forward(h, call, slice(None), y, hashes)
        raw: list[Tensor | None] = [None, None]
        for i, (part, weight) in enumerate(zip(op.rotated(y), op.head_norms)):
            if weight is not None:
                raw[i] = before = part.clone()
                part.copy_(normalised(before, rms(before, op.eps), weight))
            rotate(part, cos, sin)
        ctx.op = op
        ctx.save_for_backward(x, rstd, cos, sin, hashes, call.u, *raw)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        op: AttentionInputs = ctx.op
        x, rstd, cos, sin, hashes, u, *raw = ctx.saved_tensors
        # The gradient is attention's own buffer, used by nobody else: it may be changed in place.
        g = gradients[0]
        for part, kept, weight in zip(op.rotated(g), raw, op.head_norms):
            rotate(part, cos, sin, back=True)
            if weight is not None:
                part.copy_(norm_backward(part.clone(), kept, rms(kept, op.eps), weight))
        h = normalised(x, rstd, op.norm)
        sums = _sums(op.group)
        call = op.group.again(u, x.dtype)
        dh = op.group.backward(g, h, call, slice(None), sums, ctx.needs_input_grad[0], hashes)
        dx = None if dh is None else norm_backward(dh, x, rstd, op.norm)
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

    def __init__(self, gate_up: Group, down: Group, norm: Tensor, eps: float) -> None:
        self.gate_up, self.down, self.norm, self.eps = gate_up, down, norm, eps
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
        rstd = rms(x, op.eps)
        first, second = op.gate_up.call(count, x), op.down.call(count, x)
        keep = training and op.keep
        kept = x.new_empty(count, 2 * inner) if keep else None
        y = torch.empty_like(x)
        scratch: Tensor | None = None
        for at in pieces(x, op.gate_up):
            h = normalised(x[at], rstd[at], op.norm)
            own = None if hashes is None else hashes[at]
            if kept is None and (scratch is None or scratch.shape[0] != h.shape[0]):
                scratch = x.new_empty(h.shape[0], 2 * inner)
            wide = scratch if kept is None else kept[at]
            assert wide is not None
            op.gate_up.forward(h, first, at, wide, own)
            active = F.silu(wide[:, :inner]).mul_(wide[:, inner:])
            op.down.forward(active, second, at, y[at], own)
            y[at] += x[at]
        ctx.op = op
        ctx.save_for_backward(x, rstd, kept, hashes, first.u, second.u)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        op: Mlp = ctx.op
        x, rstd, kept, hashes, *us = ctx.saved_tensors
        first, second = op.gate_up.again(us[0], x.dtype), op.down.again(us[1], x.dtype)
        inner = op.gate_up.width // 2
        sums, sums_down = _sums(op.gate_up), _sums(op.down)
        needed = ctx.needs_input_grad[0]
        dx = torch.empty_like(x) if needed else None
        for at in pieces(x, op.gate_up):
            g, rows = gradients[0][at], x[at]
            own = None if hashes is None else hashes[at]
            h = normalised(rows, rstd[at], op.norm)
            if kept is None:
                wide = x.new_empty(h.shape[0], 2 * inner)
                op.gate_up.forward(h, first, at, wide, own)
            else:
                wide = kept[at]
            gate, up = wide[:, :inner], wide[:, inner:]
            soft = F.silu(gate)
            d = op.down.backward(g, soft * up, second, at, sums_down, True, own)
            assert d is not None
            dwide = torch.empty_like(wide)
            torch.mul(d, soft, out=dwide[:, inner:])
            d.mul_(up)
            torch.ops.aten.silu_backward.grad_input(d, gate, grad_input=dwide[:, :inner])
            dh = op.gate_up.backward(dwide, h, first, at, sums, needed, own)
            if dh is not None and dx is not None:
                torch.add(norm_backward(dh, rows, rstd[at], op.norm), g, out=dx[at])
        return dx, None, None, None, *sums, *sums_down
