"""The kernels: gradients are right, and the choice is made by measuring."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from vicuna.model import elementwise
from vicuna.model.elementwise import PLAIN

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    elementwise.use(PLAIN)


def test_norm_and_its_gradient() -> None:
    x = torch.randn(9, 24, dtype=torch.float64).float().requires_grad_()
    weight = torch.randn(24)
    wanted = F.rms_norm(x, (24,), weight, 1e-5)
    g = torch.randn(9, 24)
    (gradient,) = torch.autograd.grad(wanted, x, g)
    with torch.no_grad():
        rstd = PLAIN.inverse_rms(x, 1e-5)
        torch.testing.assert_close(PLAIN.rms_norm(x, rstd, weight), wanted)
        found = PLAIN.rms_norm_backward(g, x, rstd, weight)
    torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-6)


def test_swiglu_and_its_gradient() -> None:
    wide = torch.randn(5, 32, requires_grad=True)
    gate, up = wide.chunk(2, -1)
    wanted = F.silu(gate) * up
    d = torch.randn(5, 16)
    (gradient,) = torch.autograd.grad(wanted, wide, d)
    with torch.no_grad():
        torch.testing.assert_close(PLAIN.swiglu(wide), wanted)
        again, soft = PLAIN.recompute_swiglu(wide)
        torch.testing.assert_close(again, wanted)
        torch.testing.assert_close(PLAIN.swiglu_backward(d, wide, soft), gradient)
        torch.testing.assert_close(elementwise._functional_swiglu_backward(d, wide, soft), gradient)


def test_a_rotation_and_back_changes_nothing_and_equals_transformers() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    heads, angles = torch.randn(6, 3, 8), torch.randn(6, 4).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    found = heads.clone()
    PLAIN.rotate(found, cos, sin)
    wanted, _ = apply_rotary_pos_emb(heads[None].transpose(1, 2), heads[None].transpose(1, 2),
                                     cos[None], sin[None])  # fmt: skip
    torch.testing.assert_close(found, wanted[0].transpose(0, 1))
    PLAIN.rotate(found, cos, sin, True)
    torch.testing.assert_close(found, heads)


def test_a_cpu_takes_plain_kernels_unless_asked_otherwise() -> None:
    assert elementwise.choose("auto", CPU, torch.float32, 64) == ""
    assert elementwise.active() is PLAIN
    assert elementwise.choose("compiled", CPU, torch.float32, 64)
    assert elementwise.active() is not PLAIN
    assert elementwise.choose("plain", torch.device("cuda"), torch.float32, 64) == ""
    assert elementwise.active() is PLAIN


@pytest.mark.parametrize(("plain", "fast", "chosen"), [(2.0, 1.0, "compiled"), (1.0, 1.0, "plain")])
def test_a_gpu_takes_the_faster_ones(
    plain: float, fast: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elementwise, "_seconds", lambda k, *_: plain if k is PLAIN else fast)
    reason = elementwise.choose("auto", torch.device("cuda"), torch.float16, 64)
    assert (elementwise.active() is not PLAIN) == (chosen == "compiled")
    assert reason.startswith(chosen)


def test_where_nothing_compiles_plain_kernels_do_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(k: elementwise.Kernels, *_: object) -> float:
        if k is not PLAIN:
            raise RuntimeError("no compiler\nand more")
        return 1.0

    monkeypatch.setattr(elementwise, "_seconds", fail)
    reason = elementwise.choose("auto", torch.device("cuda"), torch.float16, 64)
    assert elementwise.active() is PLAIN
    assert "RuntimeError no compiler" in reason
