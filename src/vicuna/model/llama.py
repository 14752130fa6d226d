"""Llama's forward pass: what a model consists of, a layer, and the decoder over a pack.

Llama, Mistral, Qwen2, Qwen3 and their relatives are one architecture with small differences: biases
of q, k and v, norms of q and k, sliding windows. `view_of` finds the modules of a transformers
model of this family, also under PEFT; a model that differs in any other way is refused with the
reason, and transformers' own forward is used for it. A name and modules alone prove little
(Granite, SmolLM3 and Ministral 3 look alike and are not): `self_check` compares logits before a
view is used.

`Layer` computes a layer in training and in inference, `Decoder` all of them in training: the same
numbers as transformers' own forward with less memory and less time. q, k, v and gate, up are one
product each, LoRA is inside, nothing is kept that follows from what is kept, and behind the last
attention only the rows that have a target are computed. The halves of a layer are in `layers`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vicuna.config.checkpointing import CheckpointingLevel
from vicuna.errors import UserError
from vicuna.model import layers, linear
from vicuna.model.attention import attend
from vicuna.model.attention_layout import AttentionShape, PackLayout
from vicuna.model.linear import LinearGroup
from vicuna.model.tuning import Tuning

LENGTH_DEPENDENT_ROTARY = "its rotary angles depend on the length of the whole input"
# model_type of config.json.
MODEL_TYPES = (
    "llama", "mistral", "qwen2", "qwen3",
    "internlm3", "seed_oss", "cwm", "iquestcoder", "ministral",
)  # fmt: skip

Attend = Callable[[Tensor, AttentionShape, PackLayout], Tensor]


# -- what a model consists of ----------------------------------------------------------------------


@dataclass(frozen=True)
class LayerView:
    """The tensors and modules of one decoder layer. Linear layers are plain ones or PEFT's around
    them; norms are (D,), norms of q and k (size of a head,).

    owners: the attention and MLP modules that they were found in.
    """

    norm1: Tensor
    qkv: tuple[Any, Any, Any]
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Any
    norm2: Tensor
    gate_up: tuple[Any, Any]
    down: Any
    shape: AttentionShape
    owners: tuple[Any, Any]

    @property
    def linear_layers(self) -> tuple[Any, ...]:
        """q, k, v, o, gate, up, down."""
        return (*self.qkv, self.out, *self.gate_up, self.down)

    @property
    def is_stale(self) -> bool:
        """Whether PEFT has replaced one of the linear layers since."""
        attention, mlp = self.owners
        now = (
            attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
            mlp.gate_proj, mlp.up_proj, mlp.down_proj,
        )  # fmt: skip
        return any(a is not b for a, b in zip(now, self.linear_layers))


@dataclass(frozen=True)
class DecoderView:
    """A decoder: embedding, layers, last norm (D,), and the module that gives the rotary angles.

    causal: the causal language model that they were found in.
    """

    embed: nn.Module
    layers: list[LayerView]
    norm: Tensor
    rotary: nn.Module
    eps: float
    causal: Any

    @property
    def is_stale(self) -> bool:
        """Whether PEFT has replaced a module of it since."""
        moved = self.causal.get_decoder().embed_tokens is not self.embed
        return moved or any(layer.is_stale for layer in self.layers)

    def renewed(self) -> DecoderView:
        """The view of the model as it is now.

        Raises: UserError if it cannot be computed here any more.
        """
        view = view_of(self.causal, training=False)
        if isinstance(view, str):
            raise UserError(
                "this model was changed in a way that cannot be followed: {view}",
                view=view,
                where="adapter",
                fix="Take the change back, or load the model anew.",
            )
        return view

    @property
    def embed_device(self) -> torch.device:
        """Where token ids are looked up."""
        return next(self.embed.parameters()).device


def view_of(causal: Any, training: bool = True, longest: int = 0) -> DecoderView | str:
    """The view of a causal language model of transformers, or why it is not of this family.

    Args:
        training: whether adapters alone must be trainable, which our backward relies on.
        longest: tokens of the longest text, 0 if that is not known.
    """
    config = causal.config
    model_type = str(getattr(config, "model_type", "?"))
    if model_type not in MODEL_TYPES:
        return f"{model_type} is not among {', '.join(MODEL_TYPES)}"
    if config.hidden_act not in ("silu", "swish"):
        return f"its activation is {config.hidden_act}, not silu"
    decoder = causal.get_decoder()
    reach = rotary_reach(decoder.rotary_emb)
    if reach is not None and not 0 < longest <= reach:
        return LENGTH_DEPENDENT_ROTARY
    views = []
    for layer in decoder.layers:
        view = _layer_view(layer, config)
        if isinstance(view, str):
            return view
        views.append(view)
    if training and _trains_more(causal):
        return "more than an adapter is trained"
    if _keeps_more(causal):
        return "its adapter keeps whole modules beside the base's"
    return DecoderView(
        decoder.embed_tokens, views, decoder.norm.weight, decoder.rotary_emb,
        float(config.rms_norm_eps), causal,
    )  # fmt: skip


def rotary_reach(rotary: Any) -> int | None:
    """Tokens up to which rotary angles are a function of the position alone; None for no limit."""
    if getattr(rotary, "rope_type", "default") not in ("dynamic", "longrope"):
        return None
    reach = getattr(rotary, "original_max_seq_len", 0)
    if rotary.rope_type == "longrope":
        scaling = getattr(rotary.config, "rope_parameters", None) or {}
        reach = scaling.get("original_max_position_embeddings", 0)
    return int(reach or 0)


def _layer_view(layer: Any, config: Any) -> LayerView | str:
    attention, mlp = layer.self_attn, layer.mlp
    if config.model_type == "mistral":
        window = getattr(config, "sliding_window", None)
    else:
        window = getattr(attention, "sliding_window", None)
    shape = AttentionShape(
        config.num_attention_heads,
        config.num_key_value_heads,
        int(attention.head_dim),
        float(attention.scaling),
        window,
    )
    norms = [getattr(getattr(attention, n, None), "weight", None) for n in ("q_norm", "k_norm")]
    view = LayerView(
        norm1=layer.input_layernorm.weight,
        qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
        q_norm=norms[0],
        k_norm=norms[1],
        out=attention.o_proj,
        norm2=layer.post_attention_layernorm.weight,
        gate_up=(mlp.gate_proj, mlp.up_proj),
        down=mlp.down_proj,
        shape=shape,
        owners=(attention, mlp),
    )
    reasons = [reason for module in view.linear_layers if (reason := _unsupported(module))]
    return reasons[0] if reasons else _unknown_weight(layer, view) or view


def _unknown_weight(layer: Any, view: LayerView) -> str:
    """Which weight of a layer is not in its view, in words; "" if all are."""
    known = {id(view.norm1), id(view.norm2), id(view.q_norm), id(view.k_norm)}
    for module in view.linear_layers:
        known |= {id(p) for p in module.parameters()}
    return next(
        (f"its layers have a {n}, too" for n, p in layer.named_parameters() if id(p) not in known),
        "",
    )


def _unsupported(module: Any) -> str | None:
    """Why a linear layer, or PEFT's layer around one, cannot be computed here; None if it can."""
    from peft.tuners.lora import LoraLayer

    base = module
    if isinstance(module, LoraLayer):
        base = module.base_layer
        if module.lora_variant or getattr(module, "fan_in_fan_out", False):
            return "its adapter is a variant of LoRA"
        if any(b.bias is not None for b in module.lora_B.values()):
            return "its adapter has biases"
    if not linear.is_supported(base):
        return f"{type(base).__name__} is not a linear layer known here"
    return None


