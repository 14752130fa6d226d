"""What suits a device: constants that change memory and speed, never a result."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tuning:
    """The constants of one kind of device.

    mlp_rows: rows computed at a time in an MLP, so that its widest temporaries stay in the cache,
    or small. loss_rows: rows whose logits exist at a time. softmax_rows: rows of those whose
    softmax is computed at a time; in float32 they must fit a CPU's cache. share_logits: whether the
    logits of all packs lie in one piece of memory, which otherwise is taken from the system for
    each pack, and its pages cleared. pad_rows: packs are padded to a multiple of it if oneDNN
    computes their products, which it does for short types on a CPU: it compiles and keeps a kernel
    for each shape.
    """

    mlp_rows: int = 2048
    loss_rows: int = 512
    softmax_rows: int = 512
    share_logits: bool = False
    pad_rows: int = 1

    @classmethod
    def of(cls, device: torch.device | str) -> Tuning:
        """The constants of a device; those of a CUDA GPU if its kind is not known."""
        return _BY_KIND.get(torch.device(device).type, _CUDA)


_CUDA = Tuning()
_BY_KIND = {
    "cpu": Tuning(mlp_rows=512, loss_rows=256, softmax_rows=24, share_logits=True, pad_rows=64),
    "mps": Tuning(mlp_rows=1024),
}
