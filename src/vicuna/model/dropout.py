"""Dropout that is a function of (seed, step, layer, the tokens so far), not of a generator's state.

The same token after the same prefix is dropped alike however its example was packed, whether its
prefix was shared, and whether the run was interrupted; no random state needs saving.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


def _i64(x: int) -> int:
    """The low 64 bits of x as a signed integer, as torch's int64 arithmetic wraps."""
    x &= 0xFFFFFFFFFFFFFFFF
    return x - (1 << 64) if x >> 63 else x


_GAMMA, _M1, _M2 = (_i64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 tensors of any shape."""
    x = x + _GAMMA
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _M1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _M2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@dataclass
class DropoutState:
    """What all dropouts of a model share: set before each forward pass.

    rows: int64, a hash of the tokens up to each position, in the shape of the input ids.
    active: whether any dropout is installed.
    """

    seed: int = 0
    step: int = 0
    rows: Tensor | None = None
    active: bool = False


class PrefixDropout(nn.Module):
    """Dropout with probability p; identity in evaluation mode."""

    def __init__(self, p: float, layer: int, state: DropoutState) -> None:
        super().__init__()
        self.p, self.layer, self.state = p, layer, state

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D), its leading shape that of `state.rows`."""
        if not self.training or self.p == 0.0:
            return x
        assert self.state.rows is not None, "set the rows' hashes before a forward pass"
        return self.masked(x, self.state.rows)

    def masked(self, x: Tensor, rows: Tensor) -> Tensor:
        """x: (..., D) with the mask of `rows`, int64 hashes in its leading shape."""
        key = torch.tensor([_i64(self.state.seed), self.state.step, self.layer], device=x.device)
        salt = mix(mix(mix(key[0]) ^ key[1]) ^ key[2])
        columns = mix(torch.arange(x.shape[-1], device=x.device))
        bits = mix((rows ^ salt)[..., None] ^ columns)
        # The upper 24 bits as a number in [0, 1), exact in float32.
        uniform = ((bits >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24
        kept = (uniform >= self.p).to(x.dtype)
        return x * kept / (1.0 - self.p)


def install(model: nn.Module, p: float, state: DropoutState) -> None:
    """Put a PrefixDropout into every LoRA layer of a PEFT model."""
    from peft.tuners.lora import LoraLayer

    layers = (m for m in model.modules() if isinstance(m, LoraLayer))
    state.active = p > 0
    for number, module in enumerate(layers):
        for name in module.lora_dropout:
            module.lora_dropout[name] = PrefixDropout(p, number, state)
