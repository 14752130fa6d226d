"""What the tests of whole runs share: a tiny model on disk, data, and runs in this process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent / "generate"))
from generate_kit import byte_level, tiny_llama

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tiny_model(folder: Path, seed: int = 0) -> Path:
    """A two-layer random Llama with a byte-level tokenizer, as a model folder."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(), bos_token="<s>", eos_token="<|im_end|>", pad_token="</s>"
    )
    # Many of one length, as real tokenizers have them: their order must come from nowhere else.
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|x{i}|>" for i in range(9)]})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    eos = tokenizer.eos_token_id
    model = tiny_llama(len(tokenizer), seed, max_position_embeddings=512, eos_token_id=eos)
    model.save_pretrained(folder)
    return folder


def write_data(path: Path, n: int = 40, shift: int = 0) -> Path:
    """Short questions with answers, and every fifth a conversation of two turns."""
    lines = []
    for i in range(shift, shift + n):
        if i % 5:
            record: dict[str, Any] = {"instruction": f"第{i}题：{i}加一？", "output": f"{i + 1}。"}
        else:
            record = {"input": [f"你好{i}", "再见"], "output": [f"好{i}", "回头见"]}
        lines.append(json.dumps(record, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def train(*words: str) -> int:
    """`vicuna train` in this process; returns the exit code, raises UserError."""
    from vicuna.commands.train import run

    torch.set_num_threads(1)
    return run(words)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(str(run / "adapter" / "adapter_model.safetensors"))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == kind]
