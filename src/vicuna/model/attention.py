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
from vicuna.model import attention_cpu, attention_gpu
from vicuna.model.decoder_view import Heads

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
        return attention_cpu.attend(qkv, heads, layout)
    widths = [heads.query * heads.size, heads.key * heads.size, heads.key * heads.size]
    q, k, v = (part.unflatten(1, (-1, heads.size)) for part in qkv.split(widths, 1))
    backend = attention_gpu.choose(qkv.device, qkv.dtype, layout)
    if backend == "varlen":
        return attention_gpu.varlen(q, k, v, heads, layout).flatten(1)
    if backend == "flex":
        return attention_gpu.flex(q, k, v, heads, layout).flatten(1)
    return segments(q, k, v, heads, layout).flatten(1)


def segments(q: Tensor, k: Tensor, v: Tensor, heads: Heads, layout: Layout) -> Tensor:
    """Segment by segment on any device: q (T, H, D), k and v (T, K, D) -> (T, H, D)."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    parts = [_segment(q, k, v, s, layout, heads.scale, heads.window, None) for s in layout.segments]
    return torch.cat(parts, dim=2)[0].transpose(0, 1)


def register() -> None:
    """Make the attention known to transformers; harmless when repeated."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    # The layout says who sees whom: no dense mask is ever built.
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
