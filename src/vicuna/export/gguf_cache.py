"""GGUF files that are made once, for the llama.cpp engine: of a base in a folder, of an adapter."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from vicuna.export.gguf_writer import write_adapter, write_base
from vicuna.files import cache_dir
from vicuna.model.adapter import AdapterFiles, even, identify
from vicuna.terminal import say

_FORMAT = "2"  # counts up when what `export` writes changes


def base_file(folder: Path, kind: str) -> Path:
    """A base of a folder as a GGUF file of a type (`export.gguf.FILE_TYPES`).

    Raises: UserError where the base cannot be written as GGUF.
    """
    target = cache_dir("gguf", f"{folder.name}-{_digest(identify(folder))}-{kind}-{_FORMAT}.gguf")
    if not target.is_file():
        say(f"Writing {folder.name} once as {target} ...", error=True)
        write_base(folder, target, kind)
    return target


def adapter_file(adapter: AdapterFiles, config: dict[str, Any]) -> Path:
    """An adapter as a GGUF LoRA for a base of this config.json, keyed by its content.

    Raises: UserError where the base's architecture is not supported.
    """
    adapter = even(adapter)
    lora = adapter.lora
    digest = hashlib.sha256(repr((config, lora.rank, lora.alpha, lora.rslora)).encode())
    for key, tensor in sorted(adapter.tensors.items()):
        digest.update(key.encode() + tensor.float().contiguous().numpy().tobytes())
    target = cache_dir("gguf", f"lora-{digest.hexdigest()[:16]}-{_FORMAT}.gguf")
    if not target.is_file():
        write_adapter(adapter, config, target)
    return target


def _digest(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
