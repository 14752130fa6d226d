"""Write a base or an adapter as a GGUF file, tensor by tensor, with the `gguf` package alone.

write_base(folder, Path("model.gguf"), "f16")
write_adapter(read_adapter("runs/demo"), config, Path("adapter.gguf"))
quantize(Path("model.gguf"), Path("model-q4_k_m.gguf"), "q4_k_m")
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vicuna.cache import whole_file
from vicuna.errors import UserError
from vicuna.export.gguf_names import Names, Shape, add_settings, rope_factors
from vicuna.export.gguf_vocab import add_vocabulary

if TYPE_CHECKING:
    from vicuna.model.adapter import AdapterFiles

# Types this module writes by itself, and `general.file_type` of a file that is mostly of them.
FILE_TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "bf16": 32,
}  # fmt: skip
# Types that need llama.cpp itself: `llama_ftype` of each.
K_QUANTS = {
    "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12, "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15,
    "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18,
}  # fmt: skip
_FULL = ("f32", "f16", "bf16")


@dataclass(frozen=True)
class _Planned:
    """A tensor to write: its name and type, and what gives its data in float32 (rows, columns)."""

    name: str
    kind: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


# -- a base ----


def write_base(folder: Path, target: Path, kind: str = "f16", name: str = "") -> None:
    """Write a base, tokenizer and chat template included.

    One tensor is in memory at a time. An existing target is replaced; an interrupted write leaves
    nothing.

    Args:
        folder: in Hugging Face's layout, weights as safetensors.
        target: the file to write.
        kind: type of the matrices, a key of `FILE_TYPES`. Vectors stay float32. In types of 4 and 5
            bits the embedding and the output matrix are q8_0: they lose most.
        name: `general.name`; the folder's where not given.

    Raises: UserError where the architecture, the tokenizer or the type is not supported, or the
        disk is full.
    """
    from vicuna.model.vocabulary import load_vocabulary

    _check_kind(kind)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape = Shape.of(config, str(folder))
    plan = _plan_base(folder, Names(shape), kind)
    factors = rope_factors(config, shape)
    if factors is not None:
        plan.insert(0, _Planned("rope_freqs.weight", "f32", factors.shape, lambda: factors))
    with whole_file(target) as aside:
        writer = _writer(aside, shape.arch)
        writer.add_type("model")
        writer.add_name(name or folder.name)
        add_settings(writer, config, shape)
        writer.add_file_type(FILE_TYPES[kind])
        writer.add_quantization_version(2)
        add_vocabulary(writer, load_vocabulary(folder), folder, int(config["vocab_size"]))
        _write(writer, plan)


def _check_kind(kind: str) -> None:
    if kind not in FILE_TYPES:
        raise UserError(
            f"GGUF type {kind!r} cannot be written here", fix=f"Known: {', '.join(FILE_TYPES)}."
        )


def _plan_base(folder: Path, names: Names, kind: str) -> list[_Planned]:
    plan = []
    for source, shape, read in _tensors(folder):
        name = names.of(source)
        if name is not None:
            plan.append(
                _Planned(name, _kind_of(name, shape, kind), shape, _ordered(names, name, read))
            )
    return plan


def _ordered(names: Names, name: str, read: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
    return lambda: names.reorder(name, read())


def _kind_of(name: str, shape: tuple[int, ...], kind: str) -> str:
    """The type of one tensor in a file of a type."""
    if len(shape) < 2:
        return "f32"
    if kind in _FULL:
        return kind
    if shape[-1] % 32:
        return "f16"  # blocks of 32 do not fit
    return "q8_0" if name in ("token_embd.weight", "output.weight") else kind


def _tensors(folder: Path) -> Iterator[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]:
    """(name, shape, reader) of every tensor of a folder, in the order of the files.

    Raises: UserError where the folder has no safetensors.
    """
    from safetensors import safe_open

    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            "no *.safetensors in this folder",
            where=str(folder),
            fix="Load and save the model with transformers once; it writes safetensors.",
        )
    for path in files:
        with safe_open(str(path), framework="pt") as f:
            for name in f.keys():  # noqa: SIM118, not a dictionary
                yield name, tuple(f.get_slice(name).get_shape()), _reader(path, name)


def _reader(path: Path, name: str) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        from safetensors import safe_open

        with safe_open(str(path), framework="pt") as f:
            array: np.ndarray = f.get_tensor(name).float().numpy()
            return array

    return read


# -- an adapter ----


def write_adapter(
    adapter: AdapterFiles, config: dict[str, Any], target: Path, kind: str = "f32"
) -> None:
    """Write a LoRA adapter as a GGUF LoRA, which llama.cpp adds to its base while it computes.

    Args:
        adapter: from `vicuna.model.adapter.read_adapter`.
        config: the base's config.json (parsed); of it only the shape counts.
        kind: f32, f16 or bf16.

    Raises: UserError where the base's architecture is not supported, or the disk is full.
    """
    if kind not in _FULL:
        raise UserError(f"an adapter cannot be written as {kind}", fix="Use f32, f16 or bf16.")
    shape = Shape.of(config, f"base of {adapter.path}")
    rank, alpha = adapter.lora.rank, adapter.lora.alpha
    if adapter.lora.rslora:
        alpha *= rank**0.5  # llama.cpp divides by the rank, rank-stabilised LoRA by its root
    with whole_file(target) as aside:
        writer = _writer(aside, shape.arch)
        writer.add_type("adapter")
        writer.add_name(adapter.path.name)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        writer.add_file_type(FILE_TYPES[kind])
        writer.add_quantization_version(2)
        _write(writer, _plan_adapter(adapter, Names(shape), kind))


def _plan_adapter(adapter: AdapterFiles, names: Names, kind: str) -> list[_Planned]:
    plan = []
    for key, tensor in adapter.tensors.items():
        module, side = key.removesuffix(".weight").rsplit(".lora_", 1)
        name = names.of(module.removeprefix("base_model.model.") + ".weight")
        if name is None:
            raise UserError(
                "the adapter changes the output matrix, which this base shares with its embedding",
                where=str(adapter.path),
                fix="Merge it into the base instead.",
            )

        # The rows of A@x are the rank's; only B's are the layer's, in the layer's order.
        def read(tensor: Any = tensor, name: str = name, side: str = side) -> np.ndarray:
            rows: np.ndarray = tensor.float().numpy()
            return rows if side == "A" else names.reorder(name, rows)

        plan.append(_Planned(f"{name}.lora_{side.lower()}", kind, tuple(tensor.shape), read))
    return plan


# -- writing ----


def _writer(path: Path, arch: str) -> Any:
    from gguf import GGUFWriter

    return GGUFWriter(str(path), arch)


def _write(writer: Any, plan: list[_Planned]) -> None:
    """Write metadata, then each tensor: read, converted, written, forgotten."""
    from gguf import GGMLQuantizationType, quant_shape_to_byte_shape, quants

    types = {p.name: GGMLQuantizationType[p.kind.upper()] for p in plan}
    for p in plan:
        stored = quant_shape_to_byte_shape(p.shape, types[p.name])
        writer.add_tensor_info(
            p.name, stored, np.dtype(np.uint8), int(np.prod(stored)), types[p.name]
        )  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for p in plan:
        with np.errstate(over="ignore"):  # told below, by name
            data = quants.quantize(p.read(), types[p.name])
        if p.kind == "f16" and np.isinf(data).any():
            raise UserError(
                f"{p.name} has values beyond the range of f16", fix="Choose bf16 or f32."
            )
        writer.write_tensor_data(data)
    writer.close()


# -- quantising with llama.cpp ----


def quantize(source: Path, target: Path, kind: str) -> None:
    """Quantise a GGUF file of f32, f16 or bf16 with llama.cpp, K-quants included.

    Args:
        kind: a key of `K_QUANTS` or `FILE_TYPES`.

    Raises: UserError where cyllama is missing, the type is unknown, or llama.cpp fails.
    """
    ftype = {**FILE_TYPES, **K_QUANTS}.get(kind)
    if ftype is None:
        known = ", ".join((*FILE_TYPES, *K_QUANTS))
        raise UserError(f"no GGUF type {kind!r}", fix=f"Known: {known}.")
    try:
        from cyllama.llama import llama_cpp
    except ImportError as e:
        raise UserError(
            "quantising needs cyllama",
            where=f"type {kind}",
            fix="pip install 'chinese-vicuna[cpp]'",
        ) from e
    llama_cpp.disable_logging()
    params = llama_cpp.LlamaModelQuantizeParams()
    params.ftype = ftype
    with whole_file(target) as aside:
        try:
            llama_cpp.model_quantize(str(source), str(aside), params)
        except RuntimeError as e:
            raise UserError(f"llama.cpp cannot quantise this file: {e}", where=str(source)) from e
