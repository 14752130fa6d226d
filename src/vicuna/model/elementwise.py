"""The elementwise arithmetic of a decoder layer: RMS norm, SwiGLU, rotary embedding, both ways.

Written in plain PyTorch, in as few passes as it allows. On a GPU, where each pass is a kernel of
its own, torch.compile makes one kernel of each function; `choose` measures both on the device at
the model's width and switches to the faster. On a CPU compiling takes longer than it saves in most
runs, so it is only done when asked for.

Liger's Triton kernels are not used: they expect gate and up in separate buffers of one stride, and
here both are one product's output, side by side. They fuse what torch.compile fuses.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

KernelSetting = Literal["auto", "plain", "compiled"]


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / root mean square of each row (Zhang and Sennrich 2019, arXiv 1910.07467).

    Args:
        x: (..., D) of any float dtype.

    Returns: float32 (..., 1).
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return (norm.square() / x.shape[-1] + eps).rsqrt()


def rms_norm(x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """x * rstd * weight, rounded where transformers rounds.

    Args:
        x: (..., D). rstd: float32 (..., 1), from `inverse_rms`. weight: (D,), of x's dtype.
    """
    if x.dtype == torch.float32:
        return torch.mul(x, rstd).mul_(weight)
    return (x.float() * rstd).to(x.dtype).mul_(weight)


def rms_norm_backward(g: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """The gradient of `rms_norm` with respect to x, given that of its result g (..., D).

    With n = x rstd:  dx = rstd (g w - n mean(g w n))
    """
    wide = g.float() * weight.float()
    rows = x.float()
    inner = (wide * rows).sum(-1, keepdim=True)
    inner = inner * (rstd * rstd) / -x.shape[-1]
    return wide.addcmul_(rows, inner).mul_(rstd).to(g.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202).

    Args:
        gate_up: (T, 2 I), gate and up side by side.

    Returns: (T, I).
    """
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def recompute_swiglu(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """For backward: `swiglu` once more, and silu(gate), both (T, I)."""
    gate, up = gate_up.chunk(2, -1)
    silu = F.silu(gate)
    return silu * up, silu


def swiglu_backward(d: Tensor, gate_up: Tensor, silu: Tensor) -> Tensor:
    """The gradient of `swiglu` with respect to gate_up (T, 2 I), given that of its result d (T, I).

    Args:
        silu: (T, I), from `recompute_swiglu`.
    """
    gate, up = gate_up.chunk(2, -1)
    result = torch.empty_like(gate_up)
    dgate, dup = result.chunk(2, -1)
    torch.mul(d, silu, out=dup)
    torch.ops.aten.silu_backward.grad_input(d * up, gate, grad_input=dgate)
    return result


def _functional_swiglu_backward(d: Tensor, gate_up: Tensor, silu: Tensor) -> Tensor:
    """`swiglu_backward` for a compiler, which needs no buffers to write into."""
    gate, up = gate_up.chunk(2, -1)
    return torch.cat([torch.ops.aten.silu_backward(d * up, gate), d * silu], -1)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor, backward: bool = False) -> None:
    """Rotary embedding in place; `backward` is the transpose (Su et al. 2021, arXiv 2104.09864).

    Args:
        heads: (T, H, D). cos, sin: (T, D), both halves of a head with angles of their own, as
            transformers gives them.
    """
    half = heads.shape[-1] // 2
    first, second = heads[..., :half], heads[..., half:]
    cos1, cos2 = cos[:, None, :half], cos[:, None, half:]
    sin1, sin2 = sin[:, None, :half], sin[:, None, half:]
    before = first.clone()
    if backward:
        first.mul_(cos1).addcmul_(second, sin2)
        second.mul_(cos2).addcmul_(before, sin1, value=-1)
    else:
        first.mul_(cos1).addcmul_(second, sin1, value=-1)
        second.mul_(cos2).addcmul_(before, sin2)


# -- plain or compiled -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernels:
    """One implementation of each of the functions above."""

    inverse_rms: Callable[[Tensor, float], Tensor]
    rms_norm: Callable[[Tensor, Tensor, Tensor], Tensor]
    rms_norm_backward: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    swiglu: Callable[[Tensor], Tensor]
    recompute_swiglu: Callable[[Tensor], tuple[Tensor, Tensor]]
    swiglu_backward: Callable[[Tensor, Tensor, Tensor], Tensor]
    rotate: Callable[..., None]


PLAIN = Kernels(
    inverse_rms, rms_norm, rms_norm_backward, swiglu, recompute_swiglu, swiglu_backward, rotate
)
_active = PLAIN


def active() -> Kernels:
    """The kernels that this process computes with: plain, until `choose` switches."""
    return _active


def use(kernels: Kernels) -> None:
    """Compute with these from now on, in the whole process."""
    global _active
    _active = kernels


def compiled() -> Kernels:
    """Each function made one kernel by torch.compile, when it is first called."""
    functions: tuple[Any, ...] = (
        inverse_rms, rms_norm, rms_norm_backward, swiglu, recompute_swiglu,
        _functional_swiglu_backward, rotate,
    )  # fmt: skip
    names = [field.name for field in fields(Kernels)]
    return Kernels(**{n: torch.compile(f, dynamic=True) for n, f in zip(names, functions)})


def choose(setting: KernelSetting, device: torch.device, dtype: torch.dtype, width: int) -> str:
    """Switch to the kernels of a setting; `auto` on a GPU: the faster ones at an MLP's inner width.

    Returns: what was chosen and why, in words; "" if there was nothing to choose.
    """
    use(PLAIN)
    if setting == "plain" or (setting == "auto" and device.type != "cuda"):
        return ""
    fast = compiled()
    if setting == "compiled":
        use(fast)
        return "compiled, as asked for"
    try:
        ratio = _seconds(PLAIN, device, dtype, width) / _seconds(fast, device, dtype, width)
    except Exception as e:  # no compiler, no Triton: whatever it is, plain PyTorch does the work
        reason = (str(e).strip().splitlines() or [""])[0]
        return f"plain PyTorch: torch.compile failed ({type(e).__name__} {reason})"
    if ratio < 1.05:
        return f"plain PyTorch: compiled kernels measured {ratio:.2f} x as fast"
    use(fast)
    return f"compiled kernels, measured {ratio:.1f} x as fast as plain PyTorch"


def _seconds(kernels: Kernels, device: torch.device, dtype: torch.dtype, width: int) -> float:
    """Best of five: SwiGLU there and back over 1,024 rows."""
    gate_up = torch.randn(1024, 2 * width, device=device, dtype=dtype)
    d = torch.randn(1024, width, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        kernels.swiglu_backward(d, gate_up, kernels.recompute_swiglu(gate_up)[1])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best
