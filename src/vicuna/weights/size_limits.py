"""How large a base says it is, checked before anything of that size is made.

A config of a few hundred bytes can name a billion layers; building the model, or only its plan,
then takes all time and memory there is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vicuna.errors import UserError
from vicuna.json_yaml import read_json
from vicuna.messages import Message

# More than any model has, by what a config calls them. The largest of 2026 have 126 layers, 262,144
# tokens and a width of 18,432.
MOST = {
    "num_hidden_layers": 4096, "num_layers": 4096, "n_layer": 4096,
    "hidden_size": 1 << 18, "n_embd": 1 << 18, "intermediate_size": 1 << 21,
    "moe_intermediate_size": 1 << 21, "vocab_size": 1 << 24,
    "num_attention_heads": 1 << 14, "num_key_value_heads": 1 << 14, "head_dim": 1 << 14,
    "num_local_experts": 1 << 14, "num_experts": 1 << 14, "n_routed_experts": 1 << 14,
    "max_position_embeddings": 1 << 40,
}  # fmt: skip
# The same in the metadata of a GGUF file, behind the architecture's name.
MOST_GGUF = {
    "block_count": 4096, "embedding_length": 1 << 18, "feed_forward_length": 1 << 21,
    "attention.head_count": 1 << 14, "attention.head_count_kv": 1 << 14,
    "attention.key_length": 1 << 14, "attention.value_length": 1 << 14, "vocab_size": 1 << 24,
    "expert_count": 1 << 14, "context_length": 1 << 40,
}  # fmt: skip
_MAY_BE_0 = ("attention.head_count_kv", "expert_count", "num_local_experts", "num_experts",
             "n_routed_experts", "moe_intermediate_size", "feed_forward_length")  # fmt: skip
DENSEST = 16  # numbers that a byte of weights may stand for: quantised to half a bit each
_SMALL = 1 << 22


def check_counts(folder: Path) -> None:
    """Check the counts in a base's config.json.

    Raises: UserError naming one that is none, or that no model has.
    """
    path = folder / "config.json"
    config = read_json(path)
    for part in (config, config.get("text_config"), config.get("llm_config")):
        if isinstance(part, dict):
            _check(part, MOST, path)


def check_against(folder: Path, stored: int) -> None:
    """Check a base's config against what is stored of its weights, in bytes.

    Raises: UserError where its embedding, or a part of its layers, would be far more.
    """
    path = folder / "config.json"
    if not path.is_file():
        return
    config = read_json(path)
    text = config.get("text_config")
    config = text if isinstance(text, dict) else config
    width = config.get("hidden_size")
    _compare(config.get("vocab_size"), width, config.get("num_hidden_layers"), stored, path)


def check_gguf_counts(fields: Mapping[str, Any], path: Path) -> None:
    """Check the counts in a GGUF file's metadata.

    Raises: UserError naming one that is none, or that no model has.
    """
    name = fields.get("general.architecture")
    if not isinstance(name, str):
        return
    own = {key: fields[f"{name}.{key}"] for key in MOST_GGUF if f"{name}.{key}" in fields}
    _check(own, MOST_GGUF, path)


def check_gguf_against(fields: Mapping[str, Any], path: Path) -> None:
    """Check a GGUF file's metadata, whose counts are sound, against the bytes of the whole file.

    Raises: UserError where a part of its layers would be far more.
    """
    name = fields.get("general.architecture")
    width, layers = (fields.get(f"{name}.{key}") for key in ("embedding_length", "block_count"))
    _compare(None, width, layers, path.stat().st_size, path)


def _check(config: Mapping[str, Any], most: Mapping[str, int], path: Path) -> None:
    for name, limit in most.items():
        value = config.get(name)
        if value is None:
            continue
        # Some families have a value for each layer.
        for one in value[: 2 * MOST["num_layers"]] if isinstance(value, list) else [value]:
            least = 0 if name in _MAY_BE_0 else 1
            good = isinstance(one, int) and not isinstance(one, bool)
            if one is not None and not (good and least <= one <= limit):
                raise UserError(
                    "{name} is {value}, but must be a whole number from {least} to {limit}",
                    name=name,
                    value=_shown(one),
                    least=least,
                    limit=limit,
                    where=str(path),
                    fix="Fetch the model again, from its makers.",
                )


def _compare(vocab: Any, width: Any, layers: Any, stored: int, path: Path) -> None:
    if not isinstance(width, int):
        return
    said = ""
    if isinstance(vocab, int) and vocab * width > DENSEST * stored + _SMALL:
        said = Message(
            "an embedding of {vocab} x {width} numbers cannot be stored in {stored} bytes",
            vocab=vocab,
            width=width,
            stored=stored,
        )
    # A layer has several matrices as wide as the model; a sixteenth of one is less than any has.
    elif isinstance(layers, int) and layers * width * width // 16 > DENSEST * stored + _SMALL:
        said = Message(
            "{layers} layers of width {width} cannot be stored in {stored} bytes",
            layers=layers,
            width=width,
            stored=stored,
        )
    if said:
        raise UserError(
            said,
            where=str(path),
            fix="This config belongs to other weights. Fetch the model again, from its makers.",
        )


def _shown(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**40:
        return "a number of more than 40 digits"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
