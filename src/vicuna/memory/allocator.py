"""How a device's allocator rounds, and what it keeps beyond what is asked of it.

Modelled after PyTorch's documented CUDA caching allocator (notes on CUDA, "Memory management", and
c10/cuda/CUDACachingAllocator): sizes rounded to 512 bytes; blocks of at most 1 MiB cut from
segments of 2 MiB, below 10 MiB from segments of 20 MiB, larger ones from segments of their own size
rounded to 2 MiB; best fit; a remainder becomes a free block (always in the small pool, above 1 MiB
in the large one); neighbours merge when freed; segments are kept. Not modelled: streams, expandable
segments, giving segments back before an out-of-memory error.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass

_KIB, _MIB = 1 << 10, 1 << 20
ROUND = 512
_SMALL = _MIB


def rounded(nbytes: int, device: str) -> int:
    """Bytes that an allocation of `nbytes` takes: on CUDA a multiple of 512."""
    if device != "cuda":
        return nbytes
    return max(ROUND, -(-nbytes // ROUND) * ROUND)


@dataclass(eq=False)
class _Block:
    """A stretch of a segment, with its neighbours."""

    size: int
    small: bool
    free: bool = False
    before: _Block | None = None
    after: _Block | None = None
    tie: int = 0


class CachingAllocator:
    """Bytes a CUDA process has taken from the driver after a series of allocations.

    allocated, reserved: now. What is reserved never falls.
    """

    def __init__(self) -> None:
        self.allocated = self.reserved = 0
        self._blocks: dict[int, _Block] = {}
        # Free blocks of each pool, sorted by size; the second entry breaks ties.
        self._free: dict[bool, list[tuple[int, int, _Block]]] = {True: [], False: []}
        self._ties = 0

    def replay(self, events: Iterable[tuple[int, int]]) -> None:
        """Allocate (number, bytes) where bytes are positive, free the number where negative."""
        for number, nbytes in events:
            if nbytes > 0:
                self.allocate(number, nbytes)
            else:
                self.release(number)

    def allocate(self, number: int, nbytes: int) -> None:
        size = rounded(nbytes, "cuda")
        block = self._take(size, size <= _SMALL)
        self._split(block, size)
        self._blocks[number] = block
        self.allocated += block.size

    def release(self, number: int) -> None:
        block = self._blocks.pop(number)
        self.allocated -= block.size
        for other in (block.before, block.after):
            if other is not None and other.free:
                self._free[other.small].remove(self._entry(other))
                self._merge(block, other)
        self._put(block)

    def _take(self, size: int, small: bool) -> _Block:
        """The smallest free block that is large enough, else a new segment."""
        free = self._free[small]
        at = bisect.bisect_left(free, size, key=lambda e: e[0])
        if at < len(free):
            block = free.pop(at)[2]
            block.free = False
            return block
        if small:
            segment = 2 * _MIB
        elif size < 10 * _MIB:
            segment = 20 * _MIB
        else:
            segment = -(-size // (2 * _MIB)) * 2 * _MIB
        self.reserved += segment
        return _Block(segment, small)

    def _split(self, block: _Block, size: int) -> None:
        rest = block.size - size
        if rest < ROUND if block.small else rest <= _SMALL:
            return
        tail = _Block(rest, block.small, before=block, after=block.after)
        if block.after is not None:
            block.after.before = tail
        block.after, block.size = tail, size
        self._put(tail)

    def _merge(self, block: _Block, other: _Block) -> None:
        if other is block.before:
            block.before = other.before
            if other.before is not None:
                other.before.after = block
        else:
            block.after = other.after
            if other.after is not None:
                other.after.before = block
        block.size += other.size

    def _put(self, block: _Block) -> None:
        block.free = True
        self._ties += 1
        block.tie = self._ties
        bisect.insort(self._free[block.small], self._entry(block), key=lambda e: e[:2])

    def _entry(self, block: _Block) -> tuple[int, int, _Block]:
        return block.size, block.tie, block
