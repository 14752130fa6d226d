"""The loss at supervised positions only, in chunks: full logits never exist.

The vocabulary projection is frozen, so the gradient of the loss with respect to the hidden states
can be computed in the forward pass, chunk by chunk, and nothing but it needs to be kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vicuna.model.tuning import Tuning


@dataclass(frozen=True)
class _Head:
    """What follows the projection: its bias, Gemma 2's cap, Granite's and Cohere's factor."""

    bias: Tensor | None
    softcap: float | None
    scale: float


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of weighted cross-entropies of `hidden @ head.T + bias`, gradient made on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        softcap: float | None,
        logit_scale: float,
        chunk: int,
        softmax_rows: int,
        needs_gradient: bool,
        room: Tensor | None,
    ) -> Tensor:
        # Apple's GPU has no float64.
        wide = torch.float32 if hidden.device.type == "mps" else torch.float64
        total = torch.zeros((), dtype=wide, device=hidden.device)
        gradient = torch.empty_like(hidden) if needs_gradient else None
        # One buffer for all chunks, and one for all slices of them: a fresh one each time costs the
        # system more than the product.
        count = min(chunk, hidden.shape[0])
        buffer = hidden.new_empty(count, head.shape[0]) if room is None else room[:count]
        after = _Head(bias, softcap, logit_scale)
        size = min(softmax_rows, buffer.shape[0])
        slices = buffer
        if buffer.dtype != torch.float32:
            slices = torch.empty_like(buffer[:size], dtype=torch.float32)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            count = targets[rows].shape[0]
            raw = torch.mm(hidden[rows], head.t(), out=buffer[:count])
            for first in range(0, count, size):
                part = slice(start + first, start + min(first + size, count))
                own = logits = raw[first : first + size]
                if slices is not buffer:
                    logits = slices[: own.shape[0]].copy_(own)
                total += _losses(logits, targets[part, None], weights[part], after, needs_gradient)
                if needs_gradient and logits is not own:
                    own.copy_(logits)
            if gradient is not None:
                torch.mm(raw, head, out=gradient[rows])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total.to(torch.float32)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        scale = outputs[0].to(gradient.dtype)
        # Nobody else sees this gradient, and it is used once.
        return (gradient.mul_(scale), *([None] * 10))


def _losses(logits: Tensor, target: Tensor, weight: Tensor, head: _Head, gradient: bool) -> Tensor:
    """Sum of the weighted losses of some rows, in the widest type that the device has.

    With p = softmax(l):  loss = max l - l_target - log max p

    Args:
        logits: float32 (t, V), what the projection gave; becomes its gradient where that is asked
            for.
        target: int64 (t, 1). weight: float32 (t,).
    """
    if head.bias is not None:
        logits += head.bias
    if head.scale != 1.0:
        logits *= head.scale
    slope = None
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_()
        slope = 1 - logits * logits
        logits.mul_(head.softcap)
    wanted = logits.gather(1, target)
    highest = logits.amax(-1, keepdim=True)
    if logits.device.type == "mps":
        probabilities = logits.copy_(torch.softmax(logits, -1))
    else:  # a row is read before it is written
        probabilities = torch.softmax(logits, -1, out=logits)
    losses = (highest - wanted - probabilities.amax(-1, keepdim=True).log())[:, 0]
    # Apple's GPU has no float64.
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    if gradient:
        probabilities *= weight[:, None]
        probabilities.scatter_add_(1, target, -weight[:, None])
        if slope is not None:
            probabilities *= slope
        if head.scale != 1.0:
            probabilities *= head.scale
    return (losses * weight).sum(dtype=wide)


def cross_entropy_sum(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk: int = 0,
    tuning: Tuning | None = None,
    room: Tensor | None = None,
) -> Tensor:
    """Sum over rows of weight * cross-entropy, without the full logits.

    Args:
        hidden: (N, D), rows that have a target.
        head: (V, D), the frozen vocabulary projection; `bias` (V,) where it has one.
        targets: int64 (N,). weights: float32 (N,).
        softcap: Gemma 2's cap of the logits. logit_scale: Granite's and Cohere's factor.
        chunk: rows whose logits exist at a time; 0: as `tuning` says. tuning: None: of the device
            of `hidden`. room: memory for the logits, at least (chunk, V) or (N, V), of the type of
            `hidden`; it is overwritten.

    Returns: a float32 scalar; divide by the step's supervised tokens for the mean.
    """
    needs_gradient = torch.is_grad_enabled() and hidden.requires_grad
    tuning = tuning or Tuning.of(hidden.device)
    chunk = chunk or tuning.loss_rows
    result: Tensor = _ChunkedCrossEntropy.apply(
        hidden,
        head,
        bias,
        targets,
        weights,
        softcap,
        logit_scale,
        chunk,
        tuning.softmax_rows,
        needs_gradient,
        room,
    )
    return result
