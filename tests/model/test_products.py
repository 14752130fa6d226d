"""Products of rows with frozen weights, plain and laid out for oneDNN."""

from __future__ import annotations

import pytest
import torch

from vicuna.model import linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 4, 40])
@pytest.mark.parametrize("biased", [False, True])
def test_a_product_is_the_linear_layers(dtype: torch.dtype, rows: int, biased: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 48).to(dtype), torch.randn(80, 48).to(dtype)
    bias = torch.randn(80).to(dtype) if biased else None
    right = torch.nn.functional.linear(
        x.double(), weight.double(), None if bias is None else bias.double()
    )
    near = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.1}
    assert torch.allclose(linear.onednn_linear(x, weight, bias).double(), right, **near)
    packed = linear.pack_weight(weight)
    if packed is not None:
        assert torch.allclose(linear.onednn_linear(x, packed, bias).double(), right, **near)
    else:
        assert dtype != torch.float32 or not torch.backends.mkldnn.is_available()


def test_what_cannot_be_laid_out_is_left_alone() -> None:
    assert linear.pack_weight(torch.empty(4, 4, device="meta")) is None
    assert linear.pack_weight(torch.ones(4, 4, dtype=torch.int8)) is None
