"""What the tests of parity share: tiny models of each family with nothing left at zero or one, and
loss and gradients by the book, through transformers and PEFT alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from vicuna.data.loss_mask import END_TOKEN, NEXT_TOKEN, Example, targets_of
from vicuna.data.pack import build_packs
from vicuna.model.adapter import LoraSettings, attach
from vicuna.model.trainable import TrainableModel

END, VOCAB = 1, 200
CPU = torch.device("cpu")
Gradients = dict[str, torch.Tensor]

SHAPE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
}
# bitsandbytes stores blocks of 64 weights.
QUANTISED = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
GEMMA = {"head_dim": 12, "sliding_window": 16, "query_pre_attn_scalar": 12, "num_hidden_layers": 4}
THETA = {"rope_type": "default", "rope_theta": 10_000_000.0}
# The window is shorter than the examples.
KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, every head its own": ("LlamaConfig", {"num_key_value_heads": 4}),
    "llama, grouped, tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2, biases": ("Qwen2Config", {}),
    "qwen2, biases, tied": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3, norms of q and k": ("Qwen3Config", {"head_dim": 12}),
    "mistral, sliding window": ("MistralConfig", {"sliding_window": 16}),
    "internlm3": ("InternLM3Config", {"head_dim": 12, "rope_parameters": THETA}),
    "seed_oss, biases": ("SeedOssConfig", {"head_dim": 16, "rope_parameters": THETA}),
    "cwm, windows in some layers": ("CwmConfig", {"head_dim": 12, "sliding_window": 16}),
    "iquestcoder": ("IQuestCoderConfig", {"head_dim": 12, "rope_parameters": THETA}),
    "ministral, sliding window": ("MinistralConfig", {"head_dim": 12, "sliding_window": 16}),
}
UNKNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2, capped scores": ("Gemma2Config", GEMMA),
    "gemma3": ("Gemma3TextConfig", {**GEMMA, "num_hidden_layers": 6}),
}
FAMILIES = {**KNOWN, **UNKNOWN}


def base(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random frozen model whose biases and norms are not those of an untrained one."""
    import transformers

    name, own = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**SHAPE, **own, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for key, parameter in model.named_parameters():
        if key.endswith("bias") or "norm" in key:
            parameter.data += torch.randn_like(parameter) * 0.2
    return model.to(dtype).requires_grad_(False)


def quantised(family: str, precision: Any, folder: Path) -> Any:
    """The same through bitsandbytes, computing in fp32. precision: int8 or nf4."""
    from vicuna.model.load import choose, load_base

    if not (folder / "config.json").exists():
        base(family, **QUANTISED).save_pretrained(folder)
    return load_base(folder, choose(precision, CPU), CPU)


def adapted(model: Any, **lora: Any) -> Any:
    """A PEFT model whose adapter is not zero, as it is after some training."""
    peft = attach(model, LoraSettings(**{"rank": 4, **lora}), seed=1)
    torch.manual_seed(2)
    for key, parameter in peft.named_parameters():
        if "lora_B" in key:
            parameter.data.normal_(0, 0.1)
    return peft


def make(family: str, dtype: torch.dtype = torch.float32, **lora: Any) -> TrainableModel:
    return TrainableModel(adapted(base(family, dtype), **lora), CPU)


def make_examples(seed: int = 0) -> list[Example]:
    """Examples that share a preamble, some more than that, one twice, one with a silent end."""
    rng = np.random.default_rng(seed)
    preamble = rng.integers(3, VOCAB, 20)
    examples: list[Example] = []
    for i in range(7):
        middle = examples[-1].ids[20:45] if i in (3, 5) else rng.integers(3, VOCAB, 5 + 4 * i)
        tail = rng.integers(3, VOCAB, rng.integers(5, 30))
        ids = np.concatenate([preamble, middle, tail]).astype(np.int32)
        labels = np.where(rng.random(len(ids)) < 0.5, NEXT_TOKEN, 0).astype(np.uint8)
        labels[:22] = 0
        labels[-1] = 0
        labels[-3] = END_TOKEN
        examples.append(Example(ids, labels))
    return [*examples, examples[2]]


def by_the_book(peft: Any, examples: Sequence[Example]) -> tuple[float, Gradients]:
    """Plain forward of each example, full logits, cross-entropy in fp64."""
    config = peft.get_base_model().get_decoder().config
    before = config._attn_implementation
    config._attn_implementation = "eager"
    total: Any = 0.0
    count = 0
    for example in examples:
        where, wanted = targets_of(example, END)
        ids = torch.from_numpy(example.ids.astype(np.int64))[None]
        logits = peft(input_ids=ids, use_cache=False).logits[0, torch.from_numpy(where)]
        total = total + F.cross_entropy(logits.double(), torch.from_numpy(wanted), reduction="sum")
        count += len(where)
    (total / count).backward()
    config._attn_implementation = before
    return float(total.detach() / count), taken(peft)


def packed(
    trainable: TrainableModel, examples: Sequence[Example], *cut: Any
) -> tuple[float, Gradients]:
    """The way training takes."""
    trainable.packed_attention()
    packs = build_packs(examples, END, *cut)
    loss = trainable.backward(packs, sum(p.supervised for p in packs))
    return loss, taken(trainable.model)


def taken(peft: Any) -> Gradients:
    """The gradients of all that is trained, in float64; they are dropped from the model."""
    found = {}
    for name, parameter in peft.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.dtype is torch.float32, name
            found[name], parameter.grad = parameter.grad.double(), None
    return found


def furthest(a: Gradients, b: Gradients) -> float:
    """The largest relative error of any parameter's gradient."""
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).norm() / b[k].norm()) for k in b)


def distance(a: Gradients, b: Gradients) -> float:
    """The relative error of the whole gradient."""
    far = sum(float((a[k] - b[k]).square().sum()) for k in b)
    return float((far / sum(float(b[k].square().sum()) for k in b)) ** 0.5)
