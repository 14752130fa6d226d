"""Attention over a pack on a CPU, segment by segment, both ways.

q, k, v and the result stay in one buffer each, and so do their gradients. In bf16 the products are
our own, in blocks of rows; in the other types each segment is a call of PyTorch's flash attention
for CPUs (FlashAttention-2, arXiv 2307.08691), which in bf16 is the slower one (bench/attention.py).

    s = scale q k' + mask      p = softmax(s)      o = p v
    dv += p' do    dp = do v'    ds = p (dp - sum(dp p))    dq = scale ds k    dk += scale ds' q

A block is a few batched products, which run at the rate of the chip's matrix units; the heads that
share a head of keys are rows of one product. Of the scores only those of one block exist at a time;
backward computes them again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vicuna.data.pack import Segment
from vicuna.model.parts import Heads

if TYPE_CHECKING:
    from vicuna.model.attention import Layout

# Rows of queries at a time: few enough that little is computed above the diagonal, and enough for
# products that are worth starting.
BLOCK = 128
# Blocks and what they see are filled up to whole steps of rows.
STEP = 32


def attend(qkv: Tensor, heads: Heads, layout: Layout) -> Tensor:
    """qkv (T, (H + 2 K) D), the heads of q, k and v side by side, rotated -> (T, H D)."""
    way = BlockSegments if in_blocks(qkv) else FlashSegments
    result: Tensor = way.apply(qkv, heads, layout)
    return result


def in_blocks(qkv: Tensor) -> bool:
    """Whether our own products are the faster way."""
    return qkv.dtype == torch.bfloat16


# -- our own products ------------------------------------------------------------------------------


class BlockSegments(torch.autograd.Function):
    """Each segment in blocks of rows. Nothing but q, k and v is kept for backward."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: Heads, layout: Layout) -> Tensor:
        ctx.heads, ctx.layout = heads, layout
        ctx.save_for_backward(qkv)
        out = qkv.new_empty(qkv.shape[0], heads.query, heads.size)
        q, kv = _sides(qkv, heads)
        result = out.transpose(0, 1)
        for s in layout.segments:
            place = _Place(s)
            seen = place.gather(kv)
            for block in _blocks(s, place, heads.window, layout, qkv):
                k, v = seen[:, block.columns].chunk(2)
                weights = _weights(_rows(q[:, block.own], block, heads, heads.scale), k, block)
                o = torch.bmm(weights, v).view(heads.query, -1, heads.size)
                result[:, block.own] = o[:, : block.count]
        return out.flatten(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (qkv,) = ctx.saved_tensors
        heads, layout = ctx.heads, ctx.layout
        given = gradients[0].unflatten(1, (heads.query, heads.size)).transpose(0, 1)
        dqkv = torch.empty_like(qkv)
        q, kv = _sides(qkv, heads)
        dq, dkv = _sides(dqkv, heads)
        shared = any(s.above for s in layout.segments)
        if shared:
            dkv.zero_()
        for s in layout.segments:
            place = _Place(s)
            seen = place.gather(kv)
            dseen = torch.zeros_like(seen)
            for block in _blocks(s, place, heads.window, layout, qkv):
                k, v = seen[:, block.columns].chunk(2)
                dk, dv = dseen[:, block.columns].chunk(2)
                queries = _rows(q[:, block.own], block, heads, heads.scale)
                g = _rows(given[:, block.own], block, heads)
                weights = _weights(queries, k, block)
                dv.baddbmm_(weights.transpose(1, 2), g)
                dweights = torch.bmm(g, v.transpose(1, 2))
                dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
                dk.baddbmm_(dscores.transpose(1, 2), queries)
                dqueries = torch.bmm(dscores, k).view(heads.query, -1, heads.size)
                torch.mul(dqueries[:, : block.count], heads.scale, out=dq[:, block.own])
            place.give_back(dkv, dseen, shared)
        return dqkv, None, None


def _sides(qkv: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """q (H, T, D), and k and v on top of each other (2 K, T, D), as views of one buffer."""
    split = qkv.unflatten(1, (-1, heads.size)).transpose(0, 1)
    return split[: heads.query], split[heads.query :]


class _Place:
    """Where the rows that a segment sees lie beside each other: those above it, then its own.

    Both parts are filled up to whole steps, so that products come in few shapes: the library makes
    and keeps a program for each.

        | empty | above | own | empty |
          front           start         width
    """

    def __init__(self, s: Segment) -> None:
        self.ranges = [*s.above, (s.start, s.stop)]
        above = sum(b - a for a, b in s.above)
        self.start = _whole(above)
        self.front = self.start - above
        self.width = self.start + _whole(s.stop - s.start)

    def gather(self, kv: Tensor) -> Tensor:
        """k and v of these rows: (2 K, T, D) -> (2 K, width, D)."""
        seen = kv.new_zeros(kv.shape[0], self.width, kv.shape[2])
        for here, there in self._parts():
            seen[:, here] = kv[:, there]
        return seen

    def give_back(self, dkv: Tensor, dseen: Tensor, shared: bool) -> None:
        """Put their gradients where they belong; added, where rows are `shared`."""
        for here, there in self._parts():
            if shared:
                dkv[:, there] += dseen[:, here]
            else:
                dkv[:, there] = dseen[:, here]

    def _parts(self) -> Iterator[tuple[slice, slice]]:
        first = self.front
        for a, b in self.ranges:
            yield slice(first, first + b - a), slice(a, b)
            first += b - a


def _whole(rows: int) -> int:
    return -(-rows // STEP) * STEP


@dataclass(frozen=True)
class _Block:
    """Some rows of a segment.

    own: where they lie in the pack. columns: of the segment's place, those that any of them sees.
    mask: the summand of the scores in the last columns, 0 or -inf: (t, s'), t whole steps.
    front: columns before these that are empty.
    """

    own: slice
    columns: slice
    mask: Tensor
    front: int

    @property
    def count(self) -> int:
        """Rows that are not filled up."""
        return self.own.stop - self.own.start


def _blocks(
    s: Segment, place: _Place, window: int | None, layout: Layout, like: Tensor
) -> Iterator[_Block]:
    rows = s.stop - s.start
    above = place.start - place.front
    for start in range(0, rows, BLOCK):
        stop = min(start + BLOCK, rows)
        own = slice(s.start + start, s.start + stop)
        high = _whole(stop - start)
        if window is None or above + rows <= window:
            columns = slice(0, place.start + start + high)
            mask = layout.additive(0, high, None, like)
            yield _Block(own, columns, mask, place.front)
            continue
        first = max(0, above + start - window + 1)
        columns = slice(place.front + first, place.start + start + high)
        mask = layout.additive(above, place.width - place.start, window, like)
        yield _Block(own, columns, mask[start : start + high, first : above + start + high], 0)


def _rows(x: Tensor, block: _Block, heads: Heads, scale: float = 1.0) -> Tensor:
    """x (H, t, D), scaled, filled up with zeros, heads that share keys below each other:
    (K, G t', D)."""
    part = x.new_zeros(x.shape[0], block.mask.shape[0], x.shape[2])
    torch.mul(x, scale, out=part[:, : block.count])
    return part.view(heads.key, -1, heads.size)


def _weights(q: Tensor, k: Tensor, block: _Block) -> Tensor:
    """softmax(q k' + mask): q (K, G t, D), scaled, k (K, s, D) -> (K, G t, s)."""
    scores = torch.bmm(q, k.transpose(1, 2))
    mask = block.mask
    masked = scores.view(k.shape[0], -1, mask.shape[0], k.shape[1])[..., -mask.shape[1] :]
    masked.add_(mask)
    if block.front:
        scores[..., : block.front] = float("-inf")
    return scores.softmax(-1)


# -- PyTorch's flash attention ---------------------------------------------------------------------


class FlashSegments(torch.autograd.Function):
    """Each segment as one call of the fused kernel, called directly."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: Heads, layout: Layout) -> Tensor:
        rows = qkv.shape[0]
        out = qkv.new_empty(rows, heads.query, heads.size)
        lses = []
        q, k, v = _views(qkv, heads)
        for s in layout.segments:
            mask, causal = _mask_of(s, heads.window, layout, qkv)
            o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q[:, :, s.start : s.stop], _gather(k, s), _gather(v, s), 0.0, causal,
                attn_mask=mask, scale=heads.scale,
            )  # fmt: skip
            out[s.start : s.stop] = o[0].transpose(0, 1)
            lses.append(lse)
        ctx.heads, ctx.layout = heads, layout
        ctx.save_for_backward(qkv, out, *lses)
        return out.flatten(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        qkv, out, *lses = ctx.saved_tensors
        heads, layout = ctx.heads, ctx.layout
        given = gradients[0].unflatten(1, (heads.query, heads.size)).transpose(0, 1)[None]
        result = out.transpose(0, 1)[None]
        shared = any(s.above for s in layout.segments)
        dqkv = torch.zeros_like(qkv) if shared else torch.empty_like(qkv)
        q, k, v = _views(qkv, heads)
        dq, dk, dv = _views(dqkv, heads)
        for s, lse in zip(layout.segments, lses):
            own = slice(s.start, s.stop)
            mask, causal = _mask_of(s, heads.window, layout, qkv)
            gq, gk, gv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                given[:, :, own], q[:, :, own], _gather(k, s), _gather(v, s), result[:, :, own],
                lse, 0.0, causal, attn_mask=mask, scale=heads.scale,
            )  # fmt: skip
            dq[:, :, own] = gq
            for total, part in ((dk, gk), (dv, gv)):
                start = 0
                for a, b in (*s.above, (s.start, s.stop)):
                    piece = part[:, :, start : start + b - a]
                    if shared:
                        total[:, :, a:b] += piece
                    else:
                        total[:, :, a:b] = piece
                    start += b - a
        return dqkv, None, None


def _views(qkv: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """q (1, H, T, D), k and v (1, K, T, D) as views of one buffer."""
    split = qkv.unflatten(1, (-1, heads.size)).transpose(0, 1)[None]
    stop = heads.query + heads.key
    return split[:, : heads.query], split[:, heads.query : stop], split[:, stop:]


def _gather(x: Tensor, s: Segment) -> Tensor:
    """The rows of k or v that a segment sees: those above it, then its own."""
    if not s.above:
        return x[:, :, s.start : s.stop]
    return torch.cat([x[:, :, a:b] for a, b in (*s.above, (s.start, s.stop))], 2)


def _mask_of(
    s: Segment, window: int | None, layout: Layout, like: Tensor
) -> tuple[Tensor | None, bool]:
    """(additive mask, causal) of a segment; the kernel makes the plain triangle by itself."""
    own = s.stop - s.start
    above = sum(b - a for a, b in s.above)
    if above == 0 and (window is None or own <= window):
        return None, True
    return layout.additive(above, own, window, like), False
