"""Attention over a pack: computed segment by segment, so that no example can see another.

A dense mask over a whole pack would cost the square of its length and hide the zeros from the
kernels. Here each segment is one call of PyTorch's scaled-dot-product attention: causal over
itself, and over the rows above it in the pack's tree. Registered with transformers under a name of
its own; the layout travels as the keyword `packed` from the decoder's call to here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vicuna.data.pack import Segment
from vicuna.model import cpu_attention, gpu_attention
from vicuna.model.parts import Heads

NAME = "vicuna_packed"


@dataclass
class Layout:
    """The segments of a pack and the masks made for them, shared by all layers of a forward."""

    segments: list[Segment]
    _masks: dict[tuple[int, int, int | None], torch.Tensor] = field(default_factory=dict)
    _made: dict[tuple[str, int | None], Any] = field(default_factory=dict)
    _additive: dict[tuple[int, int, int | None], torch.Tensor] = field(default_factory=dict)

    def mask(self, above: int, own: int, window: int | None, device: torch.device) -> torch.Tensor:
        """True where row i of a segment may look: bool (own, above + own).

        The rows above come first, in order of position, so column j stands at position j.
        """
        key = (above, own, window)
        if key not in self._masks:
            rows = torch.arange(above, above + own, device=device)[:, None]
            columns = torch.arange(above + own, device=device)[None, :]
            allowed = columns <= rows
            if window is not None:
                allowed &= columns > rows - window
            self._masks[key] = allowed
        return self._masks[key]

    def cached(self, key: tuple[str, int | None], make: Callable[[], Any]) -> Any:
        """What a backend made for this pack; once for all layers."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def boundaries(self, device: torch.device) -> tuple[Tensor, int]:
        """Where segments begin, and the last ends: int32 (n + 1,); the longest one's rows."""
        stops = [s.stop for s in self.segments]
        starts = self.cached(
            ("starts", None), lambda: torch.tensor([0, *stops], dtype=torch.int32, device=device)
        )
        return starts, max(s.stop - s.start for s in self.segments)

    def additive(self, above: int, own: int, window: int | None, like: torch.Tensor) -> Tensor:
        """The same as a summand of the scores, in the type and on the device of `like`."""
        key = (above, own, window)
        if key not in self._additive:
            allowed = self.mask(above, own, window, like.device)
            minus = torch.full((), float("-inf"), dtype=like.dtype, device=like.device)
            self._additive[key] = torch.zeros_like(allowed, dtype=like.dtype).masked_fill_(
                ~allowed, minus
            )
        return self._additive[key]


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001  the interface's; packs need none
    scaling: float | None = None,
    dropout: float = 0.0,  # noqa: ARG001  attention dropout is not used in fine-tuning adapters
    packed: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface for one pack.

    Args:
        query: (1, H, T, D). key, value: (1, K, T, D) with K dividing H.
        packed: where the segments lie.
        sliding_window: how far back a row sees, where the layer limits it.
        softcap: Gemma 2's cap of the scores.

    Returns: (1, T, H, D), and no attention weights.
    """
    assert packed is not None, "the decoder was called without a pack's layout"
    if sliding_window is None:
        sliding_window = getattr(module, "sliding_window", None)
    parts = [
        _segment(query, key, value, s, packed, scaling, sliding_window, softcap)
        for s in packed.segments
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _segment(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segment: Segment,
    packed: Layout,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    q = query[:, :, segment.start : segment.stop]
    ranges = [*segment.above, (segment.start, segment.stop)]
    if len(ranges) == 1:
        k, v = (t[:, :, segment.start : segment.stop] for t in (key, value))
    else:
        k, v = (torch.cat([t[:, :, a:b] for a, b in ranges], 2) for t in (key, value))
    above = k.shape[2] - q.shape[2]
    if softcap is not None:
        return _softcapped(
            q, k, v, packed.mask(above, q.shape[2], window, q.device), scaling, softcap
        )
    gqa = q.shape[1] != k.shape[1]
    causal = above == 0 and (window is None or q.shape[2] <= window)
    if gqa and not _takes_groups(q, causal):
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        gqa = False
    if causal:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=gqa
        )
    mask = packed.mask(above, q.shape[2], window, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=gqa)


def _takes_groups(q: torch.Tensor, causal: bool) -> bool:
    """Whether a fused kernel takes fewer heads of keys than of queries; PyTorch's memory-efficient
    one, the only one on Turing and Volta and the only one with masks, does not, and without it the
    scores of all pairs of rows would be laid out."""
    if q.device.type == "cuda":
        return causal and torch.cuda.get_device_capability(q.device)[0] >= 8
    return q.device.type != "meta"  # tensors without data stand for such a GPU here


def _softcapped(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
    softcap: float,
) -> torch.Tensor:
    """Attention with capped scores (Gemma 2, arXiv 2408.00118), which no fused kernel here has."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) * (scaling if scaling is not None else q.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.float().softmax(-1).to(v.dtype) @ v


