"""Adapters beside the base of PyTorch's engines: attached, chosen, scaled, mixed, freed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vicuna.model import adapter as adapters
from vicuna.model.adapter import AdapterFiles

# Tokens of a prompt computed at a time: bounds the memory of activations and the wait for a cancel.
CHUNK = 512
MAX_ROWS = 64


def causal_of(model: Any) -> Any:
    """The causal language model itself, also where PEFT is around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class Switching:
    """What an engine over a model of transformers, or PEFT's around one, does with adapters."""

    model: Any

    def refresh(self) -> None:
        """Take the adapters as they are now, and forget what was computed."""
        raise NotImplementedError

    def _take(self, model: Any) -> None:
        """Compute with a model from now on."""
        raise NotImplementedError

    def load_adapter(self, name: str, files: AdapterFiles) -> None:
        """Attach a further adapter. It changes nothing until it is chosen; none is chosen now.

        Raises: UserError where it does not fit the base.
        """
        peft = adapters.attach_saved(self.model, files, name=name)
        peft.eval()  # PEFT has put each layer's adapter where that layer is
        _use(peft, {})
        self._take(peft)

    def drop_adapter(self, name: str) -> None:
        """Free an adapter; none is chosen now."""
        self.model.delete_adapter(name)
        self.use_adapters({})

    def use_adapters(self, mix: Mapping[str, float]) -> None:
        """Add these adapters to the base from now on, each scaled. What was computed is
        forgotten."""
        _use(self.model, mix)
        self.refresh()


def _use(model: Any, mix: Mapping[str, float]) -> None:
    """Make adapters of a PEFT model the active ones; none at all where the mix is empty."""
    if not hasattr(model, "get_base_model"):  # no adapter was attached to it yet
        return
    if not mix:
        model.base_model.disable_adapter_layers()
        return
    model.base_model.enable_adapter_layers()
    model.base_model.set_adapter(list(mix))
    for module in model.modules():
        if hasattr(module, "set_scale") and hasattr(module, "lora_A"):
            for name, strength in mix.items():
                module.set_scale(name, strength)
