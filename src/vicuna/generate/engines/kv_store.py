"""Keys and values of one layer, a slot a token: as they are, in another type, or in 8 bits.

Rows q of attention come as (K, R, D): all that share one of the K heads of keys are rows of one
product, so that keys are read once for all of them. S slots are looked at, of `first` to `stop`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

CacheType = Literal["auto", "f32", "f16", "q8_0"]
_TYPES = {"f32": torch.float32, "f16": torch.float16}


class Plain:
    """Keys and values in one floating type.

    Args:
        heads: K, heads of keys. size: D, of each.
        dtype: what is computed in. kept: what is stored in.
    """

    def __init__(
        self, heads: int, size: int, dtype: torch.dtype, kept: torch.dtype, device: torch.device
    ) -> None:
        self._heads, self._size, self._dtype = heads, size, dtype
        self._buffers = [torch.empty(2 * heads, 0, size, dtype=kept, device=device)]

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(b.nbytes for b in self._buffers)

    def resize(self, slots: int, used: int) -> None:
        """Have so many slots; the first `used` stay."""
        for i, old in enumerate(self._buffers):
            new = old.new_empty(old.shape[0], slots, old.shape[2])
            new[:, :used] = old[:, :used]
            self._buffers[i] = new

    def move(self, slots: Tensor, start: int) -> None:
        """Copy these slots, in order, to those from `start` on."""
        for buffer in self._buffers:
            buffer[:, start : start + len(slots)] = buffer[:, slots]

    def write(self, start: int, kv: Tensor) -> None:
        """Fill slots from `start` on: kv (2 K, n, D), keys first."""
        self._buffers[0][:, start : start + kv.shape[1]] = kv

    def plain(self, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values (K, S, D) in the type that is computed in."""
        both = self._buffers[0][:, first:stop].to(self._dtype)
        return both[: self._heads], both[self._heads :]

    def attend(self, q: Tensor, first: int, stop: int, scale: float, mask: Tensor | None) -> Tensor:
        """Attention of rows q (K, R, D) over the slots: (K, R, D).

        Args:
            mask: (R, S), 0 or -inf, where something is hidden from a row.
        """
        keys, values = self.plain(first, stop)
        weights = _products(q, keys, scale, mask).softmax(-1, dtype=torch.float32)
        return torch.bmm(weights.to(values.dtype), values)


class Quantised(Plain):
    """Keys and values in 8 bits, with a scale for each head and token (q8_0).

    The scales of keys are multiplied into the scores, those of values into the weights: what is
    turned into floating numbers for a product is the codes alone.
    """

    def __init__(self, heads: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(heads, size, dtype, torch.int8, device)
        self._buffers.append(torch.empty(2 * heads, 0, 1, dtype=torch.float32, device=device))

    def write(self, start: int, kv: Tensor) -> None:
        """See `Plain.write`."""
        codes, scales = self._buffers
        at = slice(start, start + kv.shape[1])
        numbers = kv.float()
        scale = numbers.abs().amax(-1, keepdim=True).div_(127).clamp_(min=1e-30)
        codes[:, at] = numbers.div_(scale).round_().to(torch.int8)
        scales[:, at] = scale

    def plain(self, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """See `Plain.plain`."""
        codes, scales = (b[:, first:stop] for b in self._buffers)
        both = codes.to(self._dtype).mul_(scales.to(self._dtype))
        return both[: self._heads], both[self._heads :]

    def attend(self, q: Tensor, first: int, stop: int, scale: float, mask: Tensor | None) -> Tensor:
        """See `Plain.attend`."""
        both, scales = (b[:, first:stop] for b in self._buffers)
        codes, scales = both.to(self._dtype), scales.transpose(1, 2)
        n = self._heads
        scores = _products(q, codes[:n], scale, None).float().mul_(scales[:n])
        if mask is not None:
            scores += mask
        weights = scores.softmax(-1).mul_(scales[n:])
        return torch.bmm(weights.to(codes.dtype), codes[n:])


def _products(q: Tensor, keys: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """scale q keys' + mask: (K, R, S)."""
    if mask is None:
        out = q.new_empty(q.shape[0], q.shape[1], keys.shape[1])
        return torch.baddbmm(out, q, keys.transpose(1, 2), beta=0, alpha=scale)
    return torch.baddbmm(mask, q, keys.transpose(1, 2), alpha=scale)


def store(
    kind: CacheType, heads: int, size: int, dtype: torch.dtype, device: torch.device
) -> Plain:
    """The store of a layer; `auto` keeps keys and values in the type they are computed in."""
    if kind == "q8_0":
        return Quantised(heads, size, dtype, device)
    return Plain(heads, size, dtype, _TYPES.get(kind, dtype), device)
