"""Attention of one segment in half precision on a CPU: causal, in blocks of rows, both ways.

PyTorch's flash attention for CPUs spends most of its time in bf16 on converting and on small
products. Here a block of query rows is a few batched matrix products, which run at the rate of the
chip's matrix units; the heads that share a head of keys are rows of one product. Of the scores only
those of one block exist at a time, and backward computes them again.

    s = scale q k' + mask      p = softmax(s)      o = p v
    dv += p' do    dp = do v'    ds = p (dp - sum(dp p))    dq = scale ds k    dk += scale ds' q
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Rows of queries at a time: few enough that little is computed above the diagonal, and enough for
# products that are worth starting.
BLOCK = 128

# Some rows and columns -> the summand of the scores in the last columns, 0 or -inf: (t, s').
Mask = Callable[[slice, slice], Tensor]


def blocks(rows: int, above: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """The rows of each block, and the columns that any of them sees.

    Args:
        rows: of the segment. above: columns in front of its own.
        window: how far back a row sees, itself included.
    """
    for start in range(0, rows, BLOCK):
        stop = min(start + BLOCK, rows)
        first = 0 if window is None else max(0, above + start - window + 1)
        yield slice(start, stop), slice(first, above + stop)


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, mask: Mask
) -> Tensor:
    """q (H, T, D), k and v (K, S, D) with S >= T -> (H, T, D). Row i stands at column S - T + i.

    Args:
        window: how far back a row sees, itself included.
    """
    heads, groups = k.shape[0], q.shape[0] // k.shape[0]
    out = torch.empty_like(q)
    for rows, columns in blocks(q.shape[1], k.shape[1] - q.shape[1], window):
        queries = _rows(q, rows, heads).mul_(scale)
        weights = _weights(queries, k[:, columns], mask(rows, columns), groups)
        result = torch.bmm(weights, v[:, columns])
        out[:, rows] = result.view(q.shape[0], -1, q.shape[2])
    return out


def backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, mask: Mask
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q (H, T, D), k and v (K, S, D), given that of the result, g (H, T, D)."""
    heads, groups = k.shape[0], q.shape[0] // k.shape[0]
    dq = torch.empty_like(q)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for rows, columns in blocks(q.shape[1], k.shape[1] - q.shape[1], window):
        queries, given = _rows(q, rows, heads).mul_(scale), _rows(g, rows, heads)
        keys = k[:, columns]
        weights = _weights(queries, keys, mask(rows, columns), groups)
        dv[:, columns].baddbmm_(weights.transpose(1, 2), given)
        dweights = torch.bmm(given, v[:, columns].transpose(1, 2))
        dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
        dk[:, columns].baddbmm_(dscores.transpose(1, 2), queries)
        dqueries = torch.bmm(dscores, keys).mul_(scale)
        dq[:, rows] = dqueries.view(q.shape[0], -1, q.shape[2])
    return dq, dk, dv


def _rows(x: Tensor, rows: slice, heads: int) -> Tensor:
    """A copy of some rows of x (H, T, D), heads that share keys below each other: (K, G t, D)."""
    part = x[:, rows].clone(memory_format=torch.contiguous_format)
    return part.view(heads, -1, x.shape[2])


def _weights(q: Tensor, k: Tensor, mask: Tensor, groups: int) -> Tensor:
    """softmax(q k' + mask): q (K, G t, D), scaled, k (K, s, D) -> (K, G t, s)."""
    scores = torch.bmm(q, k.transpose(1, 2))
    masked = scores.view(k.shape[0], groups, mask.shape[0], -1)[..., -mask.shape[1] :]
    masked.add_(mask)
    return scores.softmax(-1)
