"""Steps to time: ours, plain transformers + PEFT, peers that are there."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vicuna.data.loss_mask import NEXT_TOKEN, NO_TARGET, Example
from vicuna.data.pack import build_packs
from vicuna.model.adapter import LoraSettings, attach
from vicuna.model.trainable import TrainableModel

END = 2
PREFIX = 38  # tokens of the Alpaca preamble with a Llama tokenizer, about
IGNORE = -100


@dataclass
class Timing:
    """What some steps took. tokens: real ones, of all of them."""

    seconds: float
    tokens: int
    loss: float
    peak_gib: float | None
    reserved_gib: float | None


def make_examples(kind: str, count: int, longest: int, vocab: int, seed: int = 0) -> list[Example]:
    """Random examples whose second half is supervised.

    Args:
        kind: `full`: all of `longest` tokens; `mixed`: lengths spread as in Chinese instruction
            data (log-normal around a sixth of 2,048), after a preamble that all share.
    """
    rng = np.random.default_rng(seed)
    prefix = rng.integers(3, vocab, min(PREFIX, longest // 4))
    examples = []
    for _ in range(count):
        length = longest
        if kind == "mixed":
            length = int(np.clip(rng.lognormal(np.log(longest / 8), 0.8), longest // 16, longest))
        ids = np.concatenate([prefix, rng.integers(3, vocab, max(2, length - len(prefix)))])
        labels = np.full(len(ids), NO_TARGET, np.uint8)
        labels[len(ids) // 2 : -1] = NEXT_TOKEN
        examples.append(Example(ids.astype(np.int32), labels))
    return examples


def with_adapter(model: Any, device: torch.device) -> Any:
    """A PEFT model with a rank-8 adapter on all linear layers, not zero, as after some training."""
    peft = attach(model, LoraSettings(rank=8, alpha=16), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            noise = torch.randn(parameter.shape, generator=generator) * 1e-3
            parameter.data.copy_(noise)
    return peft.to(device).train()


def trainable_of(peft: Any, device: torch.device, checkpointing: str) -> TrainableModel:
    """What `vicuna train` computes with."""
    trainable = TrainableModel(peft, device, checkpointing=checkpointing)  # type: ignore[arg-type]
    if trainable.llama is None:
        raise SystemExit(f"ours does not know this model: {trainable.fallback_reason}")
    trainable.packed_attention()
    return trainable


def timed(step: Callable[[], tuple[float, int]], device: torch.device, repeats: int) -> Timing:
    """Run a step once to warm up and `repeats` times for the figures. step: (loss, real tokens)."""
    step()
    _reset(device)
    began = time.perf_counter()
    tokens, loss = 0, 0.0
    for _ in range(repeats):
        loss, count = step()
        tokens += count
    _wait(device)
    seconds = time.perf_counter() - began
    return Timing(seconds, tokens, loss, *peaks(device))


def peaks(device: torch.device) -> tuple[float | None, float | None]:
    """(most allocated, most reserved) since the last reset, GiB; None without a GPU."""
    if device.type != "cuda":
        return None, None
    return (
        torch.cuda.max_memory_allocated(device) / 2**30,
        torch.cuda.max_memory_reserved(device) / 2**30,
    )


def _reset(device: torch.device) -> None:
    _wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ours(
    trainable: TrainableModel, examples: Sequence[Example], rows: int, optimizer: Any
) -> Callable[[], tuple[float, int]]:
    """One update of ours: packing included.

    Args:
        rows: rows a pack may have.
    """

    def step() -> tuple[float, int]:
        packs = build_packs(examples, END, rows)
        optimizer.zero_grad(set_to_none=True)
        loss = trainable.backward(packs, sum(p.supervised for p in packs))
        optimizer.step()
        return loss, sum(p.tokens for p in packs)

    return step


def keys_values(
    peft: Any, examples: Sequence[Example], micro_batch: int, optimizer: Any, device: torch.device
) -> Callable[[], tuple[float, int]]:
    """One update of transformers + PEFT: micro-batches padded to their longest.

    Labels are given, so that a patched loss is used, too; attention is `best_attention`'s.
    """
    peft.get_base_model().config._attn_implementation = best_attention(device)
    supervised = sum(int((e.labels != NO_TARGET).sum()) for e in examples)
    tokens = sum(len(e.ids) for e in examples)

    def step() -> tuple[float, int]:
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for start in range(0, len(examples), micro_batch):
            batch = padded(examples[start : start + micro_batch], device)
            loss = peft(**batch, use_cache=False, num_items_in_batch=supervised).loss
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        return total, tokens

    return step


def best_attention(device: torch.device) -> str:
    """flash-attn where it is installed; else PyTorch's own, which takes flash attention's kernel
    where no padding stands in its way."""
    there = find_spec("flash_attn") is not None
    return "flash_attention_2" if device.type == "cuda" and there else "sdpa"


def padded(examples: Sequence[Example], device: torch.device) -> dict[str, Tensor]:
    """input_ids, attention_mask, labels: int64 (B, longest)."""
    width = max(len(e.ids) for e in examples)
    ids = torch.full((len(examples), width), END)
    labels = torch.full((len(examples), width), IGNORE)
    mask = torch.zeros(len(examples), width, dtype=torch.long)
    for row, e in enumerate(examples):
        own = torch.from_numpy(e.ids.astype(np.int64))
        ids[row, : len(own)] = own
        mask[row, : len(own)] = 1
        where = torch.from_numpy(np.flatnonzero(e.labels != NO_TARGET)) + 1
        labels[row, where] = own[where]
    return {
        "input_ids": ids.to(device),
        "attention_mask": mask.to(device),
        "labels": labels.to(device),
    }


def parity(
    trainable: TrainableModel, examples: Sequence[Example], device: torch.device
) -> dict[str, float]:
    """Relative differences between ours and plain PEFT, one example at a time, on the same weights.

    Returns: `loss`, and `gradient`: the norm of the difference by the norm, over the whole adapter.
    """
    packs = build_packs(examples, END, sum(len(e.ids) for e in examples))
    supervised = sum(p.supervised for p in packs)
    _no_gradients(trainable)
    mine = trainable.backward(packs, supervised)
    gradients = {n: _taken(p) for n, p in trainable.parameters.items()}
    _no_gradients(trainable)
    trainable.plain_attention()
    total = 0.0
    for example in examples:
        batch = padded([example], device)
        logits = trainable.model(input_ids=batch["input_ids"], use_cache=False).logits[0]
        loss = F.cross_entropy(
            logits[:-1].float(), batch["labels"][0, 1:], ignore_index=IGNORE, reduction="sum"
        )
        (loss / supervised).backward()
        total += float(loss.detach())
    trainable.packed_attention()
    off = norm = 0.0
    for name, parameter in trainable.parameters.items():
        wanted = _taken(parameter)
        off += float((wanted - gradients[name]).square().sum())
        norm += float(wanted.square().sum())
    _no_gradients(trainable)
    wanted_loss = total / supervised
    return {"loss": abs(mine / wanted_loss - 1), "gradient": (off / max(norm, 1e-30)) ** 0.5}


def _taken(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.float().clone()


def _no_gradients(trainable: TrainableModel) -> None:
    for parameter in trainable.parameters.values():
        parameter.grad = None


def with_liger(model: Any) -> Any:
    """The model with Liger's kernels and fused loss.

    Raises: ImportError where it is not installed.
    """
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model)
    return model


def trl(
    peft: Any, examples: Sequence[Example], rows: int, steps: int, device: torch.device
) -> Timing:
    """TRL's SFTTrainer with packing over the same examples, `steps` updates.

    Raises: ImportError where it is not installed.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from trl.data_utils import pack_dataset

    sys.path.append(str(Path(__file__).parent.parent / "peers"))
    import common

    data = Dataset.from_list(
        [
            {
                "input_ids": e.ids.tolist(),
                "completion_mask": [0, *(int(x != NO_TARGET) for x in e.labels[:-1])],
            }
            for e in examples
        ]
    )
    packs = len(pack_dataset(data, rows, "bfd"))
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder, per_device_train_batch_size=1, gradient_accumulation_steps=packs,
            num_train_epochs=steps, learning_rate=3e-4, lr_scheduler_type="constant",
            packing=True, packing_strategy="bfd", max_length=rows, completion_only_loss=True,
            bf16=False, use_cpu=device.type == "cpu", gradient_checkpointing=False,
            logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=peft, args=config, train_dataset=data, processing_class=_any_tokenizer()
        )
        watch = common.Watch(trainer)
        _reset(device)
        trainer.train()
        _wait(device)
    found = watch.result()
    tokens = steps * sum(len(e.ids) for e in examples)
    return Timing(found["seconds"], tokens, found["losses"][-1], *peaks(device))


def _any_tokenizer() -> Any:
    """A tokenizer that is never asked for anything but its end."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": END}
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
