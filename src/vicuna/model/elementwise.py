"""The arithmetic on elements of a decoder layer: norm, SwiGLU, rotary embedding, both ways.

Written in plain PyTorch, in as few passes as it allows. On a GPU, where each pass is a kernel of
its own, the same functions compiled by torch.compile make one kernel of each; `choose` measures
both on the device at the model's width and takes the faster. On a CPU compiling takes longer than
it saves in most runs, so it is only done when asked for.

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

Wanted = Literal["auto", "plain", "compiled"]


def rms(x: Tensor, eps: float) -> Tensor:
    """1 / root mean square of each row: float32 (..., 1) (arXiv 1910.07467)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return (norm.square() / x.shape[-1] + eps).rsqrt()


def normalised(x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """x * rstd * weight, rounded where transformers rounds."""
    if x.dtype == torch.float32:
        return torch.mul(x, rstd).mul_(weight)
    return (x.float() * rstd).to(x.dtype).mul_(weight)


def norm_backward(g: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """The gradient of `normalised` with respect to x, given that of its result.

    With n = x rstd:  dx = rstd (g w - n mean(g w n))
    """
    wide = g.float() * weight.float()
    rows = x.float()
    inner = (wide * rows).sum(-1, keepdim=True)
    inner = inner * (rstd * rstd) / -x.shape[-1]
    return wide.addcmul_(rows, inner).mul_(rstd).to(g.dtype)


def swiglu(wide: Tensor) -> Tensor:
    """silu(gate) * up of (T, 2 I), gate and up side by side: (T, I) (arXiv 2002.05202)."""
    gate, up = wide.chunk(2, -1)
    return F.silu(gate).mul_(up)


def swiglu_again(wide: Tensor) -> tuple[Tensor, Tensor]:
    """For backward: `swiglu` once more, and silu(gate), both (T, I)."""
    gate, up = wide.chunk(2, -1)
    soft = F.silu(gate)
    return soft * up, soft


def swiglu_backward(d: Tensor, wide: Tensor, soft: Tensor) -> Tensor:
    """The gradient of `swiglu` with respect to `wide`, given that of its result d (T, I)."""
    gate, up = wide.chunk(2, -1)
    result = torch.empty_like(wide)
    dgate, dup = result.chunk(2, -1)
    torch.mul(d, soft, out=dup)
    torch.ops.aten.silu_backward.grad_input(d * up, gate, grad_input=dgate)
    return result


def rotate(heads: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> None:
    """Rotate (T, H, D) in place by the angles of its rows; `back` is the transpose (arXiv
    2104.09864).

    cos, sin: (T, D), both halves of a head with angles of their own, as transformers gives them.
    """
    half = heads.shape[-1] // 2
    first, second = heads[..., :half], heads[..., half:]
    cos1, cos2 = cos[:, None, :half], cos[:, None, half:]
    sin1, sin2 = sin[:, None, :half], sin[:, None, half:]
    before = first.clone()
    if back:
        first.mul_(cos1).addcmul_(second, sin2)
        second.mul_(cos2).addcmul_(before, sin1, value=-1)
    else:
        first.mul_(cos1).addcmul_(second, sin1, value=-1)
        second.mul_(cos2).addcmul_(before, sin2)


@dataclass(frozen=True)
class Kernels:
    """One implementation of each; `reason` says why this one."""

    rms: Callable[[Tensor, float], Tensor]
    normalised: Callable[[Tensor, Tensor, Tensor], Tensor]
    norm_backward: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    swiglu: Callable[[Tensor], Tensor]
    swiglu_again: Callable[[Tensor], tuple[Tensor, Tensor]]
    swiglu_backward: Callable[[Tensor, Tensor, Tensor], Tensor]
    rotate: Callable[..., None]
    reason: str


PLAIN = Kernels(
    rms, normalised, norm_backward, swiglu, swiglu_again, swiglu_backward, rotate,
    reason="plain PyTorch",
)  # fmt: skip


def compiled(reason: str = "compiled, as asked for") -> Kernels:
    """The same, each function made one kernel by torch.compile; compiled when first called."""
    # The functional form of swiglu's gradient: a compiler needs no buffers to write into.
    fused: tuple[Any, ...] = (
        rms, normalised, norm_backward, swiglu, swiglu_again, _swiglu_backward, rotate,
    )  # fmt: skip
    made: dict[str, Any] = {
        field.name: torch.compile(f, dynamic=True) for field, f in zip(fields(Kernels), fused)
    }
    return Kernels(**made, reason=reason)


def _swiglu_backward(d: Tensor, wide: Tensor, soft: Tensor) -> Tensor:
    gate, up = wide.chunk(2, -1)
    return torch.cat([torch.ops.aten.silu_backward(d * up, gate), d * soft], -1)


def choose(wanted: Wanted, device: torch.device, dtype: torch.dtype, width: int) -> Kernels:
    """The kernels to use; on a GPU the faster ones for rows of `width` (the MLP's inner width)."""
    if wanted == "plain":
        return PLAIN
    if wanted == "compiled":
        return compiled()
    if device.type != "cuda":
        return PLAIN
    try:
        fast = compiled()
        ratio = _seconds(PLAIN, device, dtype, width) / _seconds(fast, device, dtype, width)
    except Exception as e:  # no compiler, no Triton: whatever it is, plain PyTorch does the work
        words = (str(e).strip().splitlines() or [""])[0]
        return _because(PLAIN, f"plain PyTorch: torch.compile failed ({type(e).__name__} {words})")
    if ratio < 1.05:
        return _because(PLAIN, f"plain PyTorch: compiled kernels measured {ratio:.2f} x as fast")
    return _because(fast, f"compiled kernels, measured {ratio:.1f} x as fast as plain PyTorch")


def _because(kernels: Kernels, reason: str) -> Kernels:
    return Kernels(**{**kernels.__dict__, "reason": reason})


def _seconds(kernels: Kernels, device: torch.device, dtype: torch.dtype, width: int) -> float:
    """Best of five: SwiGLU there and back over 1,024 rows."""
    wide = torch.randn(1024, 2 * width, device=device, dtype=dtype)
    d = torch.randn(1024, width, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        kernels.swiglu_backward(d, wide, kernels.swiglu_again(wide)[1])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best
