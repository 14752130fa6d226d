"""What two fast paths of training gain: each with and without it, in turns, in one process.

    python bench/fast_paths.py --write-docs

fused LoRA   `model/fused_lora.py` against PEFT's own layers, on a model like Gemma 3 270M with
             fewer layers, which transformers' own forward computes
fp32 flash   `attention_cpu.FlashSegments` against one call of PyTorch's scaled-dot-product
             attention a segment, on a model like SmolLM2-135M with fewer layers

A step is forward and backward of a pack; the figure is the best of many, so that another process
on the machine disturbs both ways alike.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchkit import machine, report
from vicuna.data.loss_mask import NEXT_TOKEN, Example
from vicuna.data.pack import Pack, build_packs
from vicuna.model import attention, attention_cpu, fused_lora
from vicuna.model.adapter import LoraSettings, attach
from vicuna.model.trainable import TrainableModel

CPU = torch.device("cpu")
VOCAB = 2048
GEMMA = {
    "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": VOCAB,
}  # fmt: skip
LLAMA = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": VOCAB,
}  # fmt: skip

Step = Callable[[], None]


def model_of(config_class: str, shape: dict[str, Any], dtype: torch.dtype) -> TrainableModel:
    """A model with random weights and a LoRA of rank 8 on all linear layers."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**shape)
    base = transformers.AutoModelForCausalLM.from_config(config).to(dtype).requires_grad_(False)
    trainable = TrainableModel(attach(base, LoraSettings(rank=8), seed=0), CPU)
    trainable.packed_attention()
    trainable.model.train()
    return trainable


def pack_of(lengths: list[int]) -> Pack:
    """Examples of these lengths, nothing shared, every token in the loss."""
    rng = np.random.default_rng(0)
    examples = [
        Example(rng.integers(8, VOCAB, n).astype(np.int32), np.full(n, NEXT_TOKEN, np.uint8))
        for n in lengths
    ]
    for example in examples:
        example.labels[-1] = 0
    (pack,) = build_packs(examples, 0, budget=1 << 20, share=False)
    return pack


def step_of(trainable: TrainableModel, pack: Pack) -> Step:
    """Forward and backward of a pack."""

    def step() -> None:
        trainable.loss_sum(pack).backward()
        for parameter in trainable.parameters.values():
            parameter.grad = None

    return step


def best_of(plain: Step, fast: Step, rounds: int) -> tuple[float, float]:
    """Seconds of the fastest step of each, taken in turns after one of each to warm up."""
    best = [float("inf")] * 2
    for number in range(rounds + 1):
        for i, step in enumerate((plain, fast)):
            began = time.perf_counter()
            step()
            if number:
                best[i] = min(best[i], time.perf_counter() - began)
    return best[0], best[1]


def fused_steps(dtype: torch.dtype, lengths: list[int]) -> tuple[Step, Step]:
    """A step of transformers' forward with PEFT's LoRA layers, and with ours."""
    plain, fast = (model_of("Gemma3TextConfig", GEMMA, dtype) for _ in range(2))
    assert plain.llama is None
    assert fused_lora.install(fast.model)[1] == 0
    pack = pack_of(lengths)
    return step_of(plain, pack), step_of(fast, pack)


def flash_steps(lengths: list[int]) -> tuple[Step, Step]:
    """A step of our own forward in fp32 with `attention.segments`, and with `FlashSegments`."""
    trainable, pack = model_of("LlamaConfig", LLAMA, torch.float32), pack_of(lengths)
    assert trainable.llama is not None
    step = step_of(trainable, pack)

    def by_segments(qkv: Any, shape: Any, layout: Any) -> Any:
        return attention.segments(*shape.split(qkv), shape, layout).flatten(1)

    def plain() -> None:
        with mock.patch.object(attention_cpu, "attend", by_segments):
            step()

    return plain, step


def main() -> None:
    """Measure, print, and perhaps write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=machine.physical_threads())
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--write-docs", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for lengths in ([64] * 4, [256], [512]):
        text = f"{len(lengths)} x {lengths[0]}"
        for name, steps in (
            ("fused LoRA, fp32", fused_steps(torch.float32, lengths)),
            ("fused LoRA, bf16", fused_steps(torch.bfloat16, lengths)),
            ("fp32 flash", flash_steps(lengths)),
        ):
            plain, fast = best_of(*steps, options.rounds)
            times = [f"{1e3 * plain:.0f}", f"{1e3 * fast:.0f}", f"{plain / fast:.2f} x"]
            rows.append([name, text, *times])
            print(*rows[-1], sep="  ", flush=True)
    table = report.table(["path", "tokens", "without, ms", "with, ms", "faster"], rows)
    text = f"{report.machine_words(machine.describe(options.threads))}\n\n{table}"
    print(text)
    if options.write_docs:
        report.write("fast paths", text)


if __name__ == "__main__":
    main()
