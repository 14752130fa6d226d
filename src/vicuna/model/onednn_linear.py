"""The product of rows with a frozen weight on a CPU: what answering spends its time on.

For few rows the time goes into reading the weight. PyTorch hands fp32 products to MKL, which first
copies the weight into a layout of its own; oneDNN reads it as it lies, and reads one that was laid
out for it beforehand (`packed`) faster still. `bench/decode.py` shows what that does to whole
answers.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 16


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (t, D) times weight (O, D) transposed, plus bias: (t, O). No gradients.

    Args:
        weight: plain, or from `packed`.
    """
    if weight.is_mkldnn:
        return _onednn(x, weight, bias)
    few = x.shape[0] <= FEW and x.device.type == "cpu" and x.dtype == torch.float32
    if few and torch.backends.mkldnn.is_available():
        return _onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def packed(weight: Tensor) -> Tensor | None:
    """A copy of a weight (O, D) in the layout that oneDNN reads fastest; only `product` reads it.

    None where this machine has nothing to gain: no CPU, or a type oneDNN does not compute in.
    """
    if weight.device.type != "cpu" or not _packs(weight.dtype):
        return None
    result: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), FEW)
    return result


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # PyTorch's own operator behind torch.compile's linear layers on CPUs.
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


@lru_cache
def _packs(dtype: torch.dtype) -> bool:
    """Whether a packed weight of this type gives the product it should: tried, not guessed."""
    if not torch.backends.mkldnn.is_available() or not dtype.is_floating_point:
        return False
    grid = torch.arange(16 * 32, dtype=torch.float32).view(16, 32).sin()
    weight, x = grid.to(dtype), grid[:2].to(dtype)
    try:
        tried = _onednn(x, torch.ops.mkldnn._reorder_linear_weight(weight, FEW), None)
    except RuntimeError:
        return False
    return torch.allclose(tried.float(), F.linear(x.float(), weight.float()), atol=0.1)
