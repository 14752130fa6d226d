"""What LoRA adapters add to the weights of their base, matrix by matrix.

addition = Addition(read_adapter("runs/demo"))
merged = addition.to("model.layers.0.self_attn.q_proj.weight", weight)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from vicuna.errors import UserError
from vicuna.model.adapter import AdapterFiles

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
        self._first = several[0][0]
        self._parts: dict[str, list[_Part]] = {}
        for adapter, weight in several:
            for module, (a, b) in adapter.pairs().items():
                part = _Part(adapter, a, b, adapter.scale * weight)
                self._parts.setdefault(f"{module}.weight", []).append(part)

    @property
    def names(self) -> set[str]:
        """The weights it changes, under the base's names."""
        return set(self._parts)

    def check(self, weights: set[str], tied: bool) -> None:
        """Refuse a base that lacks a weight which an adapter changes.

        Args:
            weights: the base's, by name.
            tied: whether its output matrix is its embedding.

        Raises: UserError naming the weight.
        """
        if tied and _HEAD in self._parts:
            raise UserError(
                "the adapter changes the output matrix, which this base shares with its embedding",
                where=f"adapter {self._first.path}",
                fix="vicuna merge gives the result an output matrix of its own; export that.",
            )
        lacking = sorted(self.names - weights)
        if lacking:
            raise self._misfit(lacking[0], f"{lacking[0]} has no counterpart")

    def to(self, name: str, weight: Tensor) -> Tensor:
        """A weight (out, in) of the base with what the adapters add, in float32; unchanged, and in
        its own type, where they add nothing.

        Raises: UserError where the shapes do not fit.
        """
        merged = weight
        for part in self._parts.get(name, ()):
            shape = (part.b.shape[0], part.a.shape[1])
            if tuple(weight.shape) != shape:
                raise self._misfit(
                    name, f"{name} is {tuple(weight.shape)} there, {shape} in the adapter"
                )
            merged = merged.float().addmm(part.b.float(), part.a.float(), alpha=part.scale)
        return merged

    def _misfit(self, name: str, why: str) -> UserError:
        path = self._parts[name][0].adapter.path
        return UserError(
            f"the adapter does not fit this base: {why}",
            where=f"adapter {path}",
            fix="Use the base it was trained on (adapter_config.json names it).",
        )