def _trains_more(causal: Any) -> bool:
    named = causal.named_parameters()
    return any(p.requires_grad and ".lora_" not in name for name, p in named)


def _keeps_more(causal: Any) -> bool:
    """Whether PEFT has put another module of its own beside one of the base's."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    return any(isinstance(m, AuxiliaryTrainingWrapper) for m in causal.modules())


# -- one layer -------------------------------------------------------------------------------------


class Layer:
    """One decoder layer: called over a pack in training; `infer_qkv` and `infer_output` around an
    engine's own attention in inference."""

    def __init__(self, view: LayerView, eps: float, tuning: Tuning | None = None) -> None:
        tuning = tuning or Tuning.of(view.norm1.device)
        self.shape = view.shape
        self.inputs = layers.AttentionInputs(
            LinearGroup(view.qkv), view.shape, view.norm1, eps, view.q_norm, view.k_norm
        )
        self.out = LinearGroup([view.out])
        self.mlp = layers.Mlp(
            LinearGroup(view.gate_up), LinearGroup([view.down]), view.norm2, eps, tuning.mlp_rows
        )

    @property
    def groups(self) -> list[LinearGroup]:
        """Its linear layers."""
        return [self.inputs.group, self.out, self.mlp.gate_up, self.mlp.down]

    def __call__(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        layout: PackLayout,
        hashes: Tensor | None,
        rows: Tensor | None,
        attend: Attend,
    ) -> Tensor:
        """x (T, D) -> (T, D), or (N, D) if only the outputs of `rows`, int64 (N,), are needed."""
        attended = attend(self.inputs(x, cos, sin, hashes), self.shape, layout)
        if rows is not None:
            attended, x = attended.index_select(0, rows), x.index_select(0, rows)
            hashes = None if hashes is None else hashes[rows]
        return self.mlp(layers.attention_output(self.out, attended, x, hashes), hashes)

    def infer_qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Inference up to attention: x (t, D) -> q, k and v side by side, rotated (t, O).

        Args:
            cos, sin: (t, size of a head), sin as `layers.signed_sin` makes it.
        """
        return self.inputs.infer(x, cos, sin)

    def infer_output(self, attended: Tensor, x: Tensor) -> Tensor:
        """Inference after attention: attended (t, H D), the layer's input x (t, D) -> (t, D)."""
        return self.mlp.infer(self.out.infer(attended).add_(x))


