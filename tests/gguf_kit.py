"""What the tests of GGUF files and of the llama.cpp engine share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from kit import save_tokenizer, tiny_model
from vicuna.export.gguf_writer import write_base


def vary(model: Any, seed: int = 0) -> Any:
    """Give norms and biases values of their own: at one and zero, half of what may go wrong hides."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    return model


def save_base(folder: Path, model: Any, tokenizer: Tokenizer | None = None, **words: Any) -> Path:
    """A base in Hugging Face's layout."""
    model.save_pretrained(folder)
    save_tokenizer(folder, tokenizer, **words)
    return folder


def tiny_base(folder: Path, family: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny base of a family, written into `folder`, with weights large enough to matter."""
    model = vary(tiny_model(family, seed, vocab_size=352, initializer_range=0.3, **changes))
    save_base(folder, model)
    return model


def tiny_gguf(folder: Path, family: str, kind: str = "f32", **changes: Any) -> tuple[Any, Path]:
    """(model, GGUF file of it)."""
    model = tiny_base(folder, family, **changes)
    write_base(folder, folder / f"{kind}.gguf", kind)
    return model, folder / f"{kind}.gguf"


def scores_after(model: Any, ids: Sequence[int]) -> Tensor:
    """transformers' scores of the next token after `ids` (V,), nothing remembered."""
    with torch.no_grad():
        scores: Tensor = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1]
    return scores.float()
