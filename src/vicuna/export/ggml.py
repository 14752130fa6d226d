"""Weights as GGUF's types: 16 bits by PyTorch, quantised by llama.cpp's own code.

The shared object of `xllamacpp` exports ggml's quantisers. They are called tensor by tensor, in
several threads, so no file in between is needed and each column's importance can be given.
Without that wheel the `gguf` package makes the same bytes of the types that it knows.
"""

from __future__ import annotations

import ctypes as c
import math
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vicuna.errors import UserError
from vicuna.generate.engines.libllama import INSTALL, OWN_BUILD, library

FULL = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# Types that the `gguf` package quantises, too.
SIMPLE = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
_BLOCK = 1 << 20  # values converted at a time: what a core's cache holds


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
    height = max(1, _BLOCK // rows.shape[-1])
    for start in range(0, rows.shape[0], height):
        yield slice(start, min(start + height, rows.shape[0]))


def _convert(rows: Tensor, out: Tensor, kind: str, name: str) -> None:
    for block in _blocks(rows):
        out[block] = rows[block]
        if not _is_finite(out[block]):
            _refuse(rows[block], kind, name)


def _is_finite(values: Tensor) -> bool:
    """Whether all are finite numbers, by the two extremes: NaN is both where it occurs. Testing
    each value takes longer than converting it."""
    return all(math.isfinite(float(extreme)) for extreme in torch.aminmax(values))


def _refuse(values: Tensor, kind: str, name: str) -> None:
    """Say why values did not become finite ones."""
    if values.isfinite().all():
        raise UserError(f"{name} has values beyond the range of {kind}", fix="Choose bf16 or f32.")
    raise UserError(
        f"{name} has values that are not finite numbers",
        fix="The weights are damaged, or the training diverged; use an earlier checkpoint.",
    )


def _quantize(
    rows: Tensor, out: np.ndarray, kind: str, name: str, importance: np.ndarray | None
) -> None:
    quantizer = _quantizer(kind, importance)
    waiting: deque[Future[None]] = deque()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for block in _blocks(rows):
            values = rows[block].float()
            if not _is_finite(values):
                _refuse(rows[block], kind, name)
            waiting.append(pool.submit(quantizer, values.contiguous().numpy(), out[block]))
            if len(waiting) > 2 * torch.get_num_threads():  # bounds the memory
                waiting.popleft().result()
        for job in waiting:
            job.result()


def _quantizer(kind: str, importance: np.ndarray | None) -> Any:
    """What quantises float32 (rows, columns) into bytes."""
    if not _has_llamacpp():
        if kind not in SIMPLE or importance is not None:
            what = f"type {kind}" if kind not in SIMPLE else "an importance matrix"
            raise UserError(f"{what} needs llama.cpp", fix=INSTALL)
        return lambda values, out: np.copyto(out, _with_gguf(values, kind))
    function, number = _ggml(), int(_ggml_type(kind))
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)

    def run(values: np.ndarray, out: np.ndarray) -> None:
        pointer = None if weights is None else weights.ctypes.data
        done = function(number, values.ctypes.data, out.ctypes.data, 0, *values.shape, pointer)
        assert done == out.nbytes

    return run


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
