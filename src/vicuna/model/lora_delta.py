"""What LoRA adapters add to the weights of their base, matrix by matrix.

addition = Addition(read_adapter("runs/demo"))
merged = addition.to("model.layers.0.self_attn.q_proj.weight", weight)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass

from torch import Tensor

from vicuna.errors import UserError
from vicuna.model import adapter_fit
from vicuna.model.adapter import AdapterFiles
from vicuna.weights.read import ALL

_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class _Part:
    """What one adapter adds to one matrix: scale * B (out, r) @ A (r, in)."""

    adapter: AdapterFiles
    a: Tensor
    b: Tensor
    scale: float


class Addition:
    """The products B A of adapters, scaled and summed, each computed when it is asked for.

    Args:
        adapters: one, or several, each with what it counts with.
    """

    def __init__(self, adapters: AdapterFiles | Iterable[tuple[AdapterFiles, float]]) -> None:
        several = [(adapters, 1.0)] if isinstance(adapters, AdapterFiles) else list(adapters)
        self._adapters = [adapter for adapter, _ in several]
        self._rows = ALL
        self._parts: dict[str, list[_Part]] = {}
        for adapter, weight in several:
            for module, (a, b) in adapter.pairs().items():
                part = _Part(adapter, a, b, adapter.lora.scale_of(module) * weight)
                self._parts.setdefault(f"{module}.weight", []).append(part)

    @property
    def names(self) -> set[str]:
        """The weights it changes, under the base's names."""
        return set(self._parts)

    def check(self, weights: Mapping[str, tuple[int, ...]], tied: bool) -> None:
        """Refuse a base that lacks a weight which an adapter changes, or has it in another shape.

        Args:
            weights: the shapes of the base's, by name.
            tied: whether its output matrix is its embedding.

        Raises: UserError that says in what they differ.
        """
        if tied and _HEAD in self._parts:
            raise UserError(
                "the adapter changes the output matrix, which this base shares with its embedding",
                where=f"adapter {self._adapters[0].path}",
                fix="vicuna merge gives the result an output matrix of its own; export that.",
            )
        held = {n.removesuffix(".weight"): s for n, s in weights.items() if len(s) == 2}
        for adapter in self._adapters:
            if adapter.config.get("fan_in_fan_out"):
                raise UserError(
                    "this adapter belongs to layers whose weights lie transposed (fan_in_fan_out), "
                    "as in GPT-2: it can be used, but not merged",
                    where=f"adapter {adapter.path}",
                    fix="Use --model BASE --adapter ADAPTER, or merge it with PEFT.",
                )
            adapter_fit.check(adapter, held)

    def of_rows(self, rows: slice) -> Addition:
        """The same for some rows of a weight, where it is read in parts."""
        some = copy(self)
        some._rows = rows
        return some

    def to(self, name: str, weight: Tensor) -> Tensor:
        """A weight (out, in) of the base with what the adapters add, in float32; unchanged, and in
        its own type, where they add nothing. `check` has seen that the shapes fit."""
        merged = weight
        for part in self._parts.get(name, ()):
            b = part.b[self._rows].float()
            merged = merged.float().addmm(b, part.a.float(), alpha=part.scale)
        return merged
