"""The chunked loss equals PyTorch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vicuna.train.loss import cross_entropy_sum

CASES: list[dict[str, Any]] = [
    {},
    {"softcap": 3.0},
    {"logit_scale": 0.25},
    {"softcap": 2.0, "logit_scale": 1.7},
]


def inputs(rows: int = 37, seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 16, generator=g)
    head = torch.randn(53, 16, generator=g)
    bias = torch.randn(53, generator=g)
    targets = torch.randint(0, 53, (rows,), generator=g)
    weights = torch.randint(1, 4, (rows,), generator=g).float()
    return hidden, head, bias, targets, weights


def plain(
    hidden: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    weights: torch.Tensor,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> torch.Tensor:
    logits = F.linear(hidden, head, bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 36, 37, 512])
def test_loss_and_gradient_equal_torchs(case: dict[str, Any], biased: bool, chunk: int) -> None:
    hidden, head, bias, targets, weights = inputs()
    offset = bias if biased else None
    ours, theirs = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    loss = cross_entropy_sum(ours, head, targets, weights, bias=offset, chunk=chunk, **case)
    wanted = plain(
        theirs, head.double(), bias.double() if biased else None, targets, weights.double(), **case
    )
    (loss * 0.3).backward()
    (wanted * 0.3).backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


def test_a_weight_counts_a_row_that_often() -> None:
    hidden, head, _, targets, _ = inputs(4)
    twice = cross_entropy_sum(hidden, head, targets, torch.tensor([2.0, 1.0, 1.0, 1.0]))
    again = torch.tensor([0, 0, 1, 2, 3])
    repeated = cross_entropy_sum(hidden[again], head, targets[again], torch.ones(5))
    assert twice.item() == pytest.approx(repeated.item(), rel=1e-6)


def test_no_rows_cost_nothing() -> None:
    hidden, head, _, targets, weights = inputs(3)
    empty = hidden[:0].requires_grad_()
    loss = cross_entropy_sum(empty, head, targets[:0], weights[:0])
    loss.backward()
    assert loss.item() == 0.0


def test_no_gradient_is_made_where_none_is_wanted() -> None:
    hidden, head, _, targets, weights = inputs()
    hidden.requires_grad_()
    with torch.no_grad():
        loss = cross_entropy_sum(hidden, head, targets, weights)
    assert not loss.requires_grad


def test_a_large_logit_does_not_overflow() -> None:
    hidden, head, _, targets, weights = inputs()
    loss = cross_entropy_sum(hidden * 1e3, head, targets, weights)
    wanted = plain(hidden.double() * 1e3, head.double(), None, targets, weights.double())
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_bf16_is_summed_in_fp32() -> None:
    hidden, head, _, targets, weights = inputs()
    low, low_head = hidden.bfloat16().requires_grad_(), head.bfloat16()
    loss = cross_entropy_sum(low, low_head, targets, weights)
    loss.backward()
    wanted = plain(low.detach().float(), low_head.float(), None, targets, weights)
    assert loss.dtype == torch.float32
    assert low.grad is not None
    assert low.grad.dtype == torch.bfloat16
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-2)