# -- attention over q, k and v side by side --------------------------------------------------------


def attend(qkv: Tensor, heads: Heads, layout: Layout) -> Tensor:
    """Attention of a layer over a pack.

    Args:
        qkv: (T, (H + 2 K) D), the heads of q, k and v side by side, rotated.

    Returns: (T, H D).
    """
    if qkv.device.type in ("cpu", "meta"):
        result: Tensor = _CpuSegments.apply(qkv, heads, layout)
        return result
    widths = [heads.query * heads.size, heads.key * heads.size, heads.key * heads.size]
    q, k, v = (part.unflatten(1, (-1, heads.size)) for part in qkv.split(widths, 1))
    backend = gpu_attention.choose(qkv.device, qkv.dtype, layout)
    if backend == "varlen":
        return gpu_attention.varlen(q, k, v, heads, layout).flatten(1)
    if backend == "flex":
        return gpu_attention.flex(q, k, v, heads, layout).flatten(1)
    return segments(q, k, v, heads, layout).flatten(1)


def segments(q: Tensor, k: Tensor, v: Tensor, heads: Heads, layout: Layout) -> Tensor:
    """Segment by segment on any device: q (T, H, D), k and v (T, K, D) -> (T, H, D)."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    parts = [_segment(q, k, v, s, layout, heads.scale, heads.window, None) for s in layout.segments]
    return torch.cat(parts, dim=2)[0].transpose(0, 1)


class _CpuSegments(torch.autograd.Function):
    """Segment by segment: q, k, v and the result stay in one buffer each, and so do their
    gradients. In bf16 by `cpu_attention`, else through PyTorch's flash attention for CPUs
    (FlashAttention-2, arXiv 2307.08691), called directly."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: Heads, layout: Layout) -> Tensor:
        rows = qkv.shape[0]
        out = qkv.new_empty(rows, heads.query, heads.size)
        lses = []
        q, k, v = _views(qkv, heads)
        ours = _in_blocks(qkv)
        for s in layout.segments:
            if ours:
                own = q[0, :, s.start : s.stop]
                o = cpu_attention.forward(
                    own, _gather(k, s)[0], _gather(v, s)[0], heads.scale, heads.window,
                    _masks(s, heads.window, layout, qkv),
                )  # fmt: skip
                out[s.start : s.stop] = o.transpose(0, 1)
                continue
            mask, causal = _mask_of(s, heads.window, layout, qkv)
            o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q[:, :, s.start : s.stop], _gather(k, s), _gather(v, s), 0.0, causal,
                attn_mask=mask, scale=heads.scale,
            )  # fmt: skip
            out[s.start : s.stop] = o[0].transpose(0, 1)
            lses.append(lse)
        ctx.heads, ctx.layout = heads, layout
        ctx.save_for_backward(qkv, *(() if ours else (out, *lses)))
        return out.flatten(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        qkv, *kept = ctx.saved_tensors
        heads, layout = ctx.heads, ctx.layout
        given = gradients[0].unflatten(1, (heads.query, heads.size)).transpose(0, 1)[None]
        shared = any(s.above for s in layout.segments)
        dqkv = torch.zeros_like(qkv) if shared else torch.empty_like(qkv)
        q, k, v = _views(qkv, heads)
        dq, dk, dv = _views(dqkv, heads)
        for number, s in enumerate(layout.segments):
            own = slice(s.start, s.stop)
            gs, qs, ks, vs = given[:, :, own], q[:, :, own], _gather(k, s), _gather(v, s)
            if kept:
                mask, causal = _mask_of(s, heads.window, layout, qkv)
                result = kept[0][own].transpose(0, 1)[None]
                gq, gk, gv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    gs, qs, ks, vs, result, kept[1 + number], 0.0, causal, attn_mask=mask,
                    scale=heads.scale,
                )  # fmt: skip
            else:
                masks = _masks(s, heads.window, layout, qkv)
                parts = cpu_attention.backward(
                    gs[0], qs[0], ks[0], vs[0], heads.scale, heads.window, masks
                )
                gq, gk, gv = (part[None] for part in parts)
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


def _in_blocks(qkv: Tensor) -> bool:
    """Whether `cpu_attention` is the faster way; measured by bench/attention.py."""
    return qkv.dtype == torch.bfloat16 and qkv.device.type == "cpu"


def _masks(
    s: Segment, window: int | None, layout: Layout, like: Tensor
) -> Callable[[slice, slice], Tensor]:
    """The masks of a segment's blocks: a triangle at their end, where no window cuts the rest."""
    own = s.stop - s.start
    above = sum(b - a for a, b in s.above)
    if window is None or above + own <= window:
        return lambda rows, _: layout.additive(0, rows.stop - rows.start, None, like)
    return lambda rows, columns: layout.additive(above, own, window, like)[rows, columns]


def register() -> None:
    """Make the attention known to transformers; harmless when repeated."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    # The layout says who sees whom: no dense mask is ever built.
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
