"""Attention over a pack: computed segment by segment, so that no example can see another.

A dense mask over a whole pack would cost the square of its length and hide the zeros from the
kernels. Here each segment is one call of PyTorch's scaled-dot-product attention: causal over
itself, and over the rows above it in the pack's tree. Registered with transformers under a name of
its own; the layout travels as the keyword `packed` from the decoder's call to here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from vicuna.data.pack import Segment

NAME = "vicuna_packed"


@dataclass
class Layout:
    """The segments of a pack and the masks made for them, shared by all layers of a forward."""

    segments: list[Segment]
    _masks: dict[tuple[int, int, int | None], torch.Tensor] = field(default_factory=dict)

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
    if above == 0 and (window is None or q.shape[2] <= window):
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=gqa
        )
    mask = packed.mask(above, q.shape[2], window, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=gqa)


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


def register() -> None:
    """Make the attention known to transformers; harmless when repeated."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    # The layout says who sees whom: no dense mask is ever built.
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
