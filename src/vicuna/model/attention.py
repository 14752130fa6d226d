"""Attention over a pack: computed segment by segment, so that no example can see another.

A dense mask over a whole pack would cost the square of its length and hide the zeros from the
kernels. Each segment is causal over itself, and sees the rows above it in the pack's tree.

`attend` serves our own forward, by what is fastest on the device:

    attention_cpu  on a CPU
    varlen         FlashAttention over sequences laid end to end; for packs that share no prefix
    flex           FlexAttention (arXiv 2412.05496): the pack's tree as a mask by blocks, of which
                   the empty ones are skipped; for packs that share prefixes
    segments       PyTorch's scaled-dot-product attention, one call a segment: what works
                   everywhere, Turing and Volta included

`flex` runs forward on CPUs too, slowly: so the tests compare it there with the others; its
backward, and `varlen`, need a GPU. `varlen` was written against PyTorch 2.13's
`torch.nn.attention.varlen`.

`packed_attention` serves transformers' own forward, registered there under a name of its own; the
layout travels as the keyword `packed` from the decoder's call to here.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vicuna.data.pack import PackSegment
from vicuna.model import attention_cpu
from vicuna.model.attention_layout import AttentionShape, PackLayout

NAME = "vicuna_packed"

Backend = Literal["segments", "varlen", "flex"]


def attend(qkv: Tensor, shape: AttentionShape, layout: PackLayout) -> Tensor:
    """Attention of a layer over a pack.

    Args:
        qkv: (T, (H + 2 K) D), the heads of q, k and v side by side, rotated.

    Returns: (T, H D).
    """
    if qkv.device.type in ("cpu", "meta"):
        return attention_cpu.attend(qkv, shape, layout)
    q, k, v = shape.split(qkv)
    backend = choose_backend(qkv.device, qkv.dtype, layout)
    if backend == "varlen":
        return varlen(q, k, v, shape, layout).flatten(1)
    if backend == "flex":
        return flex(q, k, v, shape, layout).flatten(1)
    return segments(q, k, v, shape, layout).flatten(1)


def choose_backend(device: torch.device, dtype: torch.dtype, layout: PackLayout) -> Backend:
    """The fastest backend that this device has for a pack's layout."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 8:
        return "segments"
    if any(s.above for s in layout.segments):
        return "flex" if _has_triton() else "segments"
    if dtype in (torch.bfloat16, torch.float16) and _has_varlen():
        return "varlen"
    return "flex" if _has_triton() else "segments"


@cache
def _has_triton() -> bool:
    from importlib.util import find_spec

    return find_spec("triton") is not None


@cache
def _has_varlen() -> bool:
    try:
        from torch.nn.attention import varlen
    except ImportError:  # PyTorch before 2.10
        return False
    return hasattr(varlen, "varlen_attn")


# -- one kernel for all segments -------------------------------------------------------------------


def varlen(q: Tensor, k: Tensor, v: Tensor, shape: AttentionShape, layout: PackLayout) -> Tensor:
    """Attention of a pack whose segments stand alone: q (T, H, D), k and v (T, K, D) ->
    (T, H, D)."""
    from torch.nn.attention.varlen import varlen_attn

    starts, longest = layout.boundaries(q.device)
    back = -1 if shape.window is None else shape.window - 1
    result = varlen_attn(
        q, k, v, starts, starts, longest, longest,
        scale=shape.scale, window_size=(back, 0), enable_gqa=shape.query != shape.key,
    )  # fmt: skip
    assert isinstance(result, Tensor)
    return result


def flex(q: Tensor, k: Tensor, v: Tensor, shape: AttentionShape, layout: PackLayout) -> Tensor:
    """Attention of any pack: q (T, H, D), k and v (T, K, D) -> (T, H, D)."""
    mask = layout.cached(("flex", shape.window), lambda: _block_mask(layout, shape, q.device))
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    result: Tensor = _flex(q.device.type)(
        q, k, v, block_mask=mask, scale=shape.scale, enable_gqa=shape.query != shape.key
    )
    return result[0].transpose(0, 1)


