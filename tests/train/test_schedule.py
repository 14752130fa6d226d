"""The learning rate, its warm-up, and how it goes on with new data."""

from __future__ import annotations

import pytest

from vicuna.train.schedule import Schedule, continued_total, warmup_steps


def rates(kind: str, total: int, warmup: int) -> list[float]:
    schedule = Schedule(kind, 1.0, total, warmup)
    return [schedule.rate(k) for k in range(total)]


def test_linear_values() -> None:
    assert rates("linear", 6, 2) == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])


def test_cosine_values() -> None:
    wanted = [0.5, 1.0, 1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]
    assert rates("cosine", 6, 2) == pytest.approx(wanted)


def test_constant_values() -> None:
    assert rates("constant", 5, 2) == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0])


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (2, 0), (5, 1), (100, 20)])
def test_every_step_learns_and_none_above_the_peak(kind: str, total: int, warmup: int) -> None:
    values = rates(kind, total, warmup)
    assert all(0 < v <= 1 for v in values)
    assert max(values) == 1.0


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_the_rate_never_rises_after_warm_up(kind: str) -> None:
    values = rates(kind, 50, 10)
    assert values[:10] == sorted(values[:10])
    assert values[9:] == sorted(values[9:], reverse=True)


@pytest.mark.parametrize(
    ("total", "ratio", "steps", "wanted"),
    [
        (1000, 0.05, 0, 50),
        (1001, 0.05, 0, 51),
        (1000, 0.0, 100, 100),
        (1000, 0.5, 30, 30),
        (1000, 0.5, 0, 200),
        (9, 0.05, 100, 1),
        (4, 0.05, 100, 0),
        (1, 0.9, 0, 0),
    ],
)
def test_warm_up_is_as_asked_but_at_most_a_fifth(
    total: int, ratio: float, steps: int, wanted: int
) -> None:
    assert warmup_steps(total, ratio, steps) == wanted


@pytest.mark.parametrize(
    ("old_total", "old_step", "new_steps", "wanted"),
    [
        (100, 60, 300, 300),
        (100, 60, 30, 100),
        (100, 100, 30, 130),
        (100, 100, 100, 200),
        (100, 100, 300, 300),
        (100, 60, 100, 100),
        (100, 60, 60, 100),
    ],
)
def test_continued_schedule(old_total: int, old_step: int, new_steps: int, wanted: int) -> None:
    assert continued_total(old_total, old_step, new_steps) == wanted


def test_continuing_always_leaves_steps_to_train() -> None:
    for old_total in range(1, 12):
        for old_step in range(old_total + 1):
            for new in range(1, 15):
                assert continued_total(old_total, old_step, new) > old_step
