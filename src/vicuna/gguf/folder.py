"""The tokenizer of a GGUF file, as the files of a model folder, without touching the weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from vicuna.files import cache_dir, whole_folder
from vicuna.gguf.read import read_fields
from vicuna.gguf.tokenizer import write_tokenizer

_FORMAT = "2"  # counts up when what is written here changes
_HEAD = (
    32 << 20
)  # metadata, tokens and merges lie in front of the weights and are shorter than this
_SHAPE = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "head_dim": "attention.key_length",
}


def vocabulary_folder(gguf: Path) -> Path:
    """A folder with tokenizer.json, chat template, end tokens and the base's shape; made once.

    Raises: UserError where the file is no GGUF file, or has no tokenizer that can be read.
    """
    target = cache_dir("vocabularies", f"{gguf.stem}-{_head_hash(gguf)}-{_FORMAT}")
    if not (target / "tokenizer.json").is_file():
        with whole_folder(target) as aside:
            fields = read_fields(gguf)
            write_tokenizer(gguf, fields, aside)
            (aside / "config.json").write_text(json.dumps(_shape(fields), indent=1))
    return target


def _head_hash(gguf: Path) -> str:
    """A hash of the file's beginning and size: reading all of it could take a minute."""
    digest = hashlib.sha256(f"{gguf.stat().st_size};".encode())
    with gguf.open("rb") as f:
        digest.update(f.read(_HEAD))
    return digest.hexdigest()[:12]


def _shape(fields: dict[str, Any]) -> dict[str, Any]:
    """What of config.json tells bases of different shape apart."""
    arch = fields.get("general.architecture", "")
    shape = {key: fields.get(f"{arch}.{name}") for key, name in _SHAPE.items()}
    tokens = fields.get("tokenizer.ggml.tokens", ())
    known = {key: int(value) for key, value in shape.items() if isinstance(value, int)}
    return {"model_type": arch, **known, "vocab_size": len(tokens)}
