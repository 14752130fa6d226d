"""The forward pass over a pack for models of the family we know (`parts`), built for training.

The same numbers as transformers' own forward, with less memory and less time: q, k, v and gate, up
as one product each, LoRA inside, nothing kept that follows from what is kept, and behind the last
attention only the rows that have a target.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from vicuna.model import decoder_view, layers
from vicuna.model.attention import Layout, attend
from vicuna.model.elementwise import PLAIN, Kernels
from vicuna.model.linear import Group

# What is kept for backward: all; all but the widest, recomputed; a layer's input alone; the same,
# in the host's memory.
Checkpointing = Literal["none", "selective", "full", "offload"]


class Layer:
    """One decoder layer over packs."""

    def __init__(self, block: decoder_view.Block, eps: float, kernels: Kernels = PLAIN) -> None:
        self.heads = block.heads
        self.inputs = layers.AttentionInputs(
            Group(block.qkv), block.heads, block.norm1, eps, block.q_norm, block.k_norm,
            kernels,
        )  # fmt: skip
        self.out = Group([block.out])
        self.mlp = layers.Mlp(Group(block.gate_up), Group([block.down]), block.norm2, eps, kernels)

    @property
    def groups(self) -> list[Group]:
        """Its linear layers."""
        return [self.inputs.group, self.out, self.mlp.gate_up, self.mlp.down]

    def __call__(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        layout: Layout,
        hashes: Tensor | None,
        rows: Tensor | None,
    ) -> Tensor:
        """x (T, D) -> (T, D), or (N, D) where only `rows` (N,) are wanted."""
        attended = attend(self.inputs(x, cos, sin, hashes), self.heads, layout)
        if rows is not None:
            attended, x = attended.index_select(0, rows), x.index_select(0, rows)
            hashes = None if hashes is None else hashes[rows]
        return self.mlp(layers.attention_output(self.out, attended, x, hashes), hashes)


class Decoder:
    """A causal language model's decoder over packs.

    Args:
        found: from `parts.find`. Plain weights of q, k, v and of gate, up are laid into one storage
            each; the modules' own weights become views of it.
    """

    def __init__(
        self,
        found: decoder_view.Parts,
        checkpointing: Checkpointing = "none",
        kernels: Kernels = PLAIN,
    ) -> None:
        self.kernels = kernels
        self._checkpointing: Checkpointing = checkpointing
        self._build(found)

    def _build(self, found: decoder_view.Parts) -> None:
        self.parts = found
        self.layers = [Layer(block, found.eps, self.kernels) for block in found.blocks]
        self.checkpointing = self._checkpointing

    @property
    def checkpointing(self) -> Checkpointing:
        """What is kept for backward."""
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, wanted: Checkpointing) -> None:
        self._checkpointing = wanted
        for layer in self.layers:
            # What is computed twice anyway needs no third time.
            layer.mlp.keep = wanted != "selective"

    def follow(self) -> None:
        """Compute with the adapters as PEFT's switches stand now.

        Raises: UserError where something is switched on that is more than a LoRA.
        """
        if self.parts.stale:
            self._build(self.parts.again())
            return
        for layer in self.layers:
            for group in layer.groups:
                group.follow()

    def copy_out_of_mmap(self, model: Any) -> None:
        """Copy what still lies in the mapped file of a CPU's weights. Most of it was copied when
        layers were joined; the mapping, whose pages count as this process's memory, goes then.

        Args:
            model: the causal language model.
        """
        groups = [g for layer in self.layers for g in layer.groups if len(g.layers) > 1]
        joined = {g.weight.untyped_storage().data_ptr() for g in groups if g.weight is not None}
        for p in model.parameters():
            ours = p.device.type == "cpu" and not p.requires_grad and p.is_floating_point()
            if ours and p.untyped_storage().data_ptr() not in joined:
                p.data = p.data.clone()

    def __call__(
        self,
        ids: Tensor,
        positions: Tensor,
        layout: Layout,
        rows: Tensor,
        hashes: Tensor | None = None,
    ) -> Tensor:
        """The last hidden states, normalised, of the rows that have a target.

        Args:
            ids, positions: int64 (T,). rows: int64 (N,), in any order.
            hashes: int64 (T,), the prefix of each row, where there is dropout to apply.

        Returns: (N, D).
        """
        self.follow()
        x = self.parts.embed(ids)
        cos, sin = (t[0] for t in self.parts.rotary(x[None], positions[None]))
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            wanted = rows if number == last else None
            x = self._run(layer, x, cos, sin, layout, hashes, wanted)
        result: Tensor = _Norm.apply(x, self.parts.norm, self.parts.eps, self.kernels)
        return result

    def _run(self, layer: Layer, x: Tensor, *rest: Any) -> Tensor:
        again = self.checkpointing in ("full", "offload") and torch.is_grad_enabled()
        if not again:
            return layer(x, *rest)
        from torch.utils.checkpoint import checkpoint

        away = self.checkpointing == "offload"
        place = torch.autograd.graph.save_on_cpu(pin_memory=True) if away else nullcontext()
        with place:
            # Dropout is a function of its rows: no random state has to be kept.
            result: Tensor = checkpoint(
                layer, x, *rest, use_reentrant=False, preserve_rng_state=False
            )
        return result


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, kernels: Kernels) -> Tensor:
        rstd = kernels.rms(x, eps)
        ctx.kernels = kernels
        ctx.save_for_backward(x, rstd, weight)
        return kernels.normalised(x, rstd, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, rstd, weight = ctx.saved_tensors
        return ctx.kernels.norm_backward(gradients[0], x, rstd, weight), None, None, None
