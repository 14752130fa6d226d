"""What a LoRA adapter adds to the weights of its base, matrix by matrix.

addition = Addition(read_adapter("runs/demo"))
merged = addition.to("model.layers.0.self_attn.q_proj.weight", weight)
"""

from __future__ import annotations

from torch import Tensor

from vicuna.errors import UserError
from vicuna.model.adapter import AdapterFiles

_LEAD = "base_model.model."


class Addition:
    """The products B A of an adapter, scaled, each computed when it is asked for."""

    def __init__(self, adapter: AdapterFiles) -> None:
        lora = adapter.lora
        self._adapter = adapter
        self._scale = lora.alpha / (lora.rank**0.5 if lora.rslora else lora.rank)
        modules = {key.rsplit(".lora_", 1)[0] for key in adapter.tensors}
        self._modules = {m.removeprefix(_LEAD) + ".weight": m for m in modules}

    @property
    def names(self) -> set[str]:
        """The weights it changes, under the base's names."""
        return set(self._modules)

    def check(self, weights: set[str], tied: bool) -> None:
        """Refuse a base that lacks a weight which the adapter changes.

        Args:
            weights: the base's, by name.
            tied: whether its output matrix is its embedding.

        Raises: UserError naming the weight.
        """
        if tied and "lm_head.weight" in self._modules:
            raise UserError(
                "the adapter changes the output matrix, which this base shares with its embedding",
                where=f"adapter {self._adapter.path}",
                fix="Merging it would change the embedding, too; train without lm_head.",
            )
        lacking = sorted(self.names - weights)
        if lacking:
            raise UserError(
                f"the adapter does not fit this base: {lacking[0]} has no counterpart",
                where=f"adapter {self._adapter.path}",
                fix="Use the base it was trained on (adapter_config.json names it).",
            )

    def to(self, name: str, weight: Tensor) -> Tensor:
        """A weight (out, in) of the base with what the adapter adds, in float32; unchanged, and in
        its own type, where the adapter adds nothing.

        Raises: UserError where the shapes do not fit.
        """
        module = self._modules.get(name)
        if module is None:
            return weight
        a, b = (self._adapter.tensors[f"{module}.lora_{side}.weight"].float() for side in "AB")
        if weight.shape != (b.shape[0], a.shape[1]):
            raise UserError(
                f"the adapter does not fit this base: {name} is {tuple(weight.shape)} there, "
                f"{(b.shape[0], a.shape[1])} in the adapter",
                where=f"adapter {self._adapter.path}",
                fix="Use the base it was trained on (adapter_config.json names it).",
            )
        return weight.float().addmm(b, a, alpha=self._scale)
