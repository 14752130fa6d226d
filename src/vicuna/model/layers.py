"""The halves of a decoder layer: as autograd functions for training, and plain for inference.

    attention's inputs   x -> norm -> q, k, v -> (norms of q, k) -> rotary embedding
    attention's output   a, x -> x + o(a)
    mlp                  x -> x + down(silu(gate(norm(x))) * up(norm(x)))

Training keeps inputs, q, k, v and the outputs of gate and up; what follows from them elementwise
(the normalised input, silu times up) is computed again in backward. The MLP computes its rows in
chunks that stay in the caches of the chip. Tensors have two dimensions throughout: rows (T, D); a
pack has no batch dimension.

Inference keeps nothing. With one row, or a few beams, a layer's time is that of reading its weights
and of starting operations; so there are few of them. The numbers are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vicuna.model import elementwise
from vicuna.model.attention_layout import AttentionShape
from vicuna.model.linear import LinearGroup


def row_chunks(x: Tensor, group: LinearGroup, chunk: int) -> Iterator[slice]:
    """Slices of the rows of x; all rows at once if weights must be dequantised for each chunk."""
    rows = x.shape[0]
    size = chunk if group.is_joined else max(rows, 1)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def _zero_gradients(*groups: LinearGroup) -> list[Tensor]:
    """float32 zeros of the shapes of A and B of all adapters."""
    return [torch.zeros_like(p, dtype=torch.float32) for g in groups for p in g.parameters]


# -- norms and angles for inference ----------------------------------------------------------------


def infer_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The RMS norm of rows x (..., D), scaled by weight (D,)."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    k = elementwise.active()
    return k.rms_norm(x, k.inverse_rms(x, eps), weight)  # rounded where transformers rounds


def signed_sin(sin: Tensor) -> Tensor:
    """sin (t, D) as `infer_rotate` takes it: its first half negated."""
    first, second = sin.chunk(2, -1)
    return torch.cat([-first, second], -1)


def infer_rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """`elementwise.rotate` in three operations, in place: heads (t, H, D), cos (t, D), sin (t, D)
    from `signed_sin`."""
    turned = heads.roll(heads.shape[-1] // 2, -1)
    heads.mul_(cos[:, None]).addcmul_(turned, sin[:, None])


# -- attention's inputs ----------------------------------------------------------------------------


class AttentionInputs:
    """x (T, D) -> q, k and v side by side (T, O), rotated.

    Args:
        norm: (D,). q_norm, k_norm: (size of a head,), if the family has them.
    """

    def __init__(
        self,
        group: LinearGroup,
        shape: AttentionShape,
        norm: Tensor,
        eps: float,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
    ) -> None:
        self.group, self.shape, self.norm, self.eps = group, shape, norm, eps
        self.head_norms = (q_norm, k_norm)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, hashes: Tensor | None) -> Tensor:
        """Training. cos, sin: (T, size of a head). hashes: int64 (T,), if there is dropout."""
        result: Tensor = _AttentionInputs.apply(x, self, cos, sin, hashes, *self.group.parameters)
        return result

    def infer(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Inference. cos, sin: (T, size of a head), as `infer_rotate` takes them."""
        shape = self.shape
        y = self.group.infer(infer_norm(x, self.norm, self.eps))
        for part, weight in zip(self.rotated(y), self.head_norms):
            if weight is not None:
                part.copy_(infer_norm(part, weight, self.eps))
        turned = y[:, : (shape.query + shape.key) * shape.size].unflatten(1, (-1, shape.size))
        infer_rotate(turned, cos, sin)
        return y

    def rotated(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Views of q (T, H, D) and k (T, K, D) in the group's output."""
        shape = self.shape
        split = shape.query * shape.size
        stop = split + shape.key * shape.size
        return (
            y[:, :split].unflatten(1, (shape.query, shape.size)),
            y[:, split:stop].unflatten(1, (shape.key, shape.size)),
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
        k = elementwise.active()
        rstd = k.inverse_rms(x, op.eps)
        h = k.rms_norm(x, rstd, op.norm)
        y = x.new_empty(x.shape[0], op.group.out_features)
        lora = op.group.begin(x.shape[0], h)
        op.group.forward(h, lora, slice(None), y, hashes)
        before_norm: list[Tensor | None] = [None, None]
        for i, (part, weight) in enumerate(zip(op.rotated(y), op.head_norms)):
            if weight is not None:
                before_norm[i] = before = part.clone()
                part.copy_(k.rms_norm(before, k.inverse_rms(before, op.eps), weight))
            k.rotate(part, cos, sin)
        ctx.op = op
        ctx.save_for_backward(x, rstd, cos, sin, hashes, lora.xa, *before_norm)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        op: AttentionInputs = ctx.op
        x, rstd, cos, sin, hashes, xa, *before_norm = ctx.saved_tensors
        # The gradient is attention's own buffer, used by nobody else: it may be changed in place.
        g, k = gradients[0], elementwise.active()
        for part, before, weight in zip(op.rotated(g), before_norm, op.head_norms):
            k.rotate(part, cos, sin, True)
            if weight is not None:
                rstd_before = k.inverse_rms(before, op.eps)
                part.copy_(k.rms_norm_backward(part, before, rstd_before, weight))
        h = k.rms_norm(x, rstd, op.norm)
        sums = _zero_gradients(op.group)
        lora = op.group.resume(xa, x.dtype)
        dh = op.group.backward(g, h, lora, slice(None), sums, ctx.needs_input_grad[0], hashes)
        dx = None if dh is None else k.rms_norm_backward(dh, x, rstd, op.norm)
        return dx, None, None, None, None, *sums


# -- attention's output ----------------------------------------------------------------------------


def attention_output(
    group: LinearGroup, attended: Tensor, residual: Tensor, hashes: Tensor | None
) -> Tensor:
    """residual (T, D) + o(attended (T, H D)). hashes: int64 (T,), if there is dropout."""
    result: Tensor = _Output.apply(attended, residual, group, hashes, *group.parameters)
    return result


class _Output(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        group: LinearGroup,
        hashes: Tensor | None,
        *params: Tensor,  # noqa: ARG004  named so that autograd gives them gradients
    ) -> Tensor:
        y = x.new_empty(x.shape[0], group.out_features)
        lora = group.begin(x.shape[0], x)
        group.forward(x, lora, slice(None), y, hashes)
        ctx.group = group
        # Without an adapter only the frozen weight is needed.
        ctx.save_for_backward(x if group.loras else None, lora.xa, hashes)
        return y.add_(residual)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, xa, hashes = ctx.saved_tensors
        g = gradients[0]
        sums = _zero_gradients(ctx.group)
        lora = ctx.group.resume(xa, g.dtype)
        dx = ctx.group.backward(g, x, lora, slice(None), sums, ctx.needs_input_grad[0], hashes)
        return dx, (g if ctx.needs_input_grad[1] else None), None, None, *sums


# -- the mlp ---------------------------------------------------------------------------------------


class Mlp:
    """x (T, D) -> x + down(silu(gate(h)) * up(h)) with h = norm(x) (SwiGLU, arXiv 2002.05202).

    rows: computed at a time in training. keep: whether the outputs of gate and up are kept for
    backward, or computed again there.
    """

    def __init__(
        self, gate_up: LinearGroup, down: LinearGroup, norm: Tensor, eps: float, rows: int
    ) -> None:
        self.gate_up, self.down, self.norm, self.eps = gate_up, down, norm, eps
        self.rows = rows
        self.keep = True

    def __call__(self, x: Tensor, hashes: Tensor | None) -> Tensor:
        """Training. hashes: int64 (T,), if there is dropout."""
        parameters = [*self.gate_up.parameters, *self.down.parameters]
        result: Tensor = _Mlp.apply(x, self, hashes, torch.is_grad_enabled(), *parameters)
        return result

    def infer(self, x: Tensor) -> Tensor:
        """Inference."""
        gate, up = self.gate_up.infer(infer_norm(x, self.norm, self.eps)).chunk(2, -1)
        return self.down.infer(F.silu(gate).mul_(up)).add_(x)


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
        count, width = x.shape[0], op.gate_up.out_features
        k = elementwise.active()
        rstd = k.inverse_rms(x, op.eps)
        lora_gate_up, lora_down = op.gate_up.begin(count, x), op.down.begin(count, x)
        kept = x.new_empty(count, width) if training and op.keep else None
        y = torch.empty_like(x)
        scratch: Tensor | None = None
        for rows in row_chunks(x, op.gate_up, op.rows):
            h = k.rms_norm(x[rows], rstd[rows], op.norm)
            chunk_hashes = None if hashes is None else hashes[rows]
            if kept is None and (scratch is None or scratch.shape[0] != h.shape[0]):
                scratch = x.new_empty(h.shape[0], width)
            gate_up = scratch if kept is None else kept[rows]
            assert gate_up is not None
            op.gate_up.forward(h, lora_gate_up, rows, gate_up, chunk_hashes)
            op.down.forward(k.swiglu(gate_up), lora_down, rows, y[rows], chunk_hashes)
            y[rows] += x[rows]
        ctx.op = op
        ctx.save_for_backward(x, rstd, kept, hashes, lora_gate_up.xa, lora_down.xa)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        op: Mlp = ctx.op
        x, rstd, kept, hashes, xa_gate_up, xa_down = ctx.saved_tensors
        lora_gate_up = op.gate_up.resume(xa_gate_up, x.dtype)
        lora_down = op.down.resume(xa_down, x.dtype)
        k = elementwise.active()
        sums, sums_down = _zero_gradients(op.gate_up), _zero_gradients(op.down)
        needs_input = ctx.needs_input_grad[0]
        dx = torch.empty_like(x) if needs_input else None
        for rows in row_chunks(x, op.gate_up, op.rows):
            g, x_rows = gradients[0][rows], x[rows]
            chunk_hashes = None if hashes is None else hashes[rows]
            h = k.rms_norm(x_rows, rstd[rows], op.norm)
            if kept is None:
                gate_up = x.new_empty(h.shape[0], op.gate_up.out_features)
                op.gate_up.forward(h, lora_gate_up, rows, gate_up, chunk_hashes)
            else:
                gate_up = kept[rows]
            active, silu = k.recompute_swiglu(gate_up)
            d = op.down.backward(g, active, lora_down, rows, sums_down, True, chunk_hashes)
            assert d is not None
            dgate_up = k.swiglu_backward(d, gate_up, silu)
            dh = op.gate_up.backward(
                dgate_up, h, lora_gate_up, rows, sums, needs_input, chunk_hashes
            )
            if dh is not None and dx is not None:
                torch.add(k.rms_norm_backward(dh, x_rows, rstd[rows], op.norm), g, out=dx[rows])
        return dx, None, None, None, *sums, *sums_down


# -- the last norm ---------------------------------------------------------------------------------


def final_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The RMS norm of x (T, D), with its gradient."""
    result: Tensor = _Norm.apply(x, weight, eps)
    return result


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        k = elementwise.active()
        rstd = k.inverse_rms(x, eps)
        ctx.save_for_backward(x, rstd, weight)
        return k.rms_norm(x, rstd, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, rstd, weight = ctx.saved_tensors
        k = elementwise.active()
        return k.rms_norm_backward(gradients[0], x, rstd, weight), None, None
