"""Types: the bytes are llama.cpp's own, and a file of a K-quant is the mix its own tool makes."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gguf_kit import tiny_base
from vicuna.errors import UserError
from vicuna.export import ggml
from vicuna.export.gguf_types import FILE_TYPES, K_QUANTS, Model, kind_of
from vicuna.export.gguf_writer import write_base

needs_llamacpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="needs the extra cpp (xllamacpp)"
)
needs_cyllama = pytest.mark.skipif(
    importlib.util.find_spec("cyllama") is None, reason="the reference is cyllama's llama.cpp"
)
# SHA-256, first half, of `matrix()` in each type: what llama.cpp b11549 makes of it.
HASHES = {
    "f16": "af01931dadbb60f4dbcab2b7ae7d771a",
    "bf16": "7d2fb0f648ae4cb3c9c1b95f65d8407d",
    "q8_0": "62a55ff4dcc642456cf3b2e58301a1f0",
    "q5_1": "3512328b4964fcc51cd814fd4ed69a95",
    "q5_0": "84bfce488f921f8b24861ed7b4c09cf3",
    "q4_1": "6b8feda970a1f516aa10cb2502ce87a8",
    "q4_0": "3724b96cf0b92b9154d6b639694a0316",
    "q2_k": "e6bafb5c4fdaed8fe18f2c6c75f3f231",
    "q3_k": "00f28fb67978ae00c31135a50194b206",
    "q4_k": "d34347dbc6b5654ab250089ddd4c37bf",
    "q5_k": "8b7a086fb1ab6bdf8fcf6be0bbcd2656",
    "q6_k": "dff6277fde549ab005386bd696845d5c",
}


def matrix(rows: int = 24, columns: int = 512) -> torch.Tensor:
    """Values that no library draws: the same on every machine."""
    at = np.arange(rows * columns, dtype=np.int64)
    mixed = (at * 2654435761 + (at >> 7) * 40503) % 65521
    values = (mixed.astype(np.float64) / 65521 - 0.5) * (1 + (at % 61) / 16)
    return torch.from_numpy(values.astype(np.float32).reshape(rows, columns))


@needs_llamacpp
@pytest.mark.parametrize("kind", HASHES)
def test_the_bytes_are_those_that_were_recorded(kind: str) -> None:
    made = ggml.encode(matrix(), kind, "x")
    assert hashlib.sha256(made.tobytes()).hexdigest()[:32] == HASHES[kind]


@needs_llamacpp
@pytest.mark.parametrize("kind", ggml.SIMPLE)
def test_without_llamacpp_the_bytes_are_the_same(kind: str, monkeypatch: Any) -> None:
    with_it = ggml.encode(matrix(), kind, "x")
    monkeypatch.setattr(ggml, "find_spec", lambda _: None)
    assert (ggml.encode(matrix(), kind, "x") == with_it).all()


@needs_llamacpp
def test_q8_0_is_ggmls_own_to_the_bit() -> None:
    """Computed here, as ggml's function is slow: halves, zeros, the ends of the range."""
    values = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    values[1], values[2, :32] = 0.0, torch.arange(32.0) - 15.5
    values[2, 0] = 127.0  # a scale of one: what is left are halves
    values[3], values[4] = values[3] * 1e6, values[4] * 1e-7
    values[5, 7] = -50.0
    made = np.empty(ggml.stored_shape((512, 512), "q8_0"), np.uint8)
    number = int(ggml._ggml_type("q8_0"))
    ggml._ggml()(number, values.numpy().ctypes.data, made.ctypes.data, 0, 512, 512, None)
    assert (ggml.encode(values, "q8_0", "x") == made).all()


def test_without_llamacpp_k_quants_and_importance_are_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr(ggml, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"type q4_k needs llama\.cpp"):
        ggml.encode(matrix(), "q4_k", "x")
    with pytest.raises(UserError, match=r"importance matrix needs llama\.cpp"):
        ggml.encode(matrix(), "q4_0", "x", np.ones(512, np.float32))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine layers, so that the mixes differ from one to the next; f32 files of two shapes."""
    folder = tmp_path_factory.mktemp("types")
    shape = {"num_hidden_layers": 9, "num_attention_heads": 8, "num_key_value_heads": 2}
    tiny_base(folder / "wide", "llama", hidden_size=256, intermediate_size=512, **shape)
    tiny_base(folder / "odd", "llama-gqa-tied", hidden_size=64, intermediate_size=256, **shape)
    for name in ("wide", "odd"):
        write_base(folder / name, folder / f"{name}.gguf", "f32")
    return folder


@needs_llamacpp
@needs_cyllama
@pytest.mark.parametrize("kind", [*K_QUANTS, *ggml.SIMPLE])
@pytest.mark.parametrize("name", ["wide", "odd"])
def test_a_file_is_what_llamacpp_makes(written: Path, tmp_path: Path, name: str, kind: str) -> None:
    """Each tensor, type and bytes; in plain types those that it, too, leaves in the type."""
    theirs = tensors(reference(written / f"{name}.gguf", tmp_path / "theirs.gguf", kind))
    write_base(written / name, tmp_path / "ours.gguf", kind)
    ours = tensors(tmp_path / "ours.gguf")
    assert ours.keys() == theirs.keys()
    compared = 0
    for tensor, (type_, data) in ours.items():
        if kind in K_QUANTS:
            assert theirs[tensor][0] == type_, tensor
        if theirs[tensor][0] == type_:
            compared += 1
            assert (theirs[tensor][1] == data).all(), tensor
    assert compared >= len(ours) - 2


def reference(source: Path, target: Path, kind: str) -> Path:
    from cyllama.llama import llama_cpp

    llama_cpp.disable_logging()
    params = llama_cpp.LlamaModelQuantizeParams()
    params.ftype, params.nthread = FILE_TYPES[kind], 1
    llama_cpp.model_quantize(str(source), str(target), params)
    return target


def tensors(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    from gguf import GGUFReader

    return {t.name: (t.tensor_type.name, np.array(t.data)) for t in GGUFReader(str(path)).tensors}


def test_small_v_matrices_of_a_70b_get_more_bits() -> None:
    large, small = Model("llama", 80, 8, False), Model("llama", 32, 4, False)
    v, size = "blk.20.attn_v.weight", (1024, 8192)
    assert kind_of(v, size, "q4_k_s", large) == "q5_k"
    assert kind_of(v, size, "q4_k_s", small) == "q4_k"
    assert kind_of(v, size, "q4_k_s", Model("qwen2", 80, 8, False)) == "q4_k"


@needs_llamacpp
def test_importance_moves_the_error_to_columns_that_do_not_matter() -> None:
    from gguf import GGMLQuantizationType, quants

    weights = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    matters = np.ones(512, np.float32)
    matters[::4] = 100.0
    errors = {}
    for name, importance in (("even", None), ("uneven", matters)):
        made = ggml.encode(weights, "q3_k", "x", importance)
        back = quants.dequantize(made, GGMLQuantizationType.Q3_K)
        errors[name] = ((back - weights.numpy()) ** 2)[:, ::4].mean()
    assert errors["uneven"] < 0.9 * errors["even"]


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_values_that_are_not_finite_are_named(kind: str) -> None:
    broken = matrix()
    broken[3, 7] = float("nan")
    with pytest.raises(UserError, match=r"blk\.0\.x has values that are not finite"):
        ggml.encode(broken, kind, "blk.0.x")
