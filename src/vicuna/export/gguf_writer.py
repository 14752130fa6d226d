"""Write a base, perhaps with an adapter merged into it, or an adapter alone as a GGUF file.

write_base(folder, Path("model.gguf"), "q4_k_m")
write_base(folder, Path("law.gguf"), "q8_0", adapter=read_adapter("runs/law"))
write_adapter(read_adapter("runs/law"), config, Path("law-lora.gguf"))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vicuna.errors import UserError
from vicuna.export import ggml
from vicuna.export.gguf_names import Names, Shape, add_base_model, add_settings, rope_factors
from vicuna.export.gguf_types import FILE_TYPES, FULL, PLAIN, Model, check_kind, kind_of
from vicuna.export.gguf_vocab import ChatFormat, add_vocabulary
from vicuna.files import whole_file
from vicuna.llamacpp.library import INSTALL
from vicuna.model.adapter import even
from vicuna.model.config_files import read_config
from vicuna.model.lora_delta import LoraDelta
from vicuna.weights.chunks import Pieces, rows_of
from vicuna.weights.output_folder import check_space
from vicuna.weights.read import Weights, open_weights, shape_of, shapes
from vicuna.weights.safetensors_writer import Read

if TYPE_CHECKING:
    from vicuna.export.importance import Importance
    from vicuna.model.adapter import AdapterFiles

# Told before each tensor is written: how many are, of how many.
Progress = Callable[[int, int], None]


def _silent(_done: int, _of: int) -> None:
    pass


@dataclass(frozen=True)
class _Planned:
    """A tensor to write: its name and type, and what reads some of its rows in any float type.

    unit: rows that are read together; 0: all.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    read: Read
    unit: int
    importance: np.ndarray | None = None


# -- a base ----


def write_base(
    folder: Path,
    target: Path,
    kind: str = "f16",
    name: str = "",
    *,
    base: str = "",
    adapter: AdapterFiles | None = None,
    chat_format: ChatFormat | None = None,
    importance: Importance | None = None,
    progress: Progress = _silent,
) -> None:
    """Write a base, tokenizer and chat template included.

    A few pieces are in memory at a time, merged and quantised on their way; no file in between. An
    existing target is replaced; an interrupted write leaves nothing.

    Args:
        folder: in Hugging Face's layout, weights as safetensors.
        target: the file to write.
        kind: type of the matrices, a key of `FILE_TYPES`. Vectors stay float32.
        name: `general.name`; the folder's where not given.
        base: what an adapter is merged into, a hub id or a path; the folder's name if empty.
        adapter: merged into the weights on the way, in float32.
        chat_format: chat template and end tokens in place of the tokenizer's.
        importance: how much each column of each matrix counts, for quantised types.

    Raises: UserError where the architecture, the tokenizer or the type is not supported, the
        adapter does not fit, or the disk has no room.
    """
    from vicuna.model.vocabulary import load_vocabulary

    check_kind(kind)
    if kind not in PLAIN and not ggml.available(kind):
        raise UserError("type {type} needs llama.cpp", type=kind, fix=INSTALL)
    config = read_config(folder)
    shape = Shape.of(config, str(folder))
    plan = _plan_base(folder, Names(shape), kind, adapter, importance)
    factors = rope_factors(config, shape)
    if factors is not None:
        plan.insert(
            0, _Planned("rope_freqs.weight", "f32", tuple(factors.shape), factors.__getitem__, 0)
        )
    check_space(target, sum(math.prod(ggml.stored_shape(p.shape, p.kind)) for p in plan))
    with whole_file(target) as aside, closing(_writer(aside, shape.arch)) as writer:
        writer.add_type("model")
        writer.add_name(name or folder.name)
        if adapter is not None:
            add_base_model(writer, base or folder.name)
        add_settings(writer, config, shape)
        writer.add_file_type(FILE_TYPES[kind])
        writer.add_quantization_version(2)
        if importance is not None:
            importance.describe(writer)
        add_vocabulary(
            writer, load_vocabulary(folder), folder, int(config["vocab_size"]), chat_format
        )
        _write(writer, plan, progress)


