"""The keys and values of a tree of tokens, in one append-only store a layer.

The prompt (the prompt) lies in slots 0 .. P-1, in order. Behind it each step appends one slot for
each row. Which slots a row sees is a mask, handed down from its parent; so rows fork and die
without a key ever being copied. Slots that no live row sees are given back when there are many.

    slots   | 0 1 2 3 4 | 5 6 7 | 8 9 10 |        prompt of 5, two steps of 3 rows
    row 0   | x x x x x | x . . | x . .  |        grew from row 0
    row 1   | x x x x x | x . . | . x .  |        grew from row 0, too: a fork
    row 2   | x x x x x | . . x | . . x  |        row 1 of the first step is dead: slot 6

A store holds the keys and values of one layer, a slot a token: as they are, in another type, or in
8 bits. Rows q of attention come as (K, R, D): all that share one of the K heads of keys are rows of
one product, so that keys are read once for all of them. S slots are looked at, `first` to `stop`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

CacheType = Literal["auto", "f32", "f16", "q8_0"]
_TYPES = {"f32": torch.float32, "f16": torch.float16}


class KVCache:
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

    def keys_values(self, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values (K, S, D) in the type that is computed in."""
        both = self._buffers[0][:, first:stop].to(self._dtype)
        return both[: self._heads], both[self._heads :]

    def attend(self, q: Tensor, first: int, stop: int, scale: float, mask: Tensor | None) -> Tensor:
        """Attention of rows q (K, R, D) over the slots: (K, R, D).

        Args:
            mask: (R, S), 0 or -inf, where something is hidden from a row.
        """
        keys, values = self.keys_values(first, stop)
        weights = _products(q, keys, scale, mask).softmax(-1, dtype=torch.float32)
        return torch.bmm(weights.to(values.dtype), values)