# -- all layers, in training -----------------------------------------------------------------------


class Decoder:
    """A causal language model's decoder over packs.

    Args:
        view: from `view_of`. Plain weights of q, k, v and of gate, up are laid into one storage
            each; the modules' own weights become views of it.
        tuning: None: of the model's device.

    attend: how attention over a pack is computed.
    """

    def __init__(
        self,
        view: DecoderView,
        checkpointing: CheckpointingLevel = "none",
        tuning: Tuning | None = None,
    ) -> None:
        self.attend: Attend = attend
        self.tuning = tuning
        self._checkpointing: CheckpointingLevel = checkpointing
        self._build(view)

    def _build(self, view: DecoderView) -> None:
        self.view = view
        self.layers = [Layer(layer, view.eps, self.tuning) for layer in view.layers]
        self.checkpointing = self._checkpointing

    @property
    def checkpointing(self) -> CheckpointingLevel:
        """What is kept for backward."""
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, level: CheckpointingLevel) -> None:
        self._checkpointing = level
        for layer in self.layers:
            # What is computed twice anyway needs no third time.
            layer.mlp.keep = level != "selective"

    def follow(self) -> None:
        """Compute with the adapters as PEFT's switches stand now.

        Raises: UserError if something is switched on that is more than a LoRA.
        """
        if self.view.is_stale:
            self._build(self.view.renewed())
            return
        for layer in self.layers:
            for group in layer.groups:
                group.follow()

    def copy_out_of_mmap(self, model: Any) -> None:
        """Copy the weights that still lie in the mapped file of a CPU's weights. Most were copied
        when layers were joined; the mapping, whose pages count as this process's memory, goes then.

        Args:
            model: the causal language model.
        """
        groups = [g for layer in self.layers for g in layer.groups if len(g.layers) > 1]
        joined = {g.weight.untyped_storage().data_ptr() for g in groups if g.weight is not None}
        for p in model.parameters():
            frozen = p.device.type == "cpu" and not p.requires_grad and p.is_floating_point()
            if frozen and p.untyped_storage().data_ptr() not in joined:
                p.data = p.data.clone()

    def __call__(
        self,
        ids: Tensor,
        positions: Tensor,
        layout: PackLayout,
        rows: Tensor,
        hashes: Tensor | None = None,
    ) -> Tensor:
        """The last hidden states, after the last norm, of the rows that have a target.

        Args:
            ids, positions: int64 (T,). rows: int64 (N,), in any order.
            hashes: int64 (T,), the hash of each row's prefix, if there is dropout to apply.

        Returns: (N, D).
        """
        self.follow()
        x = self.view.embed(ids)
        cos, sin = (t[0] for t in self.view.rotary(x[None], positions[None]))
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            needed = rows if number == last else None
            x = self._run(layer, x, cos, sin, layout, hashes, needed, self.attend)
        return layers.final_norm(x, self.view.norm, self.view.eps)

    def _run(self, layer: Layer, x: Tensor, *arguments: Any) -> Tensor:
        """A layer, under activation checkpointing if that is on."""
        recompute = self.checkpointing in ("full", "offload") and torch.is_grad_enabled()
        if not recompute:
            return layer(x, *arguments)
        from torch.utils.checkpoint import checkpoint

        offload = self.checkpointing == "offload"
        saved = torch.autograd.graph.save_on_cpu(pin_memory=True) if offload else nullcontext()
        with saved:
            # Dropout is a function of its rows: no random state has to be kept.
            result: Tensor = checkpoint(
                layer, x, *arguments, use_reentrant=False, preserve_rng_state=False
            )
        return result
