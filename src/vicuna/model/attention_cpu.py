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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vicuna.data.pack import PackSegment
from vicuna.model.attention_layout import AttentionShape, PackLayout

# Rows of queries at a time: few enough that little is computed above the diagonal, and enough for
# products that are worth starting.
BLOCK = 128
# Blocks and the rows that they see are padded to a multiple of so many rows.
PAD_MULTIPLE = 32


def attend(qkv: Tensor, shape: AttentionShape, layout: PackLayout) -> Tensor:
    """qkv (T, (H + 2 K) D), the heads of q, k and v side by side, rotated -> (T, H D)."""
    way = BlockSegments if in_blocks(qkv) else FlashSegments
    result: Tensor = way.apply(qkv, shape, layout)
    return result


def in_blocks(qkv: Tensor) -> bool:
    """Whether our own products are the faster way."""
    return qkv.dtype == torch.bfloat16


# -- our own products ------------------------------------------------------------------------------


class BlockSegments(torch.autograd.Function):
    """Each segment in blocks of query rows. Nothing but q, k and v is kept for backward."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, shape: AttentionShape, layout: PackLayout) -> Tensor:
        """qkv (T, (H + 2 K) D) -> (T, H D)."""
        ctx.shape, ctx.layout = shape, layout
        ctx.save_for_backward(qkv)
        plan = _plan_of(layout, shape, qkv)
        head_rows = qkv.view(-1, shape.size)
        queries = head_rows.index_select(0, plan.query_rows).mul_(shape.scale)
        result = torch.empty_like(queries)
        scratch = qkv.new_empty(plan.scores)
        for segment in plan.segments:
            for block in segment.blocks:
                q, o = (block.part_of(t, shape) for t in (queries, result))
                k, v = block.keys_and_values(head_rows, shape).chunk(2)
                torch.bmm(_weights(q, k, block, scratch), v, out=o)
        return result.index_select(0, plan.unpermute).view(qkv.shape[0], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """The gradient of qkv (T, (H + 2 K) D), given that of the result (T, H D)."""
        (qkv,) = ctx.saved_tensors
        shape, layout = ctx.shape, ctx.layout
        plan = _plan_of(layout, shape, qkv)
        head_rows = qkv.view(-1, shape.size)
        queries = head_rows.index_select(0, plan.query_rows).mul_(shape.scale)
        grads = gradients[0].reshape(-1, shape.size).index_select(0, plan.result_rows)
        grads.index_fill_(0, plan.padding, 0)
        dqkv, dqueries = torch.empty_like(qkv), torch.empty_like(queries)
        scratch, dscratch = qkv.new_empty(plan.scores), qkv.new_empty(plan.scores)
        split = shape.query * shape.size
        dkv = dqkv[:, split:].unflatten(1, (-1, shape.size)).transpose(0, 1)
        for segment in plan.segments:
            dvisible = qkv.new_zeros(2 * shape.key, segment.width, shape.size)
            for block in segment.blocks:
                q, g, dq = (block.part_of(t, shape) for t in (queries, grads, dqueries))
                kv = block.keys_and_values(head_rows, shape)
                k, v = kv.chunk(2)
                weights = _weights(q, k, block, scratch)
                dweights = torch.bmm(g, v.transpose(1, 2), out=block.scores_of(dscratch, k))
                dkv_block = torch.empty_like(kv)
                torch.bmm(weights.transpose(1, 2), g, out=dkv_block[shape.key :])
                dscores = torch.ops.aten._softmax_backward_data.out(
                    dweights, weights, -1, weights.dtype, grad_input=dweights
                )
                torch.bmm(dscores.transpose(1, 2), q, out=dkv_block[: shape.key])
                torch.bmm(dscores, k, out=dq)
                dvisible[:, block.columns] += dkv_block
            segment.scatter(dkv, dvisible)
        dqueries.mul_(shape.scale)
        dqkv[:, :split] = dqueries.index_select(0, plan.unpermute).view(-1, split)
        return dqkv, None, None


@dataclass(frozen=True)
class _Block:
    """A block of query rows of a segment, padded to a multiple of PAD_MULTIPLE so that oneDNN
    compiles few shapes of products.

    rows: its slice of the buffer of all blocks, head-major. height: query rows, with padding.
    key_rows: int64 (2 K s,), the rows of qkv's heads that are its keys and values, padded too.
    columns: where those lie among the visible rows of the segment. mask: (t, s'), added to the
    attention scores of the last s' columns, 0 or -inf.
    """

    rows: slice
    height: int
    key_rows: Tensor
    columns: slice
    mask: Tensor

    @property
    def width(self) -> int:
        """s: how many rows of keys."""
        return self.columns.stop - self.columns.start

    def part_of(self, x: Tensor, shape: AttentionShape) -> Tensor:
        """Its part of a buffer of all blocks, the G query heads that share a key head below each
        other: (K, G t, D)."""
        return x[self.rows].view(shape.key, -1, shape.size)

    def keys_and_values(self, head_rows: Tensor, shape: AttentionShape) -> Tensor:
        """Its keys, then its values: (2 K, s, D). head_rows: qkv as (T (H + 2 K), D)."""
        return head_rows.index_select(0, self.key_rows).view(-1, self.width, shape.size)

    def scores_of(self, scratch: Tensor, k: Tensor) -> Tensor:
        """Memory for its attention scores: (K, G t, s)."""
        rows = (self.rows.stop - self.rows.start) // k.shape[0]
        return scratch[: k.shape[0] * rows * self.width].view(k.shape[0], rows, self.width)


@dataclass(frozen=True)
class _SegmentPlan:
    """The rows that a segment sees, those above it and then its own, and its blocks.

    ranges: where the visible rows lie in the pack. width: how many they are, with padding.
    """

    ranges: list[tuple[int, int]]
    width: int
    blocks: list[_Block]

    def scatter(self, dkv: Tensor, dvisible: Tensor) -> None:
        """Put the gradients of the visible keys and values (2 K, width, D) where they belong in
        dkv (2 K, T, D). Segments come behind those above them: until then a segment's own rows are
        its alone."""
        first = 0
        for number, (a, b) in enumerate(self.ranges, 1):
            part = dvisible[:, first : first + b - a]
            if number == len(self.ranges):
                dkv[:, a:b] = part
            else:
                dkv[:, a:b] += part
            first += b - a


@dataclass(frozen=True)
class _PackPlan:
    """How the rows of a pack are laid into blocks; the same for all layers with one window.

    query_rows: int64, for each row of the blocks' buffer the row of qkv's heads (T (H + 2 K), D).
    result_rows: the same of the result's heads (T H, D). padding: rows of the buffer that are
    padding. unpermute: int64 (T H,), where each row of the result lies in the buffer. scores:
    numbers in the attention scores of the largest block.
    """

    query_rows: Tensor
    result_rows: Tensor
    padding: Tensor
    unpermute: Tensor
    scores: int
    segments: list[_SegmentPlan]


def _plan_of(layout: PackLayout, shape: AttentionShape, like: Tensor) -> _PackPlan:
    plan: _PackPlan = layout.cached(
        ("blocks", shape.window), lambda: _make_plan(layout.segments, shape, like)
    )
    return plan


def _make_plan(segments: Sequence[PackSegment], shape: AttentionShape, like: Tensor) -> _PackPlan:
    heads = shape.query + 2 * shape.key
    query_heads, key_heads = np.arange(shape.query), np.arange(shape.query, heads)
    masks: dict[Any, Tensor] = {}
    plans, result_rows_of_blocks, padding_of_blocks = [], [], []
    end = 0
    for s in segments:
        ranges = [*s.above, (s.start, s.stop)]
        above = sum(b - a for a, b in s.above)
        rows = np.concatenate([np.arange(a, b) for a, b in ranges])
        # What follows the segment's own rows is padding, which the masks hide.
        rows = np.append(rows, np.full(PAD_MULTIPLE + BLOCK, s.start))
        blocks = []
        for start in range(above, above + s.stop - s.start, BLOCK):
            count = min(BLOCK, above + s.stop - s.start - start)
            height = _padded(count)
            first = 0 if shape.window is None else max(0, start - shape.window + 1)
            columns = slice(first, first + _padded(start + count - first))
            key_rows = rows[columns] * heads + key_heads[:, None]
            buffer_rows = slice(end, end + shape.query * height)
            end = buffer_rows.stop
            mask = _mask(start - first, height, columns.stop - first, shape.window, like, masks)
            blocks.append(_Block(buffer_rows, height, _index(key_rows, like), columns, mask))
            block_rows = rows[start : start + height] * shape.query + query_heads[:, None]
            result_rows_of_blocks.append(block_rows.ravel())
            is_padding = np.broadcast_to(np.arange(height) >= count, (shape.query, height))
            padding_of_blocks.append(is_padding.ravel())
        width = max(block.columns.stop for block in blocks)
        plans.append(_SegmentPlan(ranges, width, blocks))
    result_rows, padding = np.concatenate(result_rows_of_blocks), np.concatenate(padding_of_blocks)
    row, head = np.divmod(result_rows, shape.query)
    unpermute = np.empty(segments[-1].stop * shape.query, np.int64)
    unpermute[result_rows[~padding]] = np.flatnonzero(~padding)
    scores = max(shape.query * b.height * b.width for plan in plans for b in plan.blocks)
    return _PackPlan(
        _index(row * heads + head, like), _index(result_rows, like),
        _index(np.flatnonzero(padding), like), _index(unpermute, like), scores, plans,
    )  # fmt: skip


def _index(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values).ravel()).to(like.device)


def _mask(
    above: int, height: int, width: int, window: int | None, like: Tensor, made: dict[Any, Tensor]
) -> Tensor:
    """Who sees which of the last columns: 0 or -inf (height, columns), where row i has column
    `above + i` of `width`. All columns if a window hides some of the first. Every row sees one,
    those that are padding too: `above` is less than the window, and columns are padded like rows.
    """
    if window is None or above + height <= window:
        window, above, width = None, 0, width - above
    key = (above, height, width)
    if key not in made:
        rows = torch.arange(above, above + height, device=like.device)[:, None]
        columns = torch.arange(width, device=like.device)
        hidden = columns > rows
        if window is not None:
            hidden |= columns <= rows - window
        zeros = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
        made[key] = zeros.masked_fill_(hidden, float("-inf"))
    return made[key]


def _padded(rows: int) -> int:
    return -(-rows // PAD_MULTIPLE) * PAD_MULTIPLE


def _weights(q: Tensor, k: Tensor, block: _Block, scratch: Tensor) -> Tensor:
    """softmax(q k' + mask) in `scratch`: q (K, G t, D), scaled, k (K, s, D) -> (K, G t, s)."""
    scores = torch.bmm(q, k.transpose(1, 2), out=block.scores_of(scratch, k))
    mask = block.mask
    masked = scores.view(k.shape[0], -1, mask.shape[0], k.shape[1])[..., -mask.shape[1] :]
    masked.add_(mask)
    return torch.softmax(scores, -1, out=scores)  # a row is read before it is written


# -- PyTorch's flash attention ---------------------------------------------------------------------


class FlashSegments(torch.autograd.Function):
    """Each segment as one call of the fused kernel, called directly."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, shape: AttentionShape, layout: PackLayout) -> Tensor:
        rows = qkv.shape[0]
        out = qkv.new_empty(rows, shape.query, shape.size)
        lses = []
        q, k, v = _views(qkv, shape)
        for s in layout.segments:
            mask, causal = _mask_of(s, shape.window, layout, qkv)
            o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q[:, :, s.start : s.stop], _gather(k, s), _gather(v, s), 0.0, causal,
                attn_mask=mask, scale=shape.scale,
            )  # fmt: skip
            out[s.start : s.stop] = o[0].transpose(0, 1)
            lses.append(lse)
        ctx.shape, ctx.layout = shape, layout
        ctx.save_for_backward(qkv, out, *lses)
        return out.flatten(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        qkv, out, *lses = ctx.saved_tensors
        shape, layout = ctx.shape, ctx.layout
        grads = gradients[0].unflatten(1, (shape.query, shape.size)).transpose(0, 1)[None]
        result = out.transpose(0, 1)[None]
        shared = any(s.above for s in layout.segments)
        dqkv = torch.zeros_like(qkv) if shared else torch.empty_like(qkv)
        q, k, v = _views(qkv, shape)
        dq, dk, dv = _views(dqkv, shape)
        for s, lse in zip(layout.segments, lses):
            own = slice(s.start, s.stop)
            mask, causal = _mask_of(s, shape.window, layout, qkv)
            gq, gk, gv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grads[:, :, own], q[:, :, own], _gather(k, s), _gather(v, s), result[:, :, own],
                lse, 0.0, causal, attn_mask=mask, scale=shape.scale,
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


def _views(qkv: Tensor, shape: AttentionShape) -> tuple[Tensor, Tensor, Tensor]:
    """q (1, H, T, D), k and v (1, K, T, D) as views of one buffer."""
    split = qkv.unflatten(1, (-1, shape.size)).transpose(0, 1)[None]
    stop = shape.query + shape.key
    return split[:, : shape.query], split[:, shape.query : stop], split[:, stop:]


def _gather(x: Tensor, s: PackSegment) -> Tensor:
    """The rows of k or v that a segment sees: those above it, then its own."""
    if not s.above:
        return x[:, :, s.start : s.stop]
    return torch.cat([x[:, :, a:b] for a, b in (*s.above, (s.start, s.stop))], 2)


def _mask_of(
    s: PackSegment, window: int | None, layout: PackLayout, like: Tensor
) -> tuple[Tensor | None, bool]:
    """(additive mask, causal) of a segment; the kernel makes the plain triangle by itself."""
    own = s.stop - s.start
    above = sum(b - a for a, b in s.above)
    if above == 0 and (window is None or own <= window):
        return None, True
    return layout.additive_mask(above, own, window, like), False
