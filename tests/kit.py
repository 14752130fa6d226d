"""What the tests of data, models and steps share: tokenizers, tiny random models, examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from generate_kit import byte_level, sentencepiece
from tokenizers import Tokenizer, decoders, pre_tokenizers

from vicuna.data.loss_mask import Example

VOCAB = 300
END = 1


def metaspace() -> Tokenizer:
    """`sentencepiece()` as newer conversions write it: the dummy space is the pre-tokenizer's."""
    tokenizer = sentencepiece()
    tokenizer.normalizer = None  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="first", split=False
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    return tokenizer


FAMILIES = ("llama", "llama-gqa-tied", "qwen2", "qwen3", "mistral", "gemma2", "gemma3")


def config_of(family: str, **changes: Any) -> Any:
    """The config of a tiny model of a family; windows are shorter than the test's examples."""
    import transformers as t

    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": END,
        "pad_token_id": END,
        "initializer_range": 0.1,
    }
    gemma = {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}
    kinds: dict[str, tuple[type, dict[str, Any]]] = {
        "llama": (t.LlamaConfig, {"num_key_value_heads": 4}),
        "llama-gqa-tied": (t.LlamaConfig, {"tie_word_embeddings": True}),
        "qwen2": (t.Qwen2Config, {}),
        "qwen3": (t.Qwen3Config, {"head_dim": 16}),
        "mistral": (t.MistralConfig, {"sliding_window": 16}),
        "gemma2": (t.Gemma2Config, gemma),
        "gemma3": (t.Gemma3TextConfig, {**gemma, "num_hidden_layers": 6}),
    }
    kind, own = kinds[family]
    return kind(**{**shape, **own, **changes})


def tiny_model(family: str, seed: int = 0, **changes: Any) -> Any:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(family, **changes)).eval()
    return model.requires_grad_(False)


def with_adapter(model: Any, seed: int = 1, **lora: Any) -> Any:
    """A PEFT model whose adapter is not zero, as it is after some training."""
    from vicuna.model.adapter import LoraSettings, attach

    peft = attach(model, LoraSettings(**{"rank": 4, **lora}), seed)
    shake(peft, seed)
    return peft


def shake(peft: Any, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data.copy_(noise)


def random_examples(seed: int = 0) -> list[Example]:
    """Eight examples with a prefix in common, two that share more, two that are equal, silent ends
    and positions without a target in between."""
    rng = np.random.default_rng(seed)
    prefix = rng.integers(3, VOCAB, 20)
    question = rng.integers(3, VOCAB, 25)
    examples: list[Example] = []
    for i in range(7):
        middle = question if i in (3, 5) else rng.integers(3, VOCAB, rng.integers(5, 40))
        ids = np.concatenate([prefix, middle, rng.integers(3, VOCAB, rng.integers(5, 25))])
        labels = (rng.random(len(ids)) < 0.5).astype(np.uint8)
        labels[: len(prefix)] = 0
        labels[-1] = 0
        labels[-5] = 2
        examples.append(Example(ids.astype(np.int32), labels))
    return [*examples, Example(examples[2].ids.copy(), examples[2].labels.copy())]


def save_tokenizer(folder: Path, tokenizer: Tokenizer | None = None, **words: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", **words}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer or byte_level(), **names)
    fast.save_pretrained(folder)
    return fast
