"""The shape of a layer's attention, and which rows of a pack see which others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vicuna.data.pack import PackSegment


@dataclass(frozen=True)
class AttentionShape:
    """The shape of a layer's attention.

    query, key: query heads H, and key and value heads K, which divides H. size: columns D of a
    head. scale: the factor of the attention scores. window: how many tokens back a row sees, its
    own included; None for no limit.
    """

    query: int
    key: int
    size: int
    scale: float
    window: int | None

    @property
    def width(self) -> int:
        """Columns of q, k and v side by side: (H + 2 K) D."""
        return (self.query + 2 * self.key) * self.size

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of qkv (T, (H + 2 K) D): q (T, H, D), k and v (T, K, D)."""
        widths = [self.query * self.size, self.key * self.size, self.key * self.size]
        q, k, v = (part.unflatten(1, (-1, self.size)) for part in qkv.split(widths, 1))
        return q, k, v


@dataclass
class PackLayout:
    """The segments of a pack and the masks made for them, shared by all layers of a forward."""

    segments: list[PackSegment]
    _masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)
    _additive: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)
    _cache: dict[tuple[str, int | None], Any] = field(default_factory=dict)

    def mask(self, above: int, rows: int, window: int | None, device: torch.device) -> Tensor:
        """True where row i of a segment sees column j: bool (rows, above + rows).

        The rows above the segment come first, in order of position, so column j has position j.
        """
        key = (above, rows, window)
        if key not in self._masks:
            positions = torch.arange(above, above + rows, device=device)[:, None]
            columns = torch.arange(above + rows, device=device)[None, :]
            visible = columns <= positions
            if window is not None:
                visible &= columns > positions - window
            self._masks[key] = visible
        return self._masks[key]

    def additive_mask(self, above: int, rows: int, window: int | None, like: Tensor) -> Tensor:
        """`mask` as a summand of the attention scores, 0 or -inf, in the dtype of `like`."""
        key = (above, rows, window)
        if key not in self._additive:
            visible = self.mask(above, rows, window, like.device)
            minus = torch.full((), float("-inf"), dtype=like.dtype, device=like.device)
            self._additive[key] = torch.zeros_like(visible, dtype=like.dtype).masked_fill_(
                ~visible, minus
            )
        return self._additive[key]

    def cached(self, key: tuple[str, int | None], make: Callable[[], Any]) -> Any:
        """What a backend made for this pack; made once for all layers."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def boundaries(self, device: torch.device) -> tuple[Tensor, int]:
        """The starts of all segments and the end of the last: int32 (n + 1,); and the rows of the
        longest segment."""
        stops = [s.stop for s in self.segments]
        starts = self.cached(
            ("starts", None), lambda: torch.tensor([0, *stops], dtype=torch.int32, device=device)
        )
        return starts, max(s.stop - s.start for s in self.segments)
