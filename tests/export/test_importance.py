"""Importance matrices: what is measured, and llama.cpp's files of both ages."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from gguf_kit import tiny_base
from kit import with_adapter
from vicuna.errors import UserError
from vicuna.export.gguf_names import Names, Shape
from vicuna.export.gguf_writer import write_base
from vicuna.export.importance import (
    Importance,
    is_importance,
    measure,
    read_importance,
    write_importance,
)
from vicuna.gguf.read import read_fields


def names(config: dict[str, object]) -> Names:
    return Names(Shape.of(config, "here"))


@pytest.mark.parametrize("adapted", [False, True])
def test_it_is_the_mean_square_of_what_each_matrix_is_given(tmp_path: Path, adapted: bool) -> None:
    model = tiny_base(tmp_path, "llama")
    own = model.model.layers[0].mlp.down_proj
    config = model.config.to_dict()
    asked = with_adapter(model) if adapted else model
    texts = [list(range(10, 40)), list(range(50, 60))]
    found = measure(asked, names(config), texts, "here")
    layers = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    assert set(found.means) == {f"blk.{i}.{n}.weight" for i in range(2) for n in layers}
    given = []
    layer = asked.get_submodule("base_model.model.model.layers.0.mlp.down_proj") if adapted else own
    hook = layer.register_forward_pre_hook(lambda _, x: given.append(x[0].detach()))
    with torch.no_grad():
        for ids in texts:
            asked(input_ids=torch.tensor([ids]), use_cache=False)
    hook.remove()
    rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in given])
    wanted = rows.square().mean(0).numpy()
    assert np.allclose(found.means["blk.0.ffn_down.weight"], wanted, rtol=1e-4)
    assert (found.chunks, found.chunk_size) == (2, 30)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    one = Importance({"blk.0.attn_q.weight": np.arange(1, 33, dtype=np.float32)}, "my.jsonl", 3, 64)
    path = tmp_path / "x.imatrix.gguf"
    write_importance(one, path)
    assert read_fields(path)["general.type"] == "imatrix"
    assert is_importance(path)
    two = read_importance(path)
    assert np.allclose(two.means["blk.0.attn_q.weight"], one.means["blk.0.attn_q.weight"])
    assert (two.chunks, two.chunk_size) == (3, 64)


def test_the_older_layout_is_read(tmp_path: Path) -> None:
    name, values = b"blk.0.ffn_up.weight", np.array([2.0, 4.0, 6.0], np.float32)
    data = struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii", 2, 3) + values.tobytes()
    path = tmp_path / "x.dat"
    path.write_bytes(data + struct.pack("<ii", 7, 0))
    found = read_importance(path)
    assert found.means["blk.0.ffn_up.weight"].tolist() == [1.0, 2.0, 3.0]
    assert found.chunks == 7
    for cut in range(1, len(data)):
        path.write_bytes(data[:cut])
        with pytest.raises(UserError, match="importance matrix"):
            read_importance(path)


def test_damaged_values_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_importance(Importance({"a": np.array([1.0, np.nan], np.float32)}, "x"), path)
    with pytest.raises(UserError, match="a holds values"):
        read_importance(path)


def test_that_of_another_model_is_refused(tmp_path: Path) -> None:
    tiny_base(tmp_path, "llama")
    other = Importance({"blk.0.attn_q.weight": np.ones(64, np.float32)}, "x")
    with pytest.raises(UserError, match="64 columns, the matrix 32"):
        write_base(tmp_path, tmp_path / "x.gguf", "q4_0", importance=other)


def test_the_file_says_what_it_was_quantised_with(tmp_path: Path) -> None:
    tiny_base(tmp_path, "llama")
    one = Importance({"blk.0.attn_q.weight": np.ones(32, np.float32)}, "/there/my.jsonl", 3)
    write_base(tmp_path, tmp_path / "x.gguf", "q8_0", importance=one)
    fields = read_fields(tmp_path / "x.gguf")
    assert fields["quantize.imatrix.file"] == "my.jsonl"
    assert fields["quantize.imatrix.chunks_count"] == 3