@cache
def _flex(device: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if device == "cpu" else torch.compile(flex_attention, dynamic=True)


def _block_mask(layout: PackLayout, shape: AttentionShape, device: torch.device) -> Any:
    """Who sees whom: from each row's segment, its position, and which segments see which."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows = layout.segments[-1].stop
    segment = torch.empty(rows, dtype=torch.int32)
    position = torch.empty(rows, dtype=torch.int32)
    number_at = {s.start: i for i, s in enumerate(layout.segments)}
    sees = torch.eye(len(layout.segments), dtype=torch.bool)
    for i, s in enumerate(layout.segments):
        depth = sum(b - a for a, b in s.above)
        segment[s.start : s.stop] = i
        position[s.start : s.stop] = torch.arange(depth, depth + s.stop - s.start)
        for a, _ in s.above:
            sees[i, number_at[a]] = True
    segment, position, sees = (t.to(device) for t in (segment, position, sees))
    window = shape.window or 1 << 30

    def visible(_: Tensor, __: Tensor, row: Tensor, column: Tensor) -> Tensor:
        back = position[row] - position[column]
        return sees[segment[row], segment[column]] & (back >= 0) & (back < window)

    return create_block_mask(visible, None, None, rows, rows, device=str(device))


# -- one call a segment ----------------------------------------------------------------------------


def segments(q: Tensor, k: Tensor, v: Tensor, shape: AttentionShape, layout: PackLayout) -> Tensor:
    """Attention of any pack on any device: q (T, H, D), k and v (T, K, D) -> (T, H, D)."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    parts = [_segment(q, k, v, s, layout, shape.scale, shape.window, None) for s in layout.segments]
    return torch.cat(parts, dim=2)[0].transpose(0, 1)


def _segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment: PackSegment,
    layout: PackLayout,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention of one segment of a pack: query (1, H, T, D), key and value (1, K, T, D) -> its
    rows (1, H, t, D)."""
    q = query[:, :, segment.start : segment.stop]
    ranges = [*segment.above, (segment.start, segment.stop)]
    if len(ranges) == 1:
        k, v = (t[:, :, segment.start : segment.stop] for t in (key, value))
    else:
        k, v = (torch.cat([t[:, :, a:b] for a, b in ranges], 2) for t in (key, value))
    above = k.shape[2] - q.shape[2]
    if softcap is not None:
        mask = layout.mask(above, q.shape[2], window, q.device)
        return _softcapped(q, k, v, mask, scale, softcap)
    gqa = q.shape[1] != k.shape[1]
    causal = above == 0 and (window is None or q.shape[2] <= window)
    if gqa and not _takes_groups(q, causal):
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        gqa = False
    if causal:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    mask = layout.mask(above, q.shape[2], window, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa)


def _takes_groups(q: Tensor, causal: bool) -> bool:
    """Whether a fused kernel takes fewer heads of keys than of queries; PyTorch's memory-efficient
    one, the only one on Turing and Volta and the only one with masks, does not, and without it the
    attention scores of all pairs of rows would be laid out."""
    if q.device.type == "cuda":
        return causal and torch.cuda.get_device_capability(q.device)[0] >= 8
    return q.device.type != "meta"  # tensors without data stand for such a GPU here


def _softcapped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None, softcap: float
) -> Tensor:
    """Attention with capped scores (Gemma 2, arXiv 2408.00118), which no fused kernel here has."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) * (scale if scale is not None else q.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.float().softmax(-1).to(v.dtype) @ v


# -- transformers' own forward ---------------------------------------------------------------------


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001  the interface's; packs need none
    scaling: float | None = None,
    dropout: float = 0.0,  # noqa: ARG001  attention dropout is not used in fine-tuning adapters
    packed: PackLayout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface for one pack.

    Args:
        query: (1, H, T, D). key, value: (1, K, T, D) with K dividing H.
        packed: the layout of the pack.
        sliding_window: how many tokens back a row sees, if the layer limits it.
        softcap: Gemma 2's cap of the attention scores.

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


def register() -> None:
    """Make `packed_attention` known to transformers; harmless when repeated."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    # The layout says who sees whom: no dense mask is ever built.
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
