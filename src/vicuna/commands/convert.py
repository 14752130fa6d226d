"""`vicuna convert`: convert a model to another format, and compare it with its source.

Reads Hugging Face's format (safetensors, or `.bin`), Meta's, and GGUF; writes Hugging Face's with
safetensors, and Meta's. Only the weights of a quantized GGUF file are rounded.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vicuna import config
from vicuna.config import ConvertSettings
from vicuna.convert import meta
from vicuna.convert.tokenizers import bring_tokenizer
from vicuna.data.tokenizer import Tokenizer
from vicuna.errors import SettingsError
from vicuna.files import scratch_folder, whole_folder
from vicuna.gguf.read import read_tensors
from vicuna.json_yaml import read_json, write_json
from vicuna.memory.devices import parse_memory
from vicuna.messages import Message
from vicuna.model.base import locate, locate_gguf
from vicuna.model.vocabulary import load_vocabulary
from vicuna.verify.logits import FolderLogits, GgufLogits, LogitSource
from vicuna.verify.report import Report, size_of
from vicuna.verify.texts import LONGEST
from vicuna.weights.output_folder import (
    check_space,
    copy_side_files,
    result_folder,
)
from vicuna.weights.read import Weights, nbytes, open_weights
from vicuna.weights.safetensors_writer import copies, write_sharded

_FULL = {0, 1, 30}  # ggml's numbers of f32, f16 and bf16


@dataclass
class _Source:
    """What is converted.

    folder: where what belongs to the model lies beside its weights.
    layout: hf, meta or gguf. size: bytes on disk.
    """

    folder: Path
    layout: str
    config: dict[str, Any]
    weights: Weights
    size: int
    kind: str = "exact"
    gguf: Path | None = None
    notes: list[str] = field(default_factory=list)


def run(argv: Sequence[str]) -> int:
    """Convert, compare, report."""
    settings, given = config.parse(ConvertSettings, argv)
    if not settings.model:
        raise SettingsError(
            ["model is missing: give a folder, a .gguf file or a hub id (--model M)"]
        )
    if settings.to == "hf" and "num_shards" in given:
        raise SettingsError(
            ["num_shards has an effect with --to meta only; for hf set max_shard_size"]
        )
    largest = parse_memory(settings.max_shard_size)
    place = Path(settings.model).expanduser()
    target = result_folder(settings.output_dir, settings.force, [place] if place.exists() else [])
    source = _open(settings)
    check_space(target, sum(nbytes(source.weights, n) for n in source.weights.names()))
    report = Report("convert", target, source.kind, _about(settings, source), source.notes)
    write = {"hf": _write_hf, "meta": _write_meta}[settings.to]
    with whole_folder(target) as aside, ExitStack() as stack:
        report.notes += write(source, aside, settings, largest)
        report.measure(source.size, aside)
        after = _opener(aside, settings, stack)
        before = _scorer(source, stack)
        report.verify(settings, before, after, lambda: Tokenizer(load_vocabulary(aside)))
        report.write(aside)
    report.finish()
    return 0


def _about(settings: ConvertSettings, source: _Source) -> dict[str, Any]:
    about = {"model": settings.model, "from": source.layout, "to": settings.to}
    return about | ({"num_shards": settings.num_shards} if settings.to == "meta" else {})


# -- reading ----


def _open(settings: ConvertSettings) -> _Source:
    """The model, whatever layout it is in.

    Raises: UserError where there is none, or it cannot be read.
    """
    place = Path(settings.model).expanduser()
    if place.is_dir() and meta.is_meta(place) and not (place / "config.json").is_file():
        return _open_meta(place, settings)
    gguf = locate_gguf(settings.model)
    folder = locate(settings.model)
    base = read_json(folder / "config.json")
    weights = open_weights(folder)
    if gguf is None:
        read = sum(nbytes(weights, name) for name in weights.names())
        return _Source(folder, "hf", base, weights, read)
    full = all(t.kind in _FULL for t in read_tensors(gguf)[1])
    notes = [] if full else [
        "the file is quantized: its weights are written in 16 bits, and what quantization "
        "lost stays lost"
    ]  # fmt: skip
    kind = "16bit" if full else "8bit"  # llama.cpp rounds activations, too, beside few bits
    return _Source(folder, "gguf", base, weights, size_of(gguf), kind, gguf, notes)


def _open_meta(folder: Path, settings: ConvertSettings) -> _Source:
    weights = meta.MetaWeights(folder)
    base = meta.config_of(weights.params, weights, settings.max_position_embeddings)
    notes: list[str] = []
    if (folder / meta.HF_CONFIG).is_file():
        base = read_json(folder / meta.HF_CONFIG)
    elif not settings.max_position_embeddings:
        notes.append(
            Message(
                "Meta's format does not record the context length: "
                "{max_position_embeddings} tokens assumed (--max_position_embeddings)",
                max_position_embeddings=base["max_position_embeddings"],
            )
        )
    if weights.buffers:
        notes.append(
            Message(
                "left out, because it is computed: {buffers}",
                buffers=", ".join(weights.buffers[:2]),
            )
        )
    return _Source(folder, "meta", base, weights, sum(map(size_of, weights.files)), notes=notes)


# -- writing ----


def _write_hf(source: _Source, folder: Path, settings: ConvertSettings, largest: int) -> list[str]:
    copy_side_files(source.folder, folder)
    (folder / meta.HF_CONFIG).unlink(missing_ok=True)
    (folder / meta.PARAMS).unlink(missing_ok=True)
    write_json(folder / "config.json", source.config)
    if source.layout == "meta" or settings.tokenizer:
        bring_tokenizer(source.folder, folder, settings.tokenizer)
    write_sharded(folder, copies(source.weights), largest)
    return []


def _write_meta(source: _Source, folder: Path, settings: ConvertSettings, _: int) -> list[str]:
    copy_side_files(source.folder, folder)
    (folder / "config.json").unlink(missing_ok=True)
    write_json(folder / meta.HF_CONFIG, source.config)
    if settings.tokenizer:
        bring_tokenizer(source.folder, folder, settings.tokenizer)
    found = source.folder.parent / "tokenizer.model"
    if source.layout == "meta" and found.is_file() and not (folder / found.name).exists():
        shutil.copyfile(found, folder / found.name)
    return meta.write_meta(
        folder, source.config, source.weights, settings.num_shards, str(source.folder)
    )


# -- comparing ----


def _scorer(source: _Source, stack: ExitStack) -> Callable[[], LogitSource]:
    """What was read; its settings are its own, never the result's."""

    def open_before() -> LogitSource:
        if source.gguf is not None:
            return GgufLogits(source.gguf, longest=LONGEST)
        if source.layout == "hf":
            return FolderLogits(source.folder)
        return _in_meta(source.folder, stack)

    return open_before


def _opener(folder: Path, settings: ConvertSettings, stack: ExitStack) -> Callable[[], LogitSource]:
    """What was written, read again."""
    if settings.to == "meta":
        return lambda: _in_meta(folder, stack)
    return lambda: FolderLogits(folder)


def _in_meta(folder: Path, stack: ExitStack) -> LogitSource:
    """A model in Meta's layout as its own params.json describes it."""
    weights = meta.MetaWeights(folder)
    place = Path(stack.enter_context(scratch_folder("meta")))
    write_json(place / "config.json", meta.config_of(weights.params, weights))
    return FolderLogits(place, weights)
