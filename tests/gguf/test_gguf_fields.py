"""GGUF metadata: what the `gguf` package writes comes back, and damage is told, never believed."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf import GGUFReader, GGUFWriter
from vicuna.errors import UserError
from vicuna.gguf.read import read_fields


def write(path: Path) -> Path:
    writer = GGUFWriter(str(path), "llama")
    writer.add_uint32("a.count", 7)
    writer.add_int32("a.negative", -3)
    writer.add_float32("a.float", 0.5)
    writer.add_bool("a.truth", True)
    writer.add_uint64("a.long", 1 << 40)
    writer.add_string("a.text", "你好 <|im_end|>")
    writer.add_array("a.texts", ["Ġ", "字", "x"])
    writer.add_array("a.floats", [0.25, -1.0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf")
    fields = read_fields(path)
    assert fields == {
        "general.architecture": "llama", "a.count": 7, "a.negative": -3, "a.float": 0.5,
        "a.truth": True, "a.long": 1 << 40, "a.text": "你好 <|im_end|>",
        "a.texts": ["Ġ", "字", "x"], "a.floats": [0.25, -1.0],
    }  # fmt: skip
    theirs: dict[str, Any] = {k: f.contents() for k, f in GGUFReader(str(path)).fields.items()}
    assert all(theirs[key] == value for key, value in fields.items())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a GGUF"),
        (b"PK\x03\x04 something else", "not a GGUF"),
        (b"GGUF\x01\x00\x00\x00" + bytes(16), "version 1"),
        (b"GGUF\x00\x00\x00\x03" + bytes(16), "version"),
        (b"GGUF\x03\x00\x00\x00" + bytes(8) + b"\xff" * 8 + b"\xff" * 8, "past the end"),
    ],
)
def test_what_is_no_gguf_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_fields(path)


@settings(max_examples=300, deadline=None)
@given(at=st.integers(4, 400), value=st.binary(min_size=1, max_size=9), cut=st.integers(0, 500))
def test_damage_never_does_more_than_a_message(
    tmp_path_factory: pytest.TempPathFactory, at: int, value: bytes, cut: int
) -> None:
    path = write(tmp_path_factory.getbasetemp() / "damaged.gguf")
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(bytes(data[: len(data) - cut]))
    with suppress(UserError):
        read_fields(path)


def test_lists_in_lists_without_end_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    nested = b"".join(b"\x09\x00\x00\x00" + (1).to_bytes(8, "little") for _ in range(5000))
    head = b"GGUF\x03\x00\x00\x00" + bytes(8) + (1).to_bytes(8, "little")
    path.write_bytes(head + (1).to_bytes(8, "little") + b"k" + b"\x09\x00\x00\x00" + nested)
    with pytest.raises(UserError, match="damaged"):
        read_fields(path)
