"""Examples to packs: several examples laid end to end for one forward pass, none seeing another.

What examples begin with in common (the template's preamble, a system prompt, one question with
several answers) is laid down once: a pack is a tree of segments, and a segment's tokens attend to
the segments above it and, causally, to themselves.

    tokens     [ A A A | b b | c c c ]     A: shared prefix; b, c: the rest of two examples
    attention    A A A   b b   c c c
          A      x
          A      x x
          A      x x x
          b      x x x   x
          b      x x x   x x
          c      x x x         x
          c      x x x         x x
          c      x x x         x x x

Tokens after an example's last target are never computed: nothing is learned from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from vicuna.data.loss_mask import Example, Trimmed, targets_of, trim
from vicuna.data.sampler import mix

# Prefixes shorter than this are cheaper to compute again than to share: each segment is a call of
# the attention kernel.
MIN_SHARED = 16


@dataclass(frozen=True, slots=True)
class PackSegment:
    """Rows [start, stop) of a pack and the row ranges above it that it attends to, in order."""

    start: int
    stop: int
    above: tuple[tuple[int, int], ...] = ()


@dataclass(slots=True)
class Pack:
    """One forward pass.

    ids, positions: int64 (T,). target_rows, target_ids: int64 (N,), weights: float32 (N,): the row
    `target_rows[i]` must predict `target_ids[i]`, counted `weights[i]` times (examples agreeing on
    a prefix and its targets share the row). prefix_hashes: int64 (T,), a hash of the tokens of the
    example up to and including the row's. examples: how many are in it. tokens: their tokens as if
    each stood alone. supervised: the sum of weights.
    """

    ids: np.ndarray
    positions: np.ndarray
    segments: list[PackSegment]
    target_rows: np.ndarray
    target_ids: np.ndarray
    weights: np.ndarray
    prefix_hashes: np.ndarray
    examples: int
    tokens: int
    supervised: int


def padded(pack: Pack, step: int) -> Pack:
    """The same pack with its rows, and its rows with a target, filled up to multiples of `step`: by
    a segment of its own that nobody sees, and by targets that count nothing."""
    rows, targets = -len(pack.ids) % step, -len(pack.target_rows) % step
    if not rows and not targets:
        return pack
    stop = len(pack.ids)
    return replace(
        pack,
        ids=_zero_padded(pack.ids, rows),
        positions=np.append(pack.positions, np.arange(rows)),
        segments=[*pack.segments, PackSegment(stop, stop + rows)] if rows else pack.segments,
        target_rows=_zero_padded(pack.target_rows, targets),
        target_ids=_zero_padded(pack.target_ids, targets),
        weights=_zero_padded(pack.weights, targets),
        prefix_hashes=_zero_padded(pack.prefix_hashes, rows),
    )


def _zero_padded(values: np.ndarray, by: int) -> np.ndarray:
    return np.append(values, np.zeros(by, values.dtype))


def build_packs(
    examples: Sequence[Example],
    end_id: int,
    budget: int,
    max_examples: int = 0,
    share: bool = True,
) -> list[Pack]:
    """Lay the examples of a step into packs.

    Args:
        end_id: the id that a label END_TOKEN stands for.
        budget: rows a pack may have; an example longer than that gets a pack of its own.
        max_examples: at most so many examples in a pack; 0 is no limit.
        share: lay common prefixes down once.
    """
    order = sorted(range(len(examples)), key=lambda i: examples[i].ids.tobytes())
    trimmed = {i: trim(examples[i]) for i in order}
    used = [i for i in order if len(trimmed[i].ids)]
    groups = _prefix_groups(used, trimmed, budget, max_examples) if share else [[i] for i in used]
    bins = _best_fit(groups, trimmed, budget, max_examples, share)
    if share:
        bins = [part for members in bins for part in _split_to_budget(members, trimmed, budget)]
    return [_build_pack(members, examples, trimmed, end_id, share) for members in bins]


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common prefix of two id arrays."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def _prefix_groups(
    order: Sequence[int], trimmed: dict[int, Trimmed], budget: int, max_examples: int
) -> list[list[int]]:
    """Group neighbours (in order of their ids) that share clearly more than all of them do."""
    if not order:
        return []
    lcp = [_common(trimmed[a].ids, trimmed[b].ids) for a, b in pairwise(order)]
    usual = min(lcp, default=0)
    groups = [[order[0]]]
    size = len(trimmed[order[0]].ids)
    for i, shared in zip(order[1:], lcp):
        grown = size + len(trimmed[i].ids) - shared
        full = max_examples and len(groups[-1]) >= max_examples
        if shared >= usual + 2 * MIN_SHARED and grown <= budget and not full:
            groups[-1].append(i)
            size = grown
        else:
            groups.append([i])
            size = len(trimmed[i].ids)
    return groups


def _best_fit(
    groups: list[list[int]],
    trimmed: dict[int, Trimmed],
    budget: int,
    max_examples: int,
    share: bool,
) -> list[list[int]]:
    """Best-fit decreasing: each group goes where it leaves the least room."""
    everyone = [i for group in groups for i in group]
    prefix = min((_common(trimmed[everyone[0]].ids, trimmed[i].ids) for i in everyone), default=0)
    prefix = prefix if share and prefix >= MIN_SHARED else 0

    def rows(group: list[int]) -> int:
        total = len(trimmed[group[0]].ids)
        for a, b in pairwise(group):
            shared = _common(trimmed[a].ids, trimmed[b].ids) if share else 0
            total += len(trimmed[b].ids) - (shared if shared >= MIN_SHARED else 0)
        return total - prefix

    sized = sorted(((rows(f), f) for f in groups), key=lambda s: (-s[0], s[1]))
    room: list[int] = []
    bins: list[list[int]] = []
    for size, group in sized:
        fitting = [
            b
            for b in range(len(bins))
            if room[b] >= size and (not max_examples or len(bins[b]) + len(group) <= max_examples)
        ]
        if fitting:
            b = min(fitting, key=lambda b: (room[b], b))
        else:
            b = len(bins)
            bins.append([])
            room.append(budget - prefix)
        bins[b] += group
        room[b] -= size
    return bins


def _split_to_budget(
    members: list[int], trimmed: dict[int, Trimmed], budget: int
) -> list[list[int]]:
    """Halve a bin until its rows as `_emit_subtree` lays them, not as `_best_fit` guessed, fit."""
    members = sorted(members, key=lambda i: trimmed[i].ids.tobytes())
    lcp = [_common(trimmed[a].ids, trimmed[b].ids) for a, b in pairwise(members)]
    if len(members) == 1 or _rows([len(trimmed[i].ids) for i in members], lcp, 0) <= budget:
        return [members]
    half = len(members) // 2
    halves = (members[:half], members[half:])
    return [part for h in halves for part in _split_to_budget(h, trimmed, budget)]


def _rows(lengths: list[int], lcp: list[int], depth: int) -> int:
    """The rows that `_emit_subtree` lays down."""
    total = start = 0
    for stop in range(1, len(lengths) + 1):
        if stop < len(lengths) and lcp[stop - 1] >= depth + MIN_SHARED:
            continue
        inner = lcp[start : stop - 1]
        if inner:
            agreed = min(inner)
            total += agreed - depth + _rows(lengths[start:stop], inner, agreed)
        else:
            total += lengths[start] - depth
        start = stop
    return total


@dataclass(slots=True)
class _PackBuilder:
    """The state of builder one pack: rows so far, and where each example's tokens went."""

    rows: int = 0
    ids: list[np.ndarray] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    segments: list[PackSegment] = field(default_factory=list)
    places: dict[int, list[tuple[int, int, int]]] = field(default_factory=dict)

    def put(
        self, ids: np.ndarray, depth: int, above: tuple[tuple[int, int], ...], members: list[int]
    ) -> tuple[tuple[int, int], ...]:
        """Lay one segment down; returns what its children have above them."""
        if not len(ids):
            return above
        start, stop = self.rows, self.rows + len(ids)
        self.ids.append(ids)
        self.positions.append(np.arange(depth, depth + len(ids)))
        self.segments.append(PackSegment(start, stop, above))
        for i in members:
            self.places.setdefault(i, []).append((start, depth, len(ids)))
        self.rows = stop
        return (*above, (start, stop))


