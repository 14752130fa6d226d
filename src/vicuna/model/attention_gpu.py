"""Attention over a pack on GPUs, in one kernel for all its segments.

    varlen    FlashAttention over sequences laid end to end; for packs that share no prefix
    flex      FlexAttention (arXiv 2412.05496): the pack's tree as a mask by blocks, of which the
              empty ones are skipped; for packs that share prefixes
    segments  one call a segment: what works everywhere, Turing and Volta included

Which one is `choose`'s to say. `flex` runs forward on CPUs too, slowly: so the tests compare it
there with the others; its backward, and `varlen`, need a GPU. `varlen` was written against
PyTorch 2.13's `torch.nn.attention.varlen`.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vicuna.model.decoder_view import Heads

if TYPE_CHECKING:
    from vicuna.model.attention import Layout

Backend = Literal["segments", "varlen", "flex"]


def choose(device: torch.device, dtype: torch.dtype, layout: Layout) -> Backend:
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


def varlen(q: Tensor, k: Tensor, v: Tensor, heads: Heads, layout: Layout) -> Tensor:
    """q (T, H, D), k and v (T, K, D) of a pack whose segments stand alone: (T, H, D)."""
    from torch.nn.attention.varlen import varlen_attn

    starts, longest = layout.boundaries(q.device)
    back = -1 if heads.window is None else heads.window - 1
    result = varlen_attn(
        q, k, v, starts, starts, longest, longest,
        scale=heads.scale, window_size=(back, 0), enable_gqa=heads.query != heads.key,
    )  # fmt: skip
    assert isinstance(result, Tensor)
    return result


def flex(q: Tensor, k: Tensor, v: Tensor, heads: Heads, layout: Layout) -> Tensor:
    """q (T, H, D), k and v (T, K, D) of any pack: (T, H, D)."""
    mask = layout.cached(("flex", heads.window), lambda: _block_mask(layout, heads, q.device))
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    result: Tensor = _flex(q.device.type)(
        q, k, v, block_mask=mask, scale=heads.scale, enable_gqa=heads.query != heads.key
    )
    return result[0].transpose(0, 1)


@cache
def _flex(device: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if device == "cpu" else torch.compile(flex_attention, dynamic=True)


def _block_mask(layout: Layout, heads: Heads, device: torch.device) -> Any:
    """Who sees whom: from each row's segment, its position, and which segments see which."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows = layout.segments[-1].stop
    segment = torch.empty(rows, dtype=torch.int32)
    position = torch.empty(rows, dtype=torch.int32)
    begins = {s.start: i for i, s in enumerate(layout.segments)}
    sees = torch.eye(len(layout.segments), dtype=torch.bool)
    for i, s in enumerate(layout.segments):
        depth = sum(b - a for a, b in s.above)
        segment[s.start : s.stop] = i
        position[s.start : s.stop] = torch.arange(depth, depth + s.stop - s.start)
        for a, _ in s.above:
            sees[i, begins[a]] = True
    segment, position, sees = (t.to(device) for t in (segment, position, sees))
    window = heads.window or 1 << 30

    def allowed(_: Tensor, __: Tensor, row: Tensor, column: Tensor) -> Tensor:
        back = position[row] - position[column]
        return sees[segment[row], segment[column]] & (back >= 0) & (back < window)

    return create_block_mask(allowed, None, None, rows, rows, device=str(device))
