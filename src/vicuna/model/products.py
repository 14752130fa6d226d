"""The product of a few rows with a frozen weight on a CPU: what answering spends its time on.

For few rows the time goes into reading the weight. PyTorch hands fp32 products to MKL, which first
copies the weight into a layout of its own; oneDNN reads it as it lies. On an AVX2 chip these
products alone were 1.5 times as fast for one row and 1.7 times for four; from about 16 rows on
nothing is gained. `bench/decode.py` shows what it does to whole answers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 16


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (t, D) times weight (O, D) transposed, plus bias: (t, O). No gradients."""
    few = x.shape[0] <= FEW and x.device.type == "cpu" and x.dtype == torch.float32
    if few and torch.backends.mkldnn.is_available():
        # PyTorch's own operator behind torch.compile's linear layers on CPUs.
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return result
    return F.linear(x, weight, bias)
