"""GGUF's types of files, and which type each tensor has in a file of a type.

A file of a K-quant is a mix: what hurts most when it is rounded gets more bits. The mixes are
llama.cpp's, so that a file made here is the file that its own tool makes.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from vicuna.errors import UserError

# `general.file_type` of a file that is mostly of a type (`llama_ftype`).
PLAIN = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "bf16": 32,
}  # fmt: skip
K_QUANTS = {
    "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12, "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15,
    "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18,
}  # fmt: skip
FILE_TYPES = {**PLAIN, **K_QUANTS}
FULL = ("f32", "f16", "bf16")
_BLOCK, _SUPERBLOCK = 32, 256
# What takes the place of a K-quant where rows are no whole number of superblocks.
_SMALLER_BLOCKS = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
_LAYER = re.compile(r"^blk\.(\d+)\.(\w+)\.weight$")


@dataclass(frozen=True)
class Model:
    """What of a model decides its mix.

    group: query heads that share a head of keys and values.
    """

    arch: str
    layers: int
    group: int
    tied: bool

    @property
    def is_70b(self) -> bool:
        """Llama 2 70B and its like: their small v matrices get more bits."""
        return self.arch == "llama" and self.layers == 80 and self.group > 1


def check_kind(kind: str) -> None:
    """Raises: UserError where there is no such type."""
    if kind not in FILE_TYPES:
        close = difflib.get_close_matches(kind.lower(), FILE_TYPES, n=1)
        near = f"; did you mean {close[0]}?" if close else ""
        raise UserError(
            "no GGUF type {type!r}{near}",
            type=kind,
            near=near,
            file_types=", ".join(FILE_TYPES),
            fix="Known: {file_types}.",
        )


def kind_of(name: str, shape: tuple[int, ...], kind: str, model: Model) -> str:
    """The type of one tensor in a file of a type.

    Vectors stay float32. In the plain types of 4 and 5 bits the embedding and the output matrix are
    q8_0: they lose most.
    """
    if len(shape) < 2:
        return "f32"
    if kind in FULL:
        return kind
    if shape[-1] % _BLOCK:
        return "f16"
    if kind in K_QUANTS:
        found = _mixed(name, kind, model)
        return found if shape[-1] % _SUPERBLOCK == 0 else _SMALLER_BLOCKS[found]
    return "q8_0" if name in ("token_embd.weight", "output.weight") else kind


def _mixed(name: str, kind: str, model: Model) -> str:
    """The K-quant of one matrix in a mix."""
    usual = kind[:4]
    if name == "output.weight" or (name == "token_embd.weight" and model.tied):
        return "q6_k"
    found = _LAYER.match(name)
    if not found:
        return usual
    layer, part = int(found[1]), found[2]
    if part == "attn_v":
        chosen = _of_values(kind, layer, model) or usual
        return "q5_k" if model.is_70b and chosen in ("q3_k", "q4_k") else chosen
    if part == "ffn_down":
        return _of_down(kind, layer, model.layers) or usual
    if part == "attn_output":
        return {"q2_k": "q3_k", "q3_k_m": "q4_k", "q3_k_l": "q5_k"}.get(kind, usual)
    return usual


def _of_values(kind: str, layer: int, model: Model) -> str | None:
    if kind == "q2_k":
        return "q4_k" if model.group >= 4 else "q3_k"
    if kind == "q3_k_m":
        return "q5_k" if layer < 2 else "q4_k"
    if kind == "q3_k_l" or (kind == "q4_k_s" and layer < 4):
        return "q5_k"
    return "q6_k" if kind in ("q4_k_m", "q5_k_m") and _matters(layer, model.layers) else None


def _of_down(kind: str, layer: int, layers: int) -> str | None:
    if kind == "q2_k":
        return "q3_k"
    if kind == "q3_k_m":
        return "q5_k" if layer < layers // 16 else "q4_k"
    if kind == "q3_k_l" or (kind == "q4_k_s" and layer < layers // 8):
        return "q5_k"
    return "q6_k" if kind in ("q4_k_m", "q5_k_m") and _matters(layer, layers) else None


def _matters(layer: int, layers: int) -> bool:
    """Whether a layer gets more bits: the first and last eighth, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
