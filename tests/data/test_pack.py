"""Packs hold just what their examples say, each seen from its own prefix only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vicuna.data.loss_mask import END_TOKEN, NEXT_TOKEN, NO_TARGET, Example, targets_of, trim
from vicuna.data.pack import MIN_SHARED, Pack, build_packs

END = 99
Prefix = tuple[int, ...]


def example(ids: Sequence[int], labels: Sequence[int]) -> Example:
    return Example(np.array(ids, np.int32), np.array(labels, np.uint8))


def taught(ids: Sequence[int], after: int) -> Example:
    """Everything behind the first `after` tokens is taught."""
    return example(ids, [NO_TARGET] * (after - 1) + [NEXT_TOKEN] * (len(ids) - after) + [NO_TARGET])


@st.composite
def sets(draw: st.DrawFn) -> list[Example]:
    """Trees of random prefixes over few tokens, with duplicates and odd labels."""
    tokens = st.integers(0, 3)
    stems = draw(st.lists(st.lists(tokens, min_size=1, max_size=45), min_size=1, max_size=4))
    found: list[Example] = []
    for _ in range(draw(st.integers(1, 10))):
        parts = draw(st.lists(st.sampled_from(stems), min_size=1, max_size=3))
        own = draw(st.lists(tokens, max_size=12))
        ids = [t for part in parts for t in part] + own
        kinds = st.sampled_from([NO_TARGET, NO_TARGET, NEXT_TOKEN, END_TOKEN])
        labels = draw(st.lists(kinds, min_size=len(ids), max_size=len(ids)))
        if labels[-1] == NEXT_TOKEN:
            labels[-1] = NO_TARGET
        found.append(example(ids, labels))
        if draw(st.booleans()):
            found.append(example(ids, labels))
    return found


def wanted(examples: Sequence[Example]) -> Counter[tuple[Prefix, int]]:
    found: Counter[tuple[Prefix, int]] = Counter()
    for e in examples:
        for t, target in zip(*targets_of(e, END)):
            found[tuple(e.ids[: t + 1].tolist()), int(target)] += 1
    return found


def visible(pack: Pack, row: int) -> list[int]:
    """The rows that a row attends to, in order, itself the last."""
    (segment,) = [s for s in pack.segments if s.start <= row < s.stop]
    return [r for a, b in segment.above for r in range(a, b)] + list(range(segment.start, row + 1))


def held(packs: Sequence[Pack]) -> Counter[tuple[Prefix, int]]:
    found: Counter[tuple[Prefix, int]] = Counter()
    for pack in packs:
        for row, target, weight in zip(pack.target_rows, pack.target_ids, pack.weights):
            seen = visible(pack, int(row))
            assert pack.positions[seen].tolist() == list(range(len(seen)))
            found[tuple(pack.ids[seen].tolist()), int(target)] += int(weight)
    return found


limits = {
    "budget": st.integers(1, 200),
    "max_examples": st.sampled_from([0, 1, 2, 3, 8]),
    "share": st.booleans(),
}


@settings(max_examples=150, deadline=None)
@given(examples=sets(), **limits)
def test_every_target_is_kept_behind_its_own_prefix(
    examples: list[Example], budget: int, max_examples: int, share: bool
) -> None:
    assert held(build_packs(examples, END, budget, max_examples, share)) == wanted(examples)


@settings(max_examples=150, deadline=None)
@given(examples=sets(), **limits)
def test_limits_are_kept(
    examples: list[Example], budget: int, max_examples: int, share: bool
) -> None:
    packs = build_packs(examples, END, budget, max_examples, share)
    lengths = [n for n in (len(trim(e).ids) for e in examples) if n]
    assert sum(p.examples for p in packs) == len(lengths)
    assert sum(p.supervised for p in packs) == sum(wanted(examples).values())
    for pack in packs:
        assert len(pack.ids) <= budget or pack.examples == 1
        assert not max_examples or pack.examples <= max_examples
    rows = sum(len(p.ids) for p in packs)
    assert rows <= sum(lengths)
    if not share:
        assert rows == sum(lengths)


@settings(max_examples=60, deadline=None)
@given(examples=sets(), **limits)
def test_rows_with_equal_prefixes_have_equal_hashes_and_no_others(
    examples: list[Example], budget: int, max_examples: int, share: bool
) -> None:
    by_prefix: dict[Prefix, int] = {}
    for pack in build_packs(examples, END, budget, max_examples, share):
        for row in range(len(pack.ids)):
            prefix = tuple(pack.ids[visible(pack, row)].tolist())
            hashed = int(pack.prefix_hashes[row])
            assert by_prefix.setdefault(prefix, hashed) == hashed
    assert len(set(by_prefix.values())) == len(by_prefix)


@settings(max_examples=60, deadline=None)
@given(examples=sets(), data=st.data(), **limits)
def test_the_order_of_the_examples_does_not_matter(
    examples: list[Example], data: st.DataObject, budget: int, max_examples: int, share: bool
) -> None:
    other = data.draw(st.permutations(examples))
    one = build_packs(examples, END, budget, max_examples, share)
    two = build_packs(other, END, budget, max_examples, share)
    assert held(one) == held(two)


def test_prefixes_that_exchange_tokens_and_places_have_different_hashes() -> None:
    """Equal by algebra where tokens and places are hashed alike; found by the test above."""
    examples = [taught([3, 0, 0, 1, 0], 4), taught([1, 3, 0, 0, 0, 0], 5)]
    packs = build_packs(examples, END, 100, 0, False)
    hashes = np.concatenate([p.prefix_hashes for p in packs])
    assert len(set(hashes.tolist())) == len(hashes)


def answers(n: int, common: int, own: int = 20) -> list[Example]:
    rng = np.random.default_rng(0)
    prefix = rng.integers(0, 90, common)
    return [taught([*prefix, 90 + i % 9, *rng.integers(0, 90, own)], common) for i in range(n)]


def test_a_common_prefix_is_laid_down_once() -> None:
    (pack,) = build_packs(answers(8, 50), END, 10_000)
    assert len(pack.ids) == 50 + 8 * 20
    assert pack.tokens == 8 * 71
    assert sum(not s.above for s in pack.segments) == 1


def test_equal_examples_are_computed_once_and_counted_each() -> None:
    one = answers(1, 30)
    (pack,) = build_packs(one * 5, END, 10_000)
    assert len(pack.ids) == 50
    assert set(pack.weights.tolist()) == {5.0}
    assert pack.supervised == 5 * 21


def test_prefixes_of_prefixes_are_shared() -> None:
    system = list(range(20))
    questions = [[*system, *range(30 + 25 * q, 50 + 25 * q)] for q in range(2)]
    examples = [taught([*q, 80 + a, 90, 91], len(q)) for q in questions for a in range(3)]
    (pack,) = build_packs(examples, END, 10_000)
    assert len(pack.ids) == 20 + 2 * (20 + 3 * 2)


def test_short_prefixes_are_computed_again() -> None:
    (pack,) = build_packs(answers(4, MIN_SHARED - 1), END, 10_000)
    assert all(not s.above for s in pack.segments)
    assert len(pack.segments) == 4


def test_nothing_behind_the_last_target_is_computed() -> None:
    e = example([1, 2, 3, 4, 5], [NO_TARGET, NEXT_TOKEN, NO_TARGET, NO_TARGET, NO_TARGET])
    (pack,) = build_packs([e], END, 100)
    assert pack.ids.tolist() == [1, 2]
    assert pack.target_ids.tolist() == [3]
    assert pack.tokens == 5


def test_a_silent_end_is_a_target_that_stands_nowhere() -> None:
    e = example([1, 2, 3], [NO_TARGET, END_TOKEN, END_TOKEN])
    (pack,) = build_packs([e], END, 100)
    assert pack.target_ids.tolist() == [END, END]
    assert END not in pack.ids


def test_examples_that_disagree_on_a_target_share_the_row() -> None:
    ids = list(range(20))
    pair = [example(ids, [0] * 19 + [END_TOKEN]), taught([*ids, 21], 20)]
    (pack,) = build_packs(pair, END, 100)
    assert len(pack.ids) == 20
    assert sorted(zip(pack.target_rows.tolist(), pack.target_ids.tolist())) == [(19, 21), (19, END)]


def test_examples_without_a_target_are_left_out() -> None:
    silent = example([1, 2, 3], [0, 0, 0])
    assert build_packs([silent], END, 100) == []
    assert build_packs([], END, 100) == []


def test_an_example_longer_than_the_budget_stands_alone() -> None:
    packs = build_packs([*answers(3, 20), taught(list(range(90)), 5)], END, 64)
    (long,) = [p for p in packs if len(p.ids) > 64]
    assert long.examples == 1


@pytest.mark.parametrize("n", [1, 5, 20])
def test_packs_are_well_filled(n: int) -> None:
    packs = build_packs(answers(n, 1, own=30), END, 100)
    assert len(packs) == -(-n // 3)
