"""The loss at supervised positions only, in chunks: full logits never exist.

The vocabulary projection is frozen, so the gradient of the loss with respect to the hidden states
can be computed in the forward pass, chunk by chunk, and nothing but it needs to be kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 512


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
        needs_gradient: bool,
    ) -> Tensor:
        # Apple's GPU has no float64.
        wide = torch.float32 if hidden.device.type == "mps" else torch.float64
        total = torch.zeros((), dtype=wide, device=hidden.device)
        gradient = torch.empty_like(hidden) if needs_gradient else None
        # One buffer for all chunks: a fresh one each time costs the system more than the product.
        buffer = hidden.new_empty(min(chunk, hidden.shape[0]), head.shape[0])
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            target, weight = targets[rows, None], weights[rows]
            raw = torch.mm(hidden[rows], head.t(), out=buffer[: target.shape[0]])
            logits = raw.float()
            if bias is not None:
                logits += bias
            if logit_scale != 1.0:
                logits *= logit_scale
            slope = None
            if softcap is not None:
                logits.div_(softcap).tanh_()
                slope = 1 - logits * logits
                logits.mul_(softcap)
            wanted = logits.gather(1, target)
            highest = logits.amax(-1, keepdim=True)
            probabilities = logits.sub_(highest).exp_()
            sums = probabilities.sum(-1, keepdim=True)
            losses = (highest - wanted + sums.log())[:, 0]
            total += (losses * weight).sum(dtype=wide)
            if gradient is None:
                continue
            probabilities *= weight[:, None] / sums
            probabilities.scatter_add_(1, target, -weight[:, None])
            if slope is not None:
                probabilities *= slope
            if logit_scale != 1.0:
                probabilities *= logit_scale
            if probabilities is not raw:
                raw.copy_(probabilities)
            torch.mm(raw, head, out=gradient[rows])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total.to(torch.float32)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        scale = outputs[0].to(gradient.dtype)
        # Nobody else sees this gradient, and it is used once.
        return (gradient.mul_(scale), *([None] * 8))


def cross_entropy_sum(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk: int = CHUNK,
) -> Tensor:
    """Sum over rows of weight * cross-entropy, without the full logits.

    Args:
        hidden: (N, D), rows that have a target.
        head: (V, D), the frozen vocabulary projection; `bias` (V,) where it has one.
        targets: int64 (N,). weights: float32 (N,).
        softcap: Gemma 2's cap of the logits. logit_scale: Granite's and Cohere's factor.
        chunk: rows whose logits exist at a time.

    Returns: a float32 scalar; divide by the step's supervised tokens for the mean.
    """
    needs_gradient = torch.is_grad_enabled() and hidden.requires_grad
    result: Tensor = _ChunkedCrossEntropy.apply(
        hidden, head, bias, targets, weights, softcap, logit_scale, chunk, needs_gradient
    )
    return result