class QuantizedKVCache(KVCache):
    """Keys and values in 8 bits, with a scale for each head and token (q8_0).

    The scales of keys are multiplied into the scores, those of values into the weights: what is
    turned into floating numbers for a product is the codes alone.
    """

    def __init__(self, heads: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(heads, size, dtype, torch.int8, device)
        self._buffers.append(torch.empty(2 * heads, 0, 1, dtype=torch.float32, device=device))

    def write(self, start: int, kv: Tensor) -> None:
        codes, scales = self._buffers
        at = slice(start, start + kv.shape[1])
        numbers = kv.float()
        scale = numbers.abs().amax(-1, keepdim=True).div_(127).clamp_(min=1e-30)
        codes[:, at] = numbers.div_(scale).round_().to(torch.int8)
        scales[:, at] = scale

    def keys_values(self, first: int, stop: int) -> tuple[Tensor, Tensor]:
        codes, scales = (b[:, first:stop] for b in self._buffers)
        both = codes.to(self._dtype).mul_(scales.to(self._dtype))
        return both[: self._heads], both[self._heads :]

    def attend(self, q: Tensor, first: int, stop: int, scale: float, mask: Tensor | None) -> Tensor:
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


def make_cache(
    kind: CacheType, heads: int, size: int, dtype: torch.dtype, device: torch.device
) -> KVCache:
    """The store of a layer; `auto` keeps keys and values in the type they are computed in."""
    if kind == "q8_0":
        return QuantizedKVCache(heads, size, dtype, device)
    return KVCache(heads, size, dtype, _TYPES.get(kind, dtype), device)


# Slots are added so many at a time; dead ones are given back from so many on.
GROWTH = 256
RECLAIM = 192


class TreeCache:
    """Tokens, their keys and values, and who sees whom.

    Args:
        layers: the device of each layer's keys and values.
        heads: K, heads of keys. size: D, of each.
        dtype: what attention computes in. kind: how keys and values are stored.
    """

    def __init__(
        self,
        layers: Sequence[torch.device],
        heads: int,
        size: int,
        dtype: torch.dtype,
        kind: CacheType = "auto",
    ) -> None:
        self._devices, self._dtype = list(layers), dtype
        self.layers: list[KVCache] = [
            make_cache(kind, heads, size, dtype, d) for d in self._devices
        ]
        self.capacity = 0
        self.prompt: list[int] = []
        self._cut_branches()

    def _cut_branches(self) -> None:
        self._tokens: list[int] = []  # of the slots behind the prompt
        self._parents: list[int] = []  # as indices behind the prompt, -1 for its end
        self._leaves: list[int] = [-1]  # the slot of each live row
        self._visible = torch.zeros(1, 0, dtype=torch.bool)
        self.depth = 0  # steps since the prompt

    @property
    def used(self) -> int:
        """Slots that hold something."""
        return len(self.prompt) + len(self._tokens)

    @property
    def rows(self) -> int:
        """Live rows: leaves of the tree."""
        return len(self._leaves)

    @property
    def memory(self) -> int:
        """Bytes of all keys and values."""
        return sum(layer.nbytes for layer in self.layers)

    def reserve(self, slots: int) -> None:
        """Make room for so many slots in all."""
        if slots <= self.capacity:
            return
        capacity = -(-slots // GROWTH) * GROWTH
        for layer in self.layers:
            layer.resize(capacity, self.used)
        self.capacity = capacity

    # -- the prompt --------------------------------------------------------------------------------

    def begin(self, prompt: Sequence[int]) -> int:
        """Keep the longest path that `prompt` begins with as the prompt, and nothing else.

        The last token of the prompt is never kept: its logits are what is asked for.

        Returns: its length.
        """
        limit = len(prompt) - 1
        known = 0
        while known < min(limit, len(self.prompt)) and self.prompt[known] == prompt[known]:
            known += 1
        slots: list[int] = []
        if known == len(self.prompt):
            children = {(p, t): i for i, (p, t) in enumerate(zip(self._parents, self._tokens))}
            at = -1
            while known < limit and (at, prompt[known]) in children:
                at = children[at, prompt[known]]
                slots.append(at)
                known += 1
        self._gather(slots)
        self.prompt = list(prompt[:known])
        self._cut_branches()
        return known

    def extend(self, tokens: Sequence[int]) -> None:
        """Note tokens whose keys and values were written behind the prompt."""
        self.prompt += tokens

    # -- branches ----------------------------------------------------------------------------------

    def grow(self, tokens: Sequence[int], parents: Sequence[int]) -> None:
        """Append a slot for each new row; their keys and values are for the caller to write."""
        rows, before = len(tokens), len(self._tokens)
        seen = torch.zeros(rows, before + rows, dtype=torch.bool)
        seen[:, :before] = self._visible[list(parents)]
        seen[range(rows), range(before, before + rows)] = True
        self._visible = seen
        self._parents += [self._leaves[p] for p in parents]
        self._tokens += tokens
        self._leaves = list(range(before, before + rows))
        self.depth += 1

    def mask(self, window: int | None, first: int) -> Tensor | None:
        """What live rows must not look at: (rows, slots from `first` on), -inf there, else 0.

        None where every row sees all of it. `first` is at most the prompt's end.
        """
        hidden = ~self._visible
        if window is not None and self.depth > window:
            depths = torch.tensor(self._depths())
            hidden |= (self.depth - depths >= window)[None]
        if not bool(hidden.any()):
            return None
        mask = torch.zeros(len(hidden), self.used - first, dtype=self._dtype)
        mask[:, len(self.prompt) - first :].masked_fill_(hidden, -torch.inf)
        return mask

    def reclaim(self) -> None:
        """Give back the slots that no live row sees, where they are many."""
        total = len(self._tokens)
        if total < RECLAIM:
            return
        alive = self._visible.any(0)
        slots = alive.nonzero()[:, 0].tolist()
        if 2 * len(slots) > total:
            return
        self._gather(slots)
        place = {slot: i for i, slot in enumerate(slots)} | {-1: -1}
        # A living slot's parent lives: whoever sees the one sees the other.
        self._parents = [place[self._parents[s]] for s in slots]
        self._tokens = [self._tokens[s] for s in slots]
        self._leaves = [place[leaf] for leaf in self._leaves]
        self._visible = self._visible[:, alive]

    def _depths(self) -> list[int]:
        depths: list[int] = []
        for parent in self._parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return depths

    def _gather(self, slots: Sequence[int]) -> None:
        """Move slots behind the prompt to its end, in order."""
        if not slots or list(slots) == list(range(len(slots))):
            return
        start = len(self.prompt)
        for layer, device in zip(self.layers, self._devices):
            layer.move(torch.tensor(slots, device=device) + start, start)
