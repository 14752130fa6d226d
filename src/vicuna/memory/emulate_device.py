"""Tensors without data take the way that a device's tensors take.

Where the training step chooses by the device of its tensors (how attention is computed, how many
rows at a time), `as_on` makes tensors on `meta` choose as if they were on the device planned for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vicuna.memory.devices import Device
from vicuna.memory.meta_layers import attention_on, fused_attention
from vicuna.model import attention, layers, llama, loss, trainable
from vicuna.model.attention_layout import AttentionShape, PackLayout

Attend = Callable[[Tensor, AttentionShape, PackLayout], Tensor]


@contextmanager
def as_on(device: Device) -> Iterator[None]:
    """For as long as the context is open, `meta` stands for `device`. Not for several threads."""
    by_device: list[tuple[dict[str, Any], Any]] = [
        (layers.ROW_CHUNK, 2048), (loss.CHUNK, 512), (loss.SLICE, 512), (loss.ROOM, False),
        (trainable.STEP, 1),
    ]  # fmt: skip
    before = [table["meta"] for table, _ in by_device]
    attend, plain = llama.attend, F.scaled_dot_product_attention
    for table, otherwise in by_device:
        table["meta"] = table.get(device.kind, otherwise)
    setattr(F, "scaled_dot_product_attention", attention_on(device))  # noqa: B010  for mypy
    if device.kind != "cpu":
        setattr(llama, "attend", _attend_on(device))  # noqa: B010
    try:
        yield
    finally:
        for (table, _), value in zip(by_device, before):
            table["meta"] = value
        setattr(llama, "attend", attend)  # noqa: B010
        setattr(F, "scaled_dot_product_attention", plain)  # noqa: B010


def _attend_on(device: Device) -> Attend:
    """`attention.attend`'s way on a GPU."""

    def attend(qkv: Tensor, shape: AttentionShape, layout: PackLayout) -> Tensor:
        q, k, v = shape.split(qkv)
        if device.capability < (8, 0):
            return attention.segments(q, k, v, shape, layout).flatten(1)
        # `varlen` and `flex`: one kernel for the whole pack, whatever its segments.
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        return fused_attention(q, k, v, "flash")[0].transpose(0, 1).flatten(1)

    return attend
