"""Dropout as a function of seed, step, layer and the tokens so far."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kit import tiny_model, with_adapter
from vicuna.data.sampler import mix as numpy_mix
from vicuna.model.dropout import DropoutState, PrefixDropout, install, mix

ROWS = mix(torch.arange(500))


def kept(
    p: float = 0.25, layer: int = 0, seed: int = 3, step: int = 1, width: int = 64
) -> torch.Tensor:
    state = DropoutState(seed, step, ROWS[None])
    return PrefixDropout(p, layer, state)(torch.ones(1, len(ROWS), width))[0] != 0


def test_the_hash_is_the_one_of_numpy() -> None:
    numbers = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 1000)
    wanted = numpy_mix(numbers.view(np.uint64)).view(np.int64)
    assert mix(torch.from_numpy(numbers)).tolist() == wanted.tolist()


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_the_share_kept_is_one_minus_p(p: float) -> None:
    found = kept(p).float()
    n = found.numel()
    assert found.mean().item() == pytest.approx(1 - p, abs=5 * (p * (1 - p) / n) ** 0.5)
    for axis in (0, 1):
        spread = found.mean(axis).std().item()
        assert spread == pytest.approx((p * (1 - p) / found.shape[axis]) ** 0.5, rel=0.4)


def test_what_is_kept_is_scaled_up() -> None:
    x = torch.randn(1, len(ROWS), 8)
    y = PrefixDropout(0.25, 0, DropoutState(1, 1, ROWS[None]))(x)
    torch.testing.assert_close(y[y != 0], (x / 0.75)[y != 0])


def test_seed_step_and_layer_each_change_it() -> None:
    masks = [kept(), kept(seed=4), kept(step=2), kept(layer=1), kept(seed=-(2**70))]
    for i, a in enumerate(masks):
        for b in masks[i + 1 :]:
            agreement = (a == b).float().mean().item()
            assert agreement == pytest.approx(0.75**2 + 0.25**2, abs=0.02)


def test_a_row_is_dropped_alike_wherever_it_stands() -> None:
    where = torch.randperm(len(ROWS), generator=torch.Generator().manual_seed(0))
    module = PrefixDropout(0.5, 2, DropoutState(1, 1, ROWS[where][None]))
    moved = module(torch.ones(1, len(ROWS), 64))[0] != 0
    assert torch.equal(moved, kept(0.5, layer=2, seed=1)[where])


def test_the_random_state_of_torch_does_not_matter() -> None:
    torch.manual_seed(1)
    first = kept()
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(kept(), first)
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_evaluation_and_zero_change_nothing() -> None:
    x = torch.randn(1, 4, 8)
    module = PrefixDropout(0.5, 0, DropoutState())
    assert module.eval()(x) is x
    assert PrefixDropout(0.0, 0, DropoutState())(x) is x


def test_installing_numbers_every_layer() -> None:
    peft, state = with_adapter(tiny_model("llama")), DropoutState()
    install(peft, 0.1, state)
    found = [m for m in peft.modules() if isinstance(m, PrefixDropout)]
    assert [m.layer for m in found] == list(range(14))
    assert all(m.state is state for m in found)