def _plan_base(
    folder: Path,
    names: Names,
    kind: str,
    adapter: AdapterFiles | None,
    importance: Importance | None,
) -> list[_Planned]:
    shape = names.shape
    model = Model(shape.arch, shape.layers, shape.heads // shape.kv_heads, shape.tied)
    weights = open_weights(folder)
    delta = LoraDelta(adapter) if adapter else None
    if delta:
        delta.check(shapes(weights), shape.tied)
    columns: Mapping[str, np.ndarray] = importance.means if importance else {}
    plan = []
    for source in weights.names():
        name, size = names.of(source), weights.shape(source)
        if name is None:
            continue
        read = partial(_read, weights, source, delta, names, name)
        kind_here = kind_of(name, size, kind, model)
        unit = names.unit(name, size[0]) if weights.by_rows else 0
        plan.append(_Planned(name, kind_here, size, read, unit, _columns(columns, name, size)))
    return plan


def _read(
    weights: Weights, source: str, delta: LoraDelta | None, names: Names, name: str, rows: slice
) -> Tensor:
    """Rows as they are written: with what the adapter adds, in llama.cpp's order."""
    tensor = weights.read(source, rows)
    return names.reorder(name, delta.of_rows(rows).apply(source, tensor) if delta else tensor)


def _columns(
    importance: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...]
) -> np.ndarray | None:
    found = importance.get(name)
    if found is not None and found.shape != shape[-1:]:
        raise UserError(
            "the importance of {name} has {size} columns, the matrix {shape}",
            name=name,
            size=found.size,
            shape=shape[-1],
            where="imatrix",
            fix="The matrix was computed with another model.",
        )
    return found


# -- an adapter ----


def write_adapter(
    adapter: AdapterFiles,
    config: dict[str, Any],
    target: Path,
    kind: str = "f32",
    name: str = "",
    template: str = "",
    base: str = "",
) -> None:
    """Write a LoRA adapter as a GGUF LoRA, which llama.cpp adds to its base while it computes.

    Args:
        adapter: from `vicuna.model.adapter.read_adapter`.
        config: the base's config.json (parsed); of it only the shape counts.
        kind: f32, f16 or bf16.
        name: `general.name`; the adapter's folder's where not given.
        template: the chat template it was trained with, in Jinja.
        base: the base it belongs to, a hub id or a path; what the adapter itself names if empty.

    Raises: UserError where the base's architecture is not supported, or the disk is full.
    """
    if kind not in FULL:
        raise UserError(
            "an adapter cannot be written as {type}", type=kind, fix="Use f32, f16 or bf16."
        )
    shape = Shape.of(config, f"base of {adapter.path}")
    adapter = even(adapter)  # a GGUF LoRA has one alpha
    rank, alpha = adapter.lora.rank, adapter.lora.alpha
    if adapter.lora.rslora:
        alpha *= rank**0.5  # llama.cpp divides by the rank, rank-stabilised LoRA by its root
    with whole_file(target) as aside, closing(_writer(aside, shape.arch)) as writer:
        writer.add_type("adapter")
        writer.add_name(name or adapter.path.name)
        add_base_model(
            writer, base or adapter.meta.get("base", {}).get("name") or adapter.base_name
        )
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        writer.add_file_type(FILE_TYPES[kind])
        writer.add_quantization_version(2)
        if template:
            writer.add_chat_template(template)
        _write(writer, _plan_adapter(adapter, Names(shape), kind), _silent)


def _plan_adapter(adapter: AdapterFiles, names: Names, kind: str) -> list[_Planned]:
    plan = []
    for key, tensor in adapter.tensors.items():
        module, side = key.removesuffix(".weight").rsplit(".lora_", 1)
        name = names.of(module.removeprefix("base_model.model.") + ".weight")
        if name is None:
            raise UserError(
                "the adapter changes the output matrix, which this base shares with its embedding",
                where=str(adapter.path),
                fix="llama.cpp cannot add to one of the two alone; train without lm_head.",
            )

        # The rows of A@x are the rank's; only B's are the layer's, in the layer's order.
        ordered = side == "B" and names.unit(name, tensor.shape[0])
        tensor = names.reorder(name, tensor) if ordered else tensor
        written = f"{name}.lora_{side.lower()}"
        plan.append(_Planned(written, kind, tuple(tensor.shape), tensor.__getitem__, 1))
    return plan


# -- writing ----


def _writer(path: Path, arch: str) -> Any:
    from gguf import GGUFWriter

    return GGUFWriter(str(path), arch)


def _write(writer: Any, plan: list[_Planned], progress: Progress) -> None:
    """Write metadata, then the tensors: read, converted, written, forgotten."""
    from gguf import GGMLQuantizationType

    for p in plan:
        stored = ggml.stored_shape(p.shape, p.kind)
        writer.add_tensor_info(
            p.name, stored, np.dtype(np.uint8), math.prod(stored),
            GGMLQuantizationType[p.kind.upper()],
        )  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with Pieces(writer.fout[0]) as out:
        for done, p in enumerate(plan):
            progress(done, len(plan))
            out.align(writer.data_alignment)
            for rows in rows_of(p.shape, p.unit):
                size = math.prod(ggml.stored_shape(shape_of(p.shape, rows), p.kind))
                out.put(size, partial(_encoded, p, rows))
        out.align(writer.data_alignment)
    progress(len(plan), len(plan))


def _encoded(p: _Planned, rows: slice) -> Tensor:
    return torch.from_numpy(ggml.encode(p.read(rows), p.kind, p.name, p.importance))
