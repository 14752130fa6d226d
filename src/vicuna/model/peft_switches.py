"""Which adapters of a PEFT model count now, read from its layers.

PEFT switches adapters in many ways (`disable_adapter`, `set_adapter`, `merge_adapter`, `set_scale`,
`load_adapter`, `delete_adapter`, ...), and all of them leave their mark on the layers alone. Our
own forward passes keep what follows from that mark, so they compare it before they compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vicuna.errors import UserError

# What is kept of a layer: whether its adapters are off, which are merged, which are active with
# their scale and their weights.
Mark = tuple[Any, ...]


def mark(layer: Any) -> Mark:
    """How the switches of one LoRA layer stand. Equal marks: the layer computes the same."""
    low, high, scaling = layer.lora_A, layer.lora_B, layer.scaling
    active = []
    for name in layer.active_adapters:
        if name in scaling and name in low:
            a, b = low[name].weight, high[name].weight
            active.append((name, scaling[name], a, _version(a), b, _version(b)))
    return layer.disable_adapters, tuple(layer.merged_adapters), tuple(active)


def _version(weight: Any) -> int:
    """Counts up when a weight is written to; those made in inference mode do not count."""
    return -1 if weight.is_inference() else int(weight._version)


def same(before: Sequence[Mark], now: Sequence[Mark]) -> bool:
    """Whether marks are equal. Weights are compared by identity: they are not looked into."""
    return len(before) == len(now) and all(map(_same, before, now))


def _same(one: Mark, other: Mark) -> bool:
    if one[:2] != other[:2] or len(one[2]) != len(other[2]):
        return False
    return all(
        a[0] == b[0] and a[1] == b[1] and a[2] is b[2] and a[3] == b[3]
        and a[4] is b[4] and a[5] == b[5]
        for a, b in zip(one[2], other[2])
    )  # fmt: skip


def active(layer: Any) -> list[str]:
    """The adapters that a LoRA layer adds to its base, in PEFT's order.

    Raises: UserError where one of them is more than a LoRA, which our forward does not compute.
    """
    if layer.disable_adapters or layer.merged:
        return []
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    for name in names:
        kind = layer.lora_variant.get(name)
        if kind is None and layer.lora_B[name].bias is None:
            continue
        what = "has biases" if kind is None else f"is a variant of LoRA ({type(kind).__name__})"
        raise UserError(
            "the adapter {name} {details}, which is not supported",
            name=name,
            details=what,
            where="adapter",
            fix="Switch it off (PEFT's disable_adapter or set_adapter), or merge it.",
        )
    return names


class Watch:
    """The LoRA layers of a model, and how they stood when they were last looked at."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._layers = _lora_layers(model)
        self._marks = [mark(layer) for layer in self._layers]

    def changed(self, search: bool = False) -> bool:
        """Whether something was switched since the last look.

        Args:
            search: look for layers that came or went, too, which takes longer.
        """
        before, old = self._marks, self._layers
        if search:
            self._layers = _lora_layers(self._model)
        self._marks = [mark(layer) for layer in self._layers]
        return not (_identical(old, self._layers) and same(before, self._marks))


def _identical(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others))


def _lora_layers(model: Any) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    return [m for m in model.modules() if isinstance(m, LoraLayer)]
