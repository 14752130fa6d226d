"""The chunked loss is torch's cross-entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vicuna.model.loss import cross_entropy_sum


@pytest.mark.parametrize("chunk", [1, 7, 512])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("with_bias", [False, True])
def test_value_and_gradient(
    chunk: int, softcap: float | None, scale: float, with_bias: bool
) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(30, 16, dtype=torch.float32, requires_grad=True)
    head, targets, weights = torch.randn(50, 16), torch.randint(0, 50, (30,)), torch.rand(30) * 3
    bias = torch.randn(50) if with_bias else None
    logits = (hidden @ head.t() + (bias if bias is not None else 0)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    wanted = (F.cross_entropy(logits, targets, reduction="none") * weights).sum()
    (gradient,) = torch.autograd.grad(wanted, hidden)
    found = cross_entropy_sum(
        hidden, head, targets, weights, bias=bias, softcap=softcap, logit_scale=scale, chunk=chunk
    )
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    (found_gradient,) = torch.autograd.grad(found, hidden)
    assert torch.allclose(found_gradient, gradient, rtol=1e-4, atol=1e-5)


def test_without_gradients_only_the_value_is_made() -> None:
    hidden, head = torch.randn(4, 8), torch.randn(9, 8)
    found = cross_entropy_sum(hidden, head, torch.zeros(4, dtype=torch.long), torch.ones(4))
    assert not found.requires_grad
