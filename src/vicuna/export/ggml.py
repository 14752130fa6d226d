"""Weights as GGUF's types: 16 bits by PyTorch, quantised by llama.cpp's own code.

The shared object of `xllamacpp` exports ggml's quantisers. They are called for some
rows after others, so no file in between is needed and each column's importance can be given.
Without that wheel the `gguf` package makes the same bytes of the types that it knows.
"""

from __future__ import annotations

import ctypes as c
import os
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vicuna.errors import UserError
from vicuna.llamacpp.library import INSTALL, OWN_BUILD, library
from vicuna.weights.chunks import PIECE, all_finite

FULL = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_Q8_BLOCKS = 1 << 13  # computed at a time: several steps over what a core's cache holds
_HALF = torch.tensor(0.5).nextafter(torch.tensor(0.0))  # so that what is just below a half stays so
# Types that the `gguf` package quantises, too.
SIMPLE = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


def available(kind: str) -> bool:
    """Whether weights can become this type here."""
    return kind in FULL or kind in SIMPLE or _has_llamacpp()


def _has_llamacpp() -> bool:
    return bool(os.environ.get(OWN_BUILD)) or find_spec("xllamacpp") is not None


def stored_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    """The shape in bytes of a tensor in a type."""
    from gguf import quant_shape_to_byte_shape

    return tuple(int(n) for n in quant_shape_to_byte_shape(shape, _ggml_type(kind)))


def encode(
    tensor: Tensor, kind: str, name: str, importance: np.ndarray | None = None
) -> np.ndarray:
    """A tensor (..., columns) as a type's bytes, in the shape of `stored_shape`.

    Args:
        name: of the tensor, for messages.
        importance: float32 (columns,), how much an error in each column counts.

    Raises: UserError where a value is not finite, or lies beyond the type's range; where the type
        needs llama.cpp, which is missing.
    """
    rows = tensor.reshape(-1, tensor.shape[-1])
    out = np.empty(stored_shape(tuple(rows.shape), kind), np.uint8)
    if kind in FULL:
        _convert(rows, torch.from_numpy(out).view(FULL[kind]), kind, name)
    else:
        _quantize(rows, out, kind, name, importance)
    return out.reshape(stored_shape(tuple(tensor.shape), kind))


def _ggml_type(kind: str) -> Any:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[kind.upper()]


def _blocks(rows: Tensor) -> Iterator[slice]:
    height = max(1, PIECE // rows.shape[-1])
    for start in range(0, rows.shape[0], height):
        yield slice(start, min(start + height, rows.shape[0]))


def _convert(rows: Tensor, out: Tensor, kind: str, name: str) -> None:
    for block in _blocks(rows):
        values = rows[block]
        # From one type of 16 bits to the other through 32: PyTorch's direct way is half as fast.
        out[block] = values.float() if values.dtype.itemsize == 2 else values
        if not all_finite(out[block]):
            _refuse(rows[block], kind, name)


def _refuse(values: Tensor, kind: str, name: str) -> None:
    """Say why values did not become finite ones."""
    if values.isfinite().all():
        raise UserError(
            "{name} has values beyond the range of {type}",
            name=name,
            type=kind,
            fix="Choose bf16 or f32.",
        )
    raise UserError(
        "{name} has values that are not finite numbers",
        name=name,
        fix="The weights are damaged, or the training diverged; use an earlier checkpoint.",
    )


def _quantize(
    rows: Tensor, out: np.ndarray, kind: str, name: str, importance: np.ndarray | None
) -> None:
    quantizer = _quantizer(kind, importance)
    for block in _blocks(rows):
        values = rows[block].float()
        if not all_finite(values):
            _refuse(rows[block], kind, name)
        quantizer(values.contiguous().numpy(), out[block])


def _quantizer(kind: str, importance: np.ndarray | None) -> Any:
    """What quantises float32 (rows, columns) into bytes."""
    if kind == "q8_0":
        return _q8_0
    if not _has_llamacpp():
        if kind not in SIMPLE or importance is not None:
            what = f"type {kind}" if kind not in SIMPLE else "an importance matrix"
            raise UserError("{details} needs llama.cpp", details=what, fix=INSTALL)
        return lambda values, out: np.copyto(out, _with_gguf(values, kind))
    function, number = _ggml(), int(_ggml_type(kind))
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)

    def run(values: np.ndarray, out: np.ndarray) -> None:
        pointer = None if weights is None else weights.ctypes.data
        done = function(number, values.ctypes.data, out.ctypes.data, 0, *values.shape, pointer)
        assert done == out.nbytes

    return run


def _q8_0(values: np.ndarray, out: np.ndarray) -> None:
    """The bytes of ggml's own function, which takes three times as long: in each block of 32 a
    scale in f16, then values rounded to whole numbers, halves away from zero."""
    blocks = torch.from_numpy(values).reshape(-1, 32)
    made = torch.from_numpy(out).view(-1, 34)
    for x, bytes_ in zip(blocks.split(_Q8_BLOCKS), made.split(_Q8_BLOCKS)):
        scale = x.abs().amax(1, keepdim=True) / 127
        steps = x * torch.where(scale == 0, 0.0, 1 / scale)
        bytes_[:, :2] = scale.half().view(torch.uint8)
        bytes_[:, 2:] = (steps + torch.copysign(_HALF, steps)).to(torch.int8).view(torch.uint8)


def _with_gguf(values: np.ndarray, kind: str) -> np.ndarray:
    from gguf import quants

    made: np.ndarray = quants.quantize(values, _ggml_type(kind))
    return made


@lru_cache(maxsize=1)
def _ggml() -> Any:
    """`ggml_quantize_chunk`: type, source, target, first value, rows, columns, importance."""
    function = library().ggml_quantize_chunk
    function.restype = c.c_size_t
    function.argtypes = [
        c.c_int, c.c_void_p, c.c_void_p, c.c_int64, c.c_int64, c.c_int64, c.c_void_p,
    ]  # fmt: skip
    return function
