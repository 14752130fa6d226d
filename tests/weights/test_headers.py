"""Damaged and hostile weight files: a message that names file and fault, never a crash."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from gguf import GGUFWriter
from vicuna.errors import UserError
from vicuna.weights.headers import check_folder, check_gguf, read_safetensors
from vicuna.weights.read import SafetensorsWeights, check_weights, open_weights
from vicuna.weights.torch_files import load_pickled

TENSORS = {
    "a": torch.arange(6).reshape(2, 3).float(),
    "b": torch.ones(4, dtype=torch.bfloat16),
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(3.0),
}


def packed(table: Any, data: bytes = b"") -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# -- safetensors ----


def test_what_the_library_wrote_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    entries, metadata = read_safetensors(path)
    assert metadata == {"format": "pt"}
    assert entries.keys() == TENSORS.keys()
    weights = SafetensorsWeights([path])
    for name, tensor in TENSORS.items():
        assert weights.shape(name) == tuple(tensor.shape)
        assert torch.equal(weights.read(name), tensor)
        assert weights.dtype(name) == tensor.dtype


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "too few for a header"),
        (b"\0" * 7, "too few"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS"),
        (struct.pack("<Q", 1 << 62) + b"{}", "header is said to have"),
        (struct.pack("<Q", 50) + b"{}", "header is said to have"),
        (packed(b"[]"), "no table"), (packed(b"{,}"), "no JSON"), (packed(b"\xff\xfe"), "no JSON"),
        (packed(b"[" * 200_000), "no JSON"),
        (packed(b'{"a":' + json.dumps(entry(0, 4, [1])).encode() + b',"a":{}}', b"1234"), "twice"),
        (packed({"a": {"dtype": "F32"}}), "lacks type, shape or place"),
        (packed({"a": 3}), "lacks type"),
        (packed({"a": entry(0, 4, [1], "F99")}, b"1234"), "unknown type 'F99'"),
        (packed({"a": entry(0, 4, [-1])}, b"1234"), "impossible dimensions"),
        (packed({"a": entry(0, 4, [True])}, b"1234"), "impossible dimensions"),
        (packed({"a": entry(0, 4, [1 << 61])}, b"1234"), "impossible dimensions"),
        (packed({"a": entry(0, 4, [1 << 59, 1 << 59])}, b"1234"), "cannot have 4 bytes"),
        (packed({"a": entry(0, 4, [2])}, b"1234"), "cannot have 4 bytes"),
        (packed({"a": entry(0, 1 << 40, [1 << 38])}, b"1234"), "cut off"),
        (packed({"a": entry(0, 8, [2])}, b"1234"), "cut off"),
        (packed({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, b"1" * 12), "overlap"),
        (packed({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, b"1" * 12), "belong to no"),
        (packed({"a": entry(0, 4, [1])}, b"1" * 9), "behind the last tensor"),
        (packed({"__metadata__": {"a": 3}, "a": entry(0, 4, [1])}, b"1234"), "metadata"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_told_by_name_and_fault(
    tmp_path: Path, content: bytes, said: str
) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said) as e:
        read_safetensors(path)
    assert "bad.safetensors" in str(e.value)


def test_any_cut_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError):
            read_safetensors(path)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_damage_gives_tensors_or_a_message(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    save_file(TENSORS, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    try:
        weights = SafetensorsWeights([path])
    except UserError:
        return
    for name in weights.names():
        assert tuple(weights.read(name).shape) == weights.shape(name)
    with safe_open(str(path), "pt") as theirs:  # what passes here, the library takes, too
        assert set(theirs.keys()) == set(weights.names())


def test_a_folder_is_checked_with_its_index(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model-1.safetensors")
    index = tmp_path / "model.safetensors.index.json"

    def says(table: Any, said: str) -> None:
        index.write_text(json.dumps(table))
        with pytest.raises(UserError, match=said):
            check_folder(tmp_path)

    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    check_folder(tmp_path)
    assert open_weights(tmp_path).names() == ["a"]
    says({"weight_map": {"a": "model-2.safetensors"}}, r"missing: model-2\.safetensors")
    says({"weight_map": {"b": "model-1.safetensors"}}, "'b', which the index places here")
    says({"weight_map": {"a": "../model-1.safetensors"}}, "a file elsewhere")
    says({"weight_map": {"a": 3}}, "index is broken")
    says([], "index is broken")


def test_one_name_in_two_files_is_refused(tmp_path: Path) -> None:
    for i in (1, 2):
        save_file({"a": torch.ones(2)}, tmp_path / f"model-{i}.safetensors")
    with pytest.raises(UserError, match="and again here"):
        open_weights(tmp_path)


def test_a_base_is_checked_before_it_is_loaded(tmp_path: Path) -> None:
    from kit import tiny_model
    from vicuna.model.load import Chosen, load_base

    tiny_model("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="cut off: tensor"):
        load_base(tmp_path, Chosen("fp32", ""), torch.device("cpu"))


# -- GGUF ----


def gguf(path: Path) -> Path:
    writer = GGUFWriter(str(path), "llama")
    writer.add_uint32("a.count", 7)
    writer.add_array("a.texts", ["x", "字"])
    writer.add_tensor("one", np.ones((3, 32), np.float32))
    writer.add_tensor("two", np.ones(5, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def patched(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))


def test_a_sound_gguf_file_passes(tmp_path: Path) -> None:
    check_gguf(gguf(tmp_path / "x.gguf"))


ONE = b"one" + struct.pack("<IQQIQ", 2, 32, 3, 0, 0)
TWO = b"two" + struct.pack("<IQIQ", 1, 5, 1, 384)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (ONE, b"one" + struct.pack("<IQQIQ", 2, 32, 1 << 50, 0, 0), "cut off"),
        (ONE, b"one" + struct.pack("<IQQIQ", 2, 32, 0, 0, 0), "impossible dimensions"),
        (ONE, b"one" + struct.pack("<IQQIQ", 2, 32, 3, 99, 0), "unknown type 99"),
        (ONE, b"one" + struct.pack("<IQQIQ", 2, 31, 3, 8, 0), "blocks of 32"),
        (ONE, b"one" + struct.pack("<IQQIQ", 2, 32, 3, 0, 7), "multiple of 32"),
        (ONE, b"one" + struct.pack("<IQQIQ", 1 << 31, 32, 3, 0, 0), "past the end"),
        (TWO, b"two" + struct.pack("<IQIQ", 1, 5, 1, 0), "overlap"),
        (TWO, b"one" + struct.pack("<IQIQ", 1, 5, 1, 384), "stands there twice"),
        (TWO, b"two" + struct.pack("<IQIQ", 1, 5, 1, 1 << 40), "cut off|belong to no"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2, 3), b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 3),
         "past the end"),
    ],
)  # fmt: skip
def test_a_damaged_gguf_file_is_told(tmp_path: Path, old: bytes, new: bytes, said: str) -> None:
    path = gguf(tmp_path / "bad.gguf")
    patched(path, old, new)
    with pytest.raises(UserError, match=said) as e:
        check_gguf(path)
    assert "bad.gguf" in str(e.value)


def test_any_cut_of_a_gguf_file_is_noticed(tmp_path: Path) -> None:
    path = gguf(tmp_path / "x.gguf")
    whole = path.read_bytes()
    needed = 384 + 10 + whole.index(struct.pack("<f", 1.0) * 8)
    for length in range(0, needed, 11):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError):
            check_gguf(path)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_damage_to_a_gguf_header_gives_a_message(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = gguf(tmp_path_factory.mktemp("fuzz") / "x.gguf")
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(4, 300))
        content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    with suppress(UserError):
        check_gguf(path)


def test_llama_cpp_is_never_given_a_damaged_file(tmp_path: Path) -> None:
    from vicuna.llamacpp.context import Model

    path = gguf(tmp_path / "x.gguf")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cut off"):
        Model(path)


# -- pickles ----


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def as_zip(thing: Any, path: Path) -> None:
    torch.save(thing, path)


def as_old(thing: Any, path: Path) -> None:
    torch.save(thing, path, _use_new_zipfile_serialization=False)


def as_pickle(thing: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(thing, protocol=4))


@pytest.mark.parametrize("write", [as_zip, as_old, as_pickle])
def test_a_pickle_is_refused_by_the_name_of_what_it_wants(
    tmp_path: Path, write: Callable[[Any, Path], None]
) -> None:
    path, harm = tmp_path / "pytorch_model.bin", tmp_path / "harm"
    write({"a": torch.ones(2) if write is not as_pickle else 1, "b": Evil(harm)}, path)
    for read in (lambda: load_pickled(path), lambda: check_weights(tmp_path)):
        with pytest.raises(UserError, match=r"wants to run code: (posix|nt|os)\.mkdir") as e:
            read()
        assert "pytorch_model.bin" in str(e.value)
    assert not harm.exists()


@pytest.mark.parametrize("write", [as_zip, as_old])
def test_plain_tensors_of_any_age_are_read(
    tmp_path: Path, write: Callable[[Any, Path], None]
) -> None:
    tensors = {k: v for k, v in TENSORS.items() if v.numel()}
    for thing in (tensors, {"state_dict": tensors}, {**tensors, "step": 3}):
        write(thing, tmp_path / "x.bin")
        found = load_pickled(tmp_path / "x.bin")
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[k], tensors[k]) for k in tensors)


@pytest.mark.parametrize("content", [b"", b"hello there friend", b"PK\3\4" + b"\0" * 60, b"\x80"])
def test_what_is_no_pickle_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.bin"):
        load_pickled(tmp_path / "x.bin")


def test_a_cut_or_packed_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save(TENSORS, path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError):
            load_pickled(path)
    path.write_bytes(whole)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "p.bin", "w", 8) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(UserError, match="is packed"):
        load_pickled(tmp_path / "p.bin")
