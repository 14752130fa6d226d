"""What a file says of its size is checked before anything of that size is made."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from gguf import GGUFWriter
from kit import save_tokenizer
from vicuna.config.parse import read_recipe
from vicuna.errors import UserError
from vicuna.model.base import locate
from vicuna.weights import size_limits
from vicuna.weights.headers import check_gguf
from vicuna.weights.read import check_weights, open_weights
from vicuna.weights.torch_files import load_pickled

NESTED = "[" * 100_000


def tiny(folder: Path) -> Path:
    tokenizer = save_tokenizer(folder)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
                         num_hidden_layers=2, num_attention_heads=2)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(
    "name", [n for n in size_limits.MOST if n not in ("num_layers", "n_layer")]
)
@pytest.mark.parametrize("value", [-1, 10**9 + 10**15, "digits", "2", 1.5, True, [10**13], {}])
def test_every_count_of_a_config_is_one(base: Path, name: str, value: Any) -> None:
    config = json.loads((base / "config.json").read_text())
    kept = (base / "config.json").read_text()
    try:
        text = json.dumps({**config, name: 1})
        (base / "config.json").write_text(text)
        locate(str(base))
        digits = "9" * 5000 if value == "digits" else json.dumps(value)
        (base / "config.json").write_text(text.replace(f'"{name}": 1', f'"{name}": {digits}'))
        with pytest.raises(UserError, match=rf"{name} is|not valid JSON"):
            locate(str(base))
    finally:
        (base / "config.json").write_text(kept)


def test_a_config_of_another_size_than_its_weights(tmp_path: Path) -> None:
    folder = tiny(tmp_path)
    check_weights(folder)
    config = json.loads((folder / "config.json").read_text())
    for change in (
        {"vocab_size": 1 << 24},
        {"hidden_size": 1 << 18},
        {"num_hidden_layers": 4096, "hidden_size": 1 << 12},
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match="cannot be stored"):
            check_weights(folder)


def test_of_weights_that_were_cut_the_file_is_named(tmp_path: Path) -> None:
    folder = tiny(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    large = {**config, "vocab_size": 151936, "hidden_size": 896}
    (folder / "config.json").write_text(json.dumps(large))
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "other.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    for name in ("model.safetensors", "pytorch_model.bin", "other.safetensors"):
        os.truncate(folder / name, 1000)
        with pytest.raises(UserError) as told:
            check_weights(folder)
        assert told.value.where.endswith(name)
        assert "config" not in str(told.value)
        (folder / name).unlink()


def test_of_a_gguf_file_that_was_cut_this_is_said(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(str(path), "llama")
    writer.add_uint64("llama.embedding_length", 4096)
    writer.add_uint64("llama.block_count", 64)
    writer.add_tensor("token_embd.weight", np.zeros((4096, 256), np.float32))
    for part in (writer.write_header_to_file, writer.write_kv_data_to_file,
                 writer.write_tensors_to_file):  # fmt: skip
        part()
    writer.close()
    check_gguf(path)
    os.truncate(path, 100_000)
    with pytest.raises(UserError) as told:
        check_gguf(path)
    assert "damaged" in told.value.what
    assert "config" not in told.value.fix


@pytest.mark.parametrize("name", size_limits.MOST_GGUF)
def test_every_count_of_a_gguf_file_is_one(tmp_path: Path, name: str) -> None:
    def write(value: int) -> Path:
        path = tmp_path / "model.gguf"
        writer = GGUFWriter(str(path), "llama")
        writer.add_uint64(f"llama.{name}", value)
        writer.add_tensor("token_embd.weight", np.zeros((32, 32), np.float32))
        for part in (writer.write_header_to_file, writer.write_kv_data_to_file,
                     writer.write_tensors_to_file):  # fmt: skip
            part()
        writer.close()
        return path

    check_gguf(write(1))
    for value in (size_limits.MOST_GGUF[name] + 1, 2**62):
        with pytest.raises(UserError, match=name):
            check_gguf(write(value))


# Pickles.


def saved(path: Path, thing: Any, old: bool = False) -> Path:
    torch.save(thing, path, _use_new_zipfile_serialization=not old)
    return path


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(1 << 37),
        torch.zeros(1, 8).expand(1 << 20, 8),
        torch.zeros(64).as_strided((1 << 20, 64), (0, 1)),
        torch.zeros(1 << 10).as_strided((1000, 1000), (0, 1)),
        torch.zeros(2, dtype=torch.int8).expand(1 << 40, 2),
        torch.eye(3).to_sparse(),
        torch.zeros(3, device="meta"),
    ],
    ids=["scalar", "rows", "strided", "windows", "bytes", "sparse", "meta"],
)
def test_a_tensor_that_is_larger_than_what_is_stored_is_refused(
    tmp_path: Path, tensor: torch.Tensor, old: bool
) -> None:
    path = saved(tmp_path / "pytorch_model.bin", {"a": torch.ones(2), "b": tensor}, old)
    with pytest.raises(UserError):
        load_pickled(path)
    with pytest.raises(UserError):
        open_weights(tmp_path)


def test_a_storage_under_thousands_of_names_is_refused_and_a_tied_head_is_not(
    tmp_path: Path,
) -> None:
    shared = torch.randn(1000, 64)
    tied = {"head": shared, "embedding": shared, "part": shared[:10], "turned": shared.T}
    found = load_pickled(saved(tmp_path / "tied.bin", tied))
    assert torch.equal(found["turned"], shared.T)
    many = {f"{n}": shared for n in range(5000)}
    with pytest.raises(UserError, match="would take"):
        load_pickled(saved(tmp_path / "many.bin", many))


@pytest.mark.parametrize("old", [False, True])
def test_a_storage_that_is_not_there_is_refused(tmp_path: Path, old: bool) -> None:
    path = saved(tmp_path / "a.bin", {"a": torch.zeros(100)}, old)
    if old:
        data = path.read_bytes()
        path.write_bytes(data[:-100])
    else:
        cut = tmp_path / "b.bin"
        with zipfile.ZipFile(path) as whole, zipfile.ZipFile(cut, "w", 0) as target:
            for item in whole.infolist():
                data = whole.read(item)
                target.writestr(item.filename, data[:8] if "/data/" in item.filename else data)
        path = cut
    with pytest.raises(UserError):
        load_pickled(path)


# Nesting.


def test_nesting_is_an_error_in_words(tmp_path: Path, base: Path) -> None:
    recipe = tmp_path / "a.yaml"
    for text in (NESTED, "a: " + NESTED, "{a: " * 20_000, "- " * 20_000, "[1]", "a: *b", "\0"):
        recipe.write_text(text)
        with pytest.raises(UserError):
            read_recipe(recipe)
    recipe.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError):
        read_recipe(recipe)
    folder = tmp_path / "base"
    folder.mkdir()
    for text in (NESTED, '{"a":' * 50_000, "9" * 9999, "[]", ""):
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json"):
            locate(str(folder))