def _build_pack(
    members: list[int],
    examples: Sequence[Example],
    trimmed: dict[int, Trimmed],
    end_id: int,
    share: bool,
) -> Pack:
    builder = _PackBuilder()
    members = sorted(members, key=lambda i: trimmed[i].ids.tobytes())
    if share:
        lcp = [_common(trimmed[a].ids, trimmed[b].ids) for a, b in pairwise(members)]
        _emit_subtree(builder, members, lcp, 0, (), trimmed)
    else:
        for i in members:
            builder.put(trimmed[i].ids, 0, (), [i])
    ids = np.concatenate(builder.ids).astype(np.int64)
    hashes = np.zeros(len(ids), np.int64)
    rows: list[np.ndarray] = []
    wanted: list[np.ndarray] = []
    for i in members:
        where, following = targets_of(examples[i], end_id)
        row_of = np.concatenate(
            [np.arange(start, start + n) for start, _, n in builder.places[i]] or [np.zeros(0, int)]
        )
        hashes[row_of] = _prefix_hashes(trimmed[i].ids)
        rows.append(row_of[where])
        wanted.append(following)
    target_rows, target_ids, weights = _merge_targets(np.concatenate(rows), np.concatenate(wanted))
    return Pack(
        ids=ids,
        positions=np.concatenate(builder.positions).astype(np.int64),
        segments=builder.segments,
        target_rows=target_rows,
        target_ids=target_ids,
        weights=weights,
        prefix_hashes=hashes,
        examples=len(members),
        tokens=sum(trimmed[i].length for i in members),
        supervised=int(weights.sum()),
    )


