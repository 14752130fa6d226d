"""What a LoRA adapter adds to the weights of its base, matrix by matrix.

addition = Addition(read_adapter("runs/demo"))
merged = addition.to("model.layers.0.self_attn.q_proj.weight", weight)
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from vicuna.errors import UserError
from vicuna.model.adapter import AdapterFiles


class Addition:
    """The products B A of an adapter, scaled, each computed when it is asked for."""

    def __init__(self, adapter: AdapterFiles) -> None:
        self._path, self._scale = adapter.path, adapter.scale
        self._pairs = {f"{module}.weight": pair for module, pair in adapter.pairs().items()}

    def check(self, weights: Iterable[str], tied: bool) -> None:
        """Refuse a base that lacks a weight which the adapter changes.

        Args:
            weights: the base's, by name.
            tied: whether its output matrix is its embedding.

        Raises: UserError naming the weight.
        """
        if tied and "lm_head.weight" in self._pairs:
            raise UserError(
                "the adapter changes the output matrix, which this base shares with its embedding",
                where=f"adapter {self._path}",
                fix="Merging it would change the embedding, too; train without lm_head.",
            )
        lacking = sorted(set(self._pairs) - set(weights))
        if lacking:
            raise self._unfit(f"{lacking[0]} has no counterpart")

    def to(self, name: str, weight: Tensor) -> Tensor:
        """A weight (out, in) of the base with what the adapter adds, in float32; unchanged, and in
        its own type, where the adapter adds nothing.

        Raises: UserError where the shapes do not fit.
        """
        if name not in self._pairs:
            return weight
        a, b = (side.float() for side in self._pairs[name])
        made = (b.shape[0], a.shape[1])
        if weight.shape != made:
            raise self._unfit(f"{name} is {tuple(weight.shape)} there, {made} in the adapter")
        return weight.float().addmm(b, a, alpha=self._scale)

    def _unfit(self, why: str) -> UserError:
        return UserError(
            f"the adapter does not fit this base: {why}",
            where=f"adapter {self._path}",
            fix="Use the base it was trained on (adapter_config.json names it).",
        )
