"""Which examples make up step k is a function of the seed and k alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vicuna.data.sampler import Sampler, WeightedIndices, mix, permutation, split_validation

sizes = st.lists(
    st.tuples(st.integers(1, 40), st.sampled_from([0.1, 0.5, 1.0, 1.5, 3.0])),
    min_size=1,
    max_size=3,
)

GOLDEN_PERMUTATION = [9, 10, 11, 0, 4, 1, 6, 5, 7, 8, 3, 2]
GOLDEN_STEP = [9, 7, 4, 0, 1]
GOLDEN_HASHES = ["0xe220a8397b1dcdaf", "0x910a2dec89025cc1", "0xe4d971771b652c20"]


def groups_of(shapes: list[tuple[int, float]]) -> list[WeightedIndices]:
    groups, start = [], 0
    for n, weight in shapes:
        groups.append(WeightedIndices(np.arange(start, start + n), weight))
        start += n
    return groups


def order_of(*shapes: tuple[int, float], batch_size: int = 4, seed: int = 7) -> Sampler:
    return Sampler(groups_of(list(shapes)), batch_size, seed)


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(1, 30), st.integers(0, 2**40), st.permutations(range(12)))
def test_a_step_is_the_same_in_whatever_order_it_is_asked_for(
    shapes: list[tuple[int, float]], batch_size: int, seed: int, calls: list[int]
) -> None:
    one = Sampler(groups_of(shapes), batch_size, seed)
    found = {k: one.step(k) for k in calls}
    for k in range(12):
        assert np.array_equal(found[k], Sampler(groups_of(shapes), batch_size, seed).step(k))
        assert len(found[k]) == batch_size


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 25), st.integers(0, 1000))
def test_every_epoch_is_a_permutation(n: int, batch_size: int, seed: int) -> None:
    order = order_of((n, 1.0), batch_size=batch_size, seed=seed)
    steps = -(-3 * n // batch_size)
    seen = np.concatenate([order.step(k) for k in range(steps)])[: 3 * n]
    for epoch in seen.reshape(3, n):
        assert sorted(epoch) == list(range(n))


def test_a_step_may_span_epochs() -> None:
    order = order_of((3, 1.0), batch_size=7)
    seen = np.concatenate([order.step(0), order.step(1), order.step(2)])
    assert [sorted(seen[i : i + 3]) for i in range(0, 21, 3)] == [[0, 1, 2]] * 7


def test_the_batch_size_does_not_change_the_sequence() -> None:
    sequences = [
        np.concatenate(
            [order_of((11, 1.0), (5, 2.0), batch_size=b).step(k) for k in range(60 // b)]
        )
        for b in (1, 3, 4, 60)
    ]
    assert all(np.array_equal(s, sequences[0]) for s in sequences)


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(0, 1000))
def test_weights_are_honoured_over_epochs(shapes: list[tuple[int, float]], seed: int) -> None:
    groups = groups_of(shapes)
    order = Sampler(groups, 1, seed)
    epochs = 10
    seen = np.array([order.step(k)[0] for k in range(epochs * order.epoch_size)])
    for g in groups:
        counts = np.bincount(seen, minlength=groups[-1].indices[-1] + 1)[g.indices]
        assert counts.sum() == epochs * max(1, round(g.weight * len(g.indices)))
        assert counts.max() - counts.min() <= 1


def test_each_epoch_mixes_the_data_sets_anew() -> None:
    order = order_of((40, 1.0), (40, 1.0), batch_size=80)
    first, second = order.step(0), order.step(1)
    assert not np.array_equal(first, second)
    assert 5 < (first[:40] < 40).sum() < 35


def test_seeds_give_different_orders() -> None:
    steps = [order_of((50, 1.0), batch_size=50, seed=s).step(0).tolist() for s in range(5)]
    assert len({tuple(s) for s in steps}) == 5


@pytest.mark.parametrize(
    ("epochs", "batch_size", "wanted"),
    [(1, 4, 3), (2, 4, 5), (3, 10, 3), (0.5, 4, 2), (0.01, 4, 1), (1, 100, 1)],
)
def test_steps_see_every_example(epochs: float, batch_size: int, wanted: int) -> None:
    assert order_of((10, 1.0), batch_size=batch_size).steps(epochs) == wanted


def test_no_version_may_change_a_permutation() -> None:
    assert permutation(12, 42, 1, 0).tolist() == GOLDEN_PERMUTATION
    assert order_of((6, 1.0), (4, 0.5), batch_size=5, seed=42).step(3).tolist() == GOLDEN_STEP


def test_no_version_may_change_the_hash() -> None:
    values = mix(np.array([0, 1, 2**64 - 1], np.uint64))
    assert [hex(v) for v in values.tolist()] == GOLDEN_HASHES


@given(st.integers(1, 200), st.lists(st.integers(-(2**63), 2**64), max_size=4))
@settings(max_examples=40, deadline=None)
def test_a_permutation_is_one_for_any_key(n: int, key: list[int]) -> None:
    assert sorted(permutation(n, *key)) == list(range(n))


# -- held out ----


def hashes(n: int, questions: int, seed: int = 0) -> np.ndarray:
    kinds = mix(np.arange(questions, dtype=np.uint64) + np.uint64(1000 * seed))
    return kinds[np.random.default_rng(seed).integers(0, questions, n)]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 80),
    st.integers(1, 40),
    st.integers(0, 99),
    st.floats(0, 0.99) | st.integers(1, 90),
)
def test_all_answers_to_a_question_fall_on_one_side(
    n: int, questions: int, seed: int, val_size: float
) -> None:
    of = hashes(n, questions, seed)
    training, held_out = split_validation(of, val_size, seed)
    assert sorted([*training, *held_out]) == list(range(n))
    assert not set(of[training]) & set(of[held_out])


@pytest.mark.parametrize(("val_size", "wanted"), [(20, 20), (1, 1), (0.1, 10), (0.25, 25), (0, 0)])
def test_a_count_or_a_fraction(val_size: float, wanted: int) -> None:
    distinct = mix(np.arange(100, dtype=np.uint64))
    training, held_out = split_validation(distinct, val_size, 3)
    assert (len(training), len(held_out)) == (100 - wanted, wanted)


def test_added_data_moves_nothing_by_more_than_the_split_itself() -> None:
    distinct = mix(np.arange(400, dtype=np.uint64))
    _, small = split_validation(distinct[:200], 0.2, 3)
    training, _ = split_validation(distinct, 0.2, 3)
    _, whole = split_validation(distinct, 0.2, 3)
    assert len(set(small) & set(whole)) > 25
    assert len(set(training) & set(whole)) == 0


def test_the_split_depends_on_the_seed() -> None:
    distinct = mix(np.arange(100, dtype=np.uint64))
    assert (
        split_validation(distinct, 20, 1)[1].tolist()
        != split_validation(distinct, 20, 2)[1].tolist()
    )