def _emit_subtree(
    builder: _PackBuilder,
    members: list[int],
    lcp: list[int],
    depth: int,
    above: tuple[tuple[int, int], ...],
    trimmed: dict[int, Trimmed],
) -> None:
    """Lay the subtree of members that agree up to `depth`; lcp[i] is between neighbours i, i+1."""
    start = 0
    for stop in range(1, len(members) + 1):
        if stop < len(members) and lcp[stop - 1] >= depth + MIN_SHARED:
            continue
        part = members[start:stop]
        inner = lcp[start : stop - 1]
        if len(part) == 1:
            builder.put(trimmed[part[0]].ids[depth:], depth, above, part)
        else:
            agreed = min(inner)
            shared = trimmed[part[0]].ids[depth:agreed]
            _emit_subtree(
                builder, part, inner, agreed, builder.put(shared, depth, above, part), trimmed
            )
        start = stop


def _merge_targets(rows: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count equal (row, id) pairs once, with their number as weight."""
    keys = rows.astype(np.int64) << 32 | ids.astype(np.int64)
    unique, counts = np.unique(keys, return_counts=True)
    return unique >> 32, unique & 0xFFFFFFFF, counts.astype(np.float32)


def _prefix_hashes(ids: np.ndarray) -> np.ndarray:
    """A hash of ids[:t + 1] for every t, without a loop: int64 (T,)."""
    with np.errstate(over="ignore"):
        # Tokens and places are mixed from different ranges: with one function of the same small
        # numbers for both, sums of products are equal for some sequences by algebra alone.
        place = mix(np.arange(1 << 40, (1 << 40) + len(ids), dtype=np.uint64))
        return mix(np.cumsum(mix(ids.astype(np.uint64)) * (place | np.uint64(1)))).view(np.int64)
