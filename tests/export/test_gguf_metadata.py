"""A GGUF file says of its model what llama.cpp's own converter says, or a line here tells why not.

The converter's values were recorded with `metadata_kit.py`, from the sources in llama-cpp-python
0.3.36, on 2026-11-27.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from metadata_kit import BASES, RECORDED, SPELT, TEXT_TOKENS, make_base, metadata

from gguf_kit import save_base
from kit import tiny_model
from vicuna.export.gguf_writer import write_adapter, write_base
from vicuna.gguf.folder import vocabulary_folder
from vicuna.gguf.read import read_fields
from vicuna.model.adapter import AdapterFiles, LoraSettings
from vicuna.model.vocabulary import load_vocabulary

# Ours alone, and harmless: what llama.cpp assumes anyway, or says of other architectures.
EXTRA = {
    "tokenizer.ggml.add_bos_token",  # each family has its own default; said, it cannot be mistaken
    "tokenizer.ggml.add_eos_token",
    "tokenizer.ggml.add_space_prefix",  # what llama.cpp assumes of SentencePiece, said
    "tokenizer.ggml.eot_token_id",
    "qwen2.vocab_size",
    "qwen2.rope.dimension_count",
    "qwen3.vocab_size",
    "qwen3.rope.dimension_count",
    "llama.attention.key_length",
}
# Theirs alone: guesses from the folder's name, and what llama.cpp derives from the other settings.
MISSING = {
    "general.basename",
    "general.version",
    "general.finetune",
    "general.size_label",
    "tokenizer.ggml.add_sep_token",
    "tokenizer.ggml.add_space_prefix",  # says that byte-level text gets no space; no reader asks
    "llama.attention.key_length",
    "llama.attention.value_length",
    "qwen2.attention.key_length",
    "qwen2.attention.value_length",
    "qwen3.attention.value_length",
}
OTHER = {"general.name"}


@pytest.mark.parametrize("name", BASES)
def test_metadata_are_those_of_llamacpps_own_converter(tmp_path: Path, name: str) -> None:
    theirs = json.loads(RECORDED.read_text(encoding="utf-8"))[name]
    make_base(name, tmp_path / name)
    write_base(tmp_path / name, tmp_path / "x.gguf", "f16")
    ours = metadata(tmp_path / "x.gguf")
    both = (set(ours) & set(theirs)) - OTHER
    assert {k: ours[k] for k in both} == {k: theirs[k] for k in both}
    assert set(ours) - set(theirs) <= EXTRA
    assert set(theirs) - set(ours) <= MISSING


@pytest.mark.parametrize("name", BASES)
def test_text_tokens_are_text_when_the_file_is_read_back(tmp_path: Path, name: str) -> None:
    make_base(name, tmp_path / name)
    write_base(tmp_path / name, tmp_path / "x.gguf", "f16")
    back = load_vocabulary(vocabulary_folder(tmp_path / "x.gguf"))
    assert not set(TEXT_TOKENS) & set(back.special_tokens)
    assert name == "llama-2" or set(SPELT) <= set(back.special_tokens)


def adapter_of(base: str) -> AdapterFiles:
    import torch

    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = {name.format("A"): torch.ones(4, 32), name.format("B"): torch.ones(32, 4)}
    return AdapterFiles(Path("runs/law"), LoraSettings(rank=4), tensors, base_name=base)


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        (
            "Qwen/Qwen2.5-7B-Instruct",
            {"count": 1, "0.name": "Qwen2.5-7B-Instruct", "0.organization": "Qwen",
             "0.repo_url": "https://huggingface.co/Qwen/Qwen2.5-7B-Instruct"},
        ),
        ("/home/me/models/小羊驼-7b/", {"count": 1, "0.name": "小羊驼-7b"}),
        ("D:\\models\\llama", {"count": 1, "0.name": "llama"}),
        ("../models/llama", {"count": 1, "0.name": "llama"}),
        ("smollm2-135m", {"count": 1, "0.name": "smollm2-135m"}),
        ("", {}),
    ],
)  # fmt: skip
def test_an_adapter_says_which_base_it_belongs_to(
    tmp_path: Path, base: str, expected: dict[str, Any]
) -> None:
    config = tiny_model("llama").config.to_dict()
    write_adapter(adapter_of(base), config, tmp_path / "lora.gguf")
    fields = read_fields(tmp_path / "lora.gguf")
    lead = "general.base_model."
    said = {k.removeprefix(lead): v for k, v in fields.items() if k.startswith(lead)}
    assert said == expected


def test_a_merged_file_says_what_it_was_merged_into(tmp_path: Path) -> None:
    save_base(tmp_path / "base", tiny_model("llama", vocab_size=352))
    write_base(
        tmp_path / "base", tmp_path / "x.gguf", "f16", adapter=adapter_of(""), base="Qwen/Qwen3-4B"
    )
    assert read_fields(tmp_path / "x.gguf")["general.base_model.0.name"] == "Qwen3-4B"
