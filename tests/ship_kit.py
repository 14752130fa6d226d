"""What the tests of commands that write a model share: a base and adapters on disk, a command."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from gguf_kit import tiny_base
from kit import with_adapter
from vicuna.data.templates.literal import LiteralTemplate
from vicuna.data.templates.registry import builtin_templates
from vicuna.model.adapter import identify, save
from vicuna.weights.read import open_weights

# Small texts: what is compared counts in every test.
QUICK = ["--verify_tokens", "32"]


def base_in(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A tiny base of bf16 weights."""
    model = tiny_base(folder, family, **changes)
    model.bfloat16().save_pretrained(folder)
    return folder


def adapter_in(
    folder: Path, base: Path, family: str = "llama", seed: int = 1, changes: Any = None, **lora: Any
) -> Path:
    """An adapter of that base, not zero, with template and base written inside."""
    from kit import tiny_model

    config = json.loads((base / "config.json").read_text())
    model = tiny_model(family, vocab_size=config["vocab_size"], **(changes or {}))
    folder.mkdir(parents=True)
    template = LiteralTemplate("alpaca", builtin_templates()["alpaca"]).to_dict()
    meta = {"template": template, "base": {"name": str(base), **identify(base)}}
    save(with_adapter(model, seed, **lora), folder, meta)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    weights = open_weights(folder)
    return {name: weights.read(name) for name in weights.names()}


def same_bytes(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Names, types, shapes and bytes."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype
        and a[k].shape == b[k].shape
        and torch.equal(
            a[k].contiguous().reshape(-1).view(torch.uint8),
            b[k].contiguous().reshape(-1).view(torch.uint8),
        )
        for k in a
    )


def content(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def report_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found
