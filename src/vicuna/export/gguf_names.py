"""Hugging Face's names and settings of a base, in GGUF's words, architecture by architecture.

The names are those of the `gguf` package's table; the keys are specified in ggml's `docs/gguf.md`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vicuna.errors import UserError
from vicuna.hub import is_hub_id

# model_type of config.json -> architecture in GGUF.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# In these, q and k have each rotated pair of a head side by side; Hugging Face has them half a head
# apart.
_INTERLEAVED = frozenset({"llama"})
_ROTATED = re.compile(r"\.attn_([qk])\.(weight|bias)$")
# Buffers that old checkpoints saved among their weights.
_COMPUTED = re.compile(r"\.(rotary_emb\.inv_freq|masked_bias|attn\.bias)$")


@dataclass(frozen=True)
class Shape:
    """What of a base's config.json decides how its tensors are named and laid out."""

    arch: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool

    @classmethod
    def of(cls, config: dict[str, Any], where: str) -> Shape:
        """Read config.json (parsed).

        Raises: UserError where the architecture is not supported.
        """
        kind = str(config.get("model_type"))
        if kind not in ARCHITECTURES:
            raise UserError(
                "models of type {type} cannot be written as GGUF yet",
                type=kind,
                architectures=", ".join(ARCHITECTURES),
                where=where,
                fix="Supported: {architectures} (Llama 1 to 3, Yi, SmolLM2 and others of the same "
                "build are of type llama).",
            )
        heads = int(config["num_attention_heads"])
        return cls(
            arch=ARCHITECTURES[kind],
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            tied=bool(config.get("tie_word_embeddings", False)),
        )


class Names:
    """Tensor names of one base, and the order of rows that goes with them."""

    def __init__(self, shape: Shape) -> None:
        from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

        self.shape = shape
        arch = next(a for a in MODEL_ARCH if MODEL_ARCH_NAMES[a] == shape.arch)
        self._map = get_tensor_name_map(arch, shape.layers)

    def of(self, name: str) -> str | None:
        """GGUF's name of a tensor, None where GGUF does not hold it.

        Raises: UserError where the name is unknown: leaving a weight out would change the model.
        """
        if _COMPUTED.search(name) or (name == "lm_head.weight" and self.shape.tied):
            return None
        found = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UserError(
                "no place in GGUF for the tensor {name}",
                name=name,
                arch=self.shape.arch,
                fix="Only plain models of the architecture {arch} can be written.",
            )
        return str(found)

    def reorder(self, name: str, rows: Tensor) -> Tensor:
        """The rows (out, ...) of a tensor in the order in which llama.cpp rotates q and k.

        Args:
            name: GGUF's name of it.
            rows: all, or those of some heads.
        """
        if not self._rotated(name):
            return rows
        split = rows.reshape(-1, 2, self.shape.head_dim // 2, *rows.shape[1:])
        return split.transpose(1, 2).reshape(rows.shape)

    def unit(self, name: str, rows: int) -> int:
        """Rows of a tensor that `reorder` must be given together.

        Args:
            name: GGUF's name of it.
            rows: how many it has.

        Raises: UserError where it has another number of rows than the base's heads take.
        """
        found = self._rotated(name)
        if not found:
            return 1
        heads, size = (
            self.shape.heads if found[1] == "q" else self.shape.kv_heads,
            self.shape.head_dim,
        )
        if rows != heads * size:
            raise UserError(
                "{name} has {rows} rows; {heads} heads of {size} need {width}",
                name=name,
                rows=rows,
                heads=heads,
                size=size,
                width=heads * size,
                fix="Weights and config.json do not belong together, or the adapter is another "
                "base's.",
            )
        return size

    def _rotated(self, name: str) -> re.Match[str] | None:
        return _ROTATED.search(name) if self.shape.arch in _INTERLEAVED else None


def add_base_model(writer: Any, base: str) -> None:
    """Write which base an adapter belongs to, or was merged into: `general.base_model.*`.

    Args:
        writer: a `gguf.GGUFWriter`.
        base: a hub id (owner/name) or a path; of a path only its last part is told.
    """
    if not base:
        return
    writer.add_base_model_count(1)
    owner, _, name = base.partition("/")
    if is_hub_id(base) and not Path(base).exists():
        writer.add_base_model_organization(0, owner)
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")
    else:
        name = re.split(r"[/\\]", base.rstrip("/\\"))[-1]
    writer.add_base_model_name(0, name)


def add_settings(writer: Any, config: dict[str, Any], shape: Shape) -> None:
    """Write what of config.json llama.cpp needs into the metadata of a `gguf.GGUFWriter`.

    Raises: UserError where positions are scaled in a way that llama.cpp does not know.
    """
    hidden = int(config["hidden_size"])
    writer.add_block_count(shape.layers)
    writer.add_context_length(_context_length(config))
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps", 1e-6)))
    writer.add_vocab_size(int(config["vocab_size"]))
    writer.add_rope_dimension_count(shape.head_dim)
    if shape.head_dim != hidden // shape.heads:
        writer.add_key_length(shape.head_dim)
        writer.add_value_length(shape.head_dim)
    rope = rope_settings(config)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    _add_scaling(writer, rope)


def _context_length(config: dict[str, Any]) -> int:
    """Positions the model was made for, as far as it computes without a sliding window.

    llama.cpp has no window in these architectures: past it, it would compute another model.
    """
    longest = int(config["max_position_embeddings"])
    window = config.get("sliding_window")
    used = config.get("use_sliding_window", config["model_type"] == "mistral")
    return min(longest, int(window)) if window and used else longest


def rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings in one dictionary, as transformers writes them now or did before 5."""
    found = {"rope_theta": config.get("rope_theta", 10000.0), "rope_type": "default"}
    older = config.get("rope_scaling") or {}
    newer = config.get("rope_parameters") or {}
    found |= {"rope_type": older.get("type", "default"), **older} if older else {}
    return {**found, **newer}


def _add_scaling(writer: Any, rope: dict[str, Any]) -> None:
    from gguf import RopeScalingType

    kind = rope["rope_type"]
    if kind in ("default", "llama3"):  # llama3's factors are a tensor
        return
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    else:
        raise UserError(
            "positions scaled by {type!r} cannot be written as GGUF",
            type=kind,
            where="config.json",
            fix="Supported: default, linear, yarn, llama3.",
        )


def rope_factors(config: dict[str, Any], shape: Shape) -> Tensor | None:
    """What Llama 3.1 divides each rotary frequency by, float32 (head_dim / 2); None elsewhere.

    The rule is that of Meta's `apply_scaling` in the model's published code: short wavelengths
    stay, long ones are stretched by `factor`, those between are blended.
    """
    rope = rope_settings(config)
    if rope["rope_type"] != "llama3":
        return None
    factor, low, high = (
        float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor")
    )
    original = float(rope["original_max_position_embeddings"])
    factors = []
    for i in range(0, shape.head_dim, 2):
        turns = original * float(rope["rope_theta"]) ** (-i / shape.head_dim) / (2 * math.pi)
        blend = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - blend) / factor + blend))
    return torch.tensor(factors, dtype=torch.float32)
