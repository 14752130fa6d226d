"""The learning rate, warm-up and the rule of incremental training."""

from __future__ import annotations

import pytest

from vicuna.train.optimizer import Schedule, continued_total, warmup_steps


def test_linear_rises_then_falls() -> None:
    s = Schedule("linear", 1.0, total=10, warmup=2)
    assert [round(s.rate(k), 4) for k in range(10)] == [
        0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125,
    ]  # fmt: skip


def test_cosine_and_constant() -> None:
    assert Schedule("cosine", 2.0, 10, 0).rate(5) == pytest.approx(1.0)
    assert Schedule("constant", 2.0, 10, 0).rate(9) == 2.0


def test_no_step_is_without_learning() -> None:
    for kind in ("linear", "cosine", "constant"):
        for total in (1, 2, 3, 50):
            s = Schedule(kind, 1.0, total, warmup_steps(total, 0.5, 0))
            assert all(s.rate(k) > 0 for k in range(total))


def test_a_short_run_does_not_spend_its_life_warming_up() -> None:
    assert warmup_steps(1000, 0.03, 0) == 30
    assert warmup_steps(1000, 0.03, 100) == 100
    assert warmup_steps(9, 0.03, 100) == 1
    assert warmup_steps(3, 0.03, 100) == 0


@pytest.mark.parametrize(
    ("old_total", "old_step", "new_steps", "total"),
    [
        (1000, 400, 300, 1000),  # the new data is shorter: the old schedule goes on
        (1000, 400, 1500, 1500),  # it is longer: its own number of steps
        (1000, 1000, 300, 1300),  # the old run was finished: stretched by the new data
        (1000, 1000, 1000, 2000),
    ],
)
def test_the_rule_of_incremental_training(
    old_total: int, old_step: int, new_steps: int, total: int
) -> None:
    assert continued_total(old_total, old_step, new_steps) == total
