"""The parts of a Llama-family model: what our own forward passes (training, answering) need of it.

Llama, Mistral, Qwen2, Qwen3 and their relatives are one architecture with small differences: biases
of q, k and v, norms of q and k, sliding windows. `find` names the parts of a transformers model of
this family, also under PEFT; whatever differs in any other way is declined with the reason, and
transformers' own forward is used for it. A name and parts alone prove little (Granite, SmolLM3 and
Ministral 3 look alike and are not): `trial` compares scores before what is found here is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vicuna.errors import UserError
from vicuna.model import dequantize

ROTARY = "its rotary angles depend on the length of the whole input"
FAMILY = (
    "llama", "mistral", "qwen2", "qwen3",
    "internlm3", "seed_oss", "cwm", "iquestcoder", "ministral",
)  # fmt: skip


@dataclass(frozen=True)
class Heads:
    """The shape of a layer's attention. window: how far back a row sees, None without a limit."""

    query: int
    key: int
    size: int
    scale: float
    window: int | None

    @property
    def width(self) -> int:
        """Columns of q, k and v side by side."""
        return (self.query + 2 * self.key) * self.size


@dataclass(frozen=True)
class Block:
    """One decoder layer. The linear layers are plain ones or PEFT's around them.

    owners: the modules that they were found in, attention and mlp.
    """

    norm1: Tensor
    qkv: tuple[Any, Any, Any]
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Any
    norm2: Tensor
    gate_up: tuple[Any, Any]
    down: Any
    heads: Heads
    owners: tuple[Any, Any]

    @property
    def stale(self) -> bool:
        """Whether PEFT has put another layer in the place of one of these since."""
        attention, mlp = self.owners
        now = (
            attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
            mlp.gate_proj, mlp.up_proj, mlp.down_proj,
        )  # fmt: skip
        return any(a is not b for a, b in zip(now, _linears(self)))


@dataclass(frozen=True)
class Parts:
    """A decoder: embedding, layers, last norm, and the module that gives the rotary angles.

    causal: the model that they were found in.
    """

    embed: nn.Module
    blocks: list[Block]
    norm: Tensor
    rotary: nn.Module
    eps: float
    causal: Any

    @property
    def stale(self) -> bool:
        """Whether PEFT has put other modules in the place of these since."""
        moved = self.causal.get_decoder().embed_tokens is not self.embed
        return moved or any(block.stale for block in self.blocks)

    def again(self) -> Parts:
        """The parts as they are now.

        Raises: UserError where they cannot be computed here any more.
        """
        found = find(self.causal, training=False)
        if isinstance(found, str):
            raise UserError(
                f"this model was changed in a way that cannot be followed: {found}",
                where="adapter",
                fix="Take the change back, or load the model anew.",
            )
        return found

    @property
    def embed_device(self) -> torch.device:
        """Where token ids are looked up."""
        return next(self.embed.parameters()).device


def find(causal: Any, training: bool = True, longest: int = 0) -> Parts | str:
    """The parts of a causal language model of transformers, or why it is not of this family.

    Args:
        training: whether adapters alone must be trainable, which our backward relies on.
        longest: tokens of the longest text, 0 where that is not known.
    """
    config = causal.config
    kind = str(getattr(config, "model_type", "?"))
    if kind not in FAMILY:
        return f"{kind} is not among {', '.join(FAMILY)}"
    if config.hidden_act not in ("silu", "swish"):
        return f"its activation is {config.hidden_act}, not silu"
    decoder = causal.get_decoder()
    reach = rotary_reach(decoder.rotary_emb)
    if reach is not None and not 0 < longest <= reach:
        return ROTARY
    blocks = []
    for layer in decoder.layers:
        found = _block(layer, config)
        if isinstance(found, str):
            return found
        blocks.append(found)
    if training and _trains_more(causal):
        return "more than an adapter is trained"
    if _keeps_more(causal):
        return "its adapter keeps whole modules beside the base's"
    return Parts(
        decoder.embed_tokens, blocks, decoder.norm.weight, decoder.rotary_emb,
        float(config.rms_norm_eps), causal,
    )  # fmt: skip


def rotary_reach(rotary: Any) -> int | None:
    """Tokens up to which rotary angles are a function of the position alone; None without end."""
    if getattr(rotary, "rope_type", "default") not in ("dynamic", "longrope"):
        return None
    made_for = getattr(rotary, "original_max_seq_len", 0)
    if rotary.rope_type == "longrope":
        scaling = getattr(rotary.config, "rope_parameters", None) or {}
        made_for = scaling.get("original_max_position_embeddings", 0)
    return int(made_for or 0)


def _block(layer: Any, config: Any) -> Block | str:
    attention, mlp = layer.self_attn, layer.mlp
    size = int(attention.head_dim)
    if config.model_type == "mistral":
        window = getattr(config, "sliding_window", None)
    else:
        window = getattr(attention, "sliding_window", None)
    heads = Heads(
        config.num_attention_heads,
        config.num_key_value_heads,
        size,
        float(attention.scaling),
        window,
    )
    norms = [getattr(getattr(attention, n, None), "weight", None) for n in ("q_norm", "k_norm")]
    block = Block(
        norm1=layer.input_layernorm.weight,
        qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
        q_norm=norms[0],
        k_norm=norms[1],
        out=attention.o_proj,
        norm2=layer.post_attention_layernorm.weight,
        gate_up=(mlp.gate_proj, mlp.up_proj),
        down=mlp.down_proj,
        heads=heads,
        owners=(attention, mlp),
    )
    reasons = [why for linear in _linears(block) if (why := _declined(linear))]
    return reasons[0] if reasons else _more_than(layer, block) or block


def _more_than(layer: Any, block: Block) -> str:
    """Which weights of a layer are none of the block's, in words; "" if all are."""
    known = {id(block.norm1), id(block.norm2), id(block.q_norm), id(block.k_norm)}
    for linear in _linears(block):
        known |= {id(p) for p in linear.parameters()}
    return next(
        (f"its layers have a {n}, too" for n, p in layer.named_parameters() if id(p) not in known),
        "",
    )


def _linears(block: Block) -> tuple[Any, ...]:
    return (*block.qkv, block.out, *block.gate_up, block.down)


def _declined(linear: Any) -> str | None:
    """Why a linear layer, or PEFT's layer around one, cannot be computed here; None if it can."""
    from peft.tuners.lora import LoraLayer

    base = linear
    if isinstance(linear, LoraLayer):
        base = linear.base_layer
        if linear.lora_variant or getattr(linear, "fan_in_fan_out", False):
            return "its adapter is a variant of LoRA"
        if any(b.bias is not None for b in linear.lora_B.values()):
            return "its adapter has biases"
    if not dequantize.known(base):
        return f"{type(base).__name__} is not a linear layer known here"
    return None


def _trains_more(causal: Any) -> bool:
    named = causal.named_parameters()
    return any(p.requires_grad and ".lora_" not in name for name, p in named)


def _keeps_more(causal: Any) -> bool:
    """Whether PEFT has put another module of its own beside one of the base's."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    return any(isinstance(m, AuxiliaryTrainingWrapper) for m in causal.modules())
