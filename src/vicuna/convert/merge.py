"""`vicuna merge`: adapters added to the weights of their base, a tensor at a time.

What no adapter touches is copied; what one touches is computed in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from vicuna import config
from vicuna.config import MergeSettings
from vicuna.convert.combine import Method, combine
from vicuna.data.tokenizer import Encoder
from vicuna.errors import SettingsError, UserError
from vicuna.files import whole_folder
from vicuna.json_yaml import read_json
from vicuna.memory.devices import parse_memory
from vicuna.model import adapter as adapters
from vicuna.model.adapter import AdapterFiles
from vicuna.model.adapter_base import named_base
from vicuna.model.base import EMBEDDED, locate
from vicuna.model.lora_delta import Addition
from vicuna.model.vocabulary import load_vocabulary
from vicuna.verify.report import Report, size_of
from vicuna.verify.scorers import FolderScorer
from vicuna.weights.output_folder import (
    check_space,
    copy_side_files,
    result_folder,
    write_json,
)
from vicuna.weights.read import Weights, nbytes, open_weights, shapes
from vicuna.weights.safetensors_writer import Planned, Read, copies, rounded, write_sharded

_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {v: k.replace("fp", "float").replace("bf", "bfloat") for k, v in _TYPES.items()}
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

Parts = list[tuple[AdapterFiles, float]]


@dataclass
class _Source:
    """What a merge reads: the base, and the adapters with what each counts with."""

    name: str
    folder: Path
    config: dict[str, Any]
    weights: Weights
    parts: Parts
    notes: list[str] = field(default_factory=list)


def run(words: Sequence[str]) -> int:
    """Merge, compare, report."""
    settings, _ = config.parse(MergeSettings, words)
    largest = parse_memory(settings.max_shard_size)
    counts = _counts(settings)
    parts = [(adapters.read_adapter(a), w) for a, w in zip(settings.adapter, counts)]
    model = settings.model or _base_of(parts)
    folder = locate(model)
    target = result_folder(
        settings.output_dir, settings.force, [folder, *(p.path for p, _ in parts)]
    )
    source = _open(settings, model, folder, parts)
    merge(settings, source, target, largest)
    return 0


# -- what is read ----


def _counts(settings: MergeSettings) -> list[float]:
    """What each adapter counts with."""
    wrong = []
    if not settings.adapter:
        wrong.append("adapter: which one? Give --adapter A, or several: --adapter A B")
    try:
        counts = [float(w) for w in settings.weights] or [1.0] * len(settings.adapter)
    except ValueError:
        counts = []
        wrong.append(f"weights: {','.join(settings.weights)} are not all numbers")
    if counts and len(counts) != len(settings.adapter):
        wrong.append(f"weights: {len(counts)} for {len(settings.adapter)} adapters")
    if len(settings.adapter) < 2 and settings.method != "linear":
        wrong.append(f"method {settings.method} combines several adapters; there is one")
    if wrong:
        raise SettingsError(wrong)
    return counts


def _base_of(parts: Parts) -> str:
    for files, _ in parts:
        if files.base:
            return named_base(files)
    raise UserError(
        "no adapter says which base it belongs to",
        where="model",
        fix="Name it: --model FOLDER_OR_HUB_ID.",
    )


def _open(settings: MergeSettings, model: str, folder: Path, parts: Parts) -> _Source:
    """The base, and adapters that belong to it."""
    base_config = read_json(folder / "config.json")
    _refuse_quantised(base_config, folder)
    notes = [note for files, _ in parts for note in files.notes]
    for files, _ in parts:
        notes += adapters.check_belongs(files, folder, settings.allow_other_base)
        if len(files.silent()) == len(files.pairs()):
            raise UserError(
                "this adapter adds nothing: every B is zero",
                where=f"adapter {files.path}",
                fix="It was saved before its first step, or badly; take another checkpoint.",
            )
    if model.lower().endswith(".gguf") or model == EMBEDDED:
        notes.append(
            "the base comes as a GGUF file: what its quantisation lost stays lost, and the "
            "adapter is merged into the weights as they were read from it"
        )
    return _Source(model, folder, base_config, open_weights(folder), parts, notes)


def _refuse_quantised(base: dict[str, Any], folder: Path) -> None:
    quantised = base.get("quantization_config") or {}
    if not quantised:
        return
    kind = str(quantised.get("quant_method", "an unknown method"))
    raise UserError(
        f"these weights are quantised ({kind}): merged, each would be rounded to its few bits a "
        "second time, and most of what the adapter learned is smaller than that rounding",
        where=str(folder),
        fix="Merge into the base in 16 bits, then quantise the result (vicuna quantize, vicuna "
        "export gguf). Or leave them apart: --model BASE --adapter A answers exactly.",
    )


# -- merging ----


class _Merge:
    """The sums, and whether they changed anything."""

    def __init__(self, source: _Source, addition: Addition, dtype: torch.dtype | None) -> None:
        self._weights, self._addition, self._dtype = source.weights, addition, dtype
        self.changed = self.touched = 0
        self._lock = Lock()

    def plan(self, untie: bool) -> list[Planned]:
        """All tensors of the result."""
        plan = [
            replace(p, read=self._reader(p.name, p.name, p.dtype))
            if p.name in self._addition.names
            else p
            for p in copies(self._weights, self._dtype)
        ]
        if untie:
            like = next(p for p in plan if p.name == _EMBEDDING)
            plan = [p for p in plan if p.name != _HEAD]
            read = self._reader(_HEAD, _EMBEDDING, like.dtype)
            plan.append(replace(like, name=_HEAD, read=read))
        return plan

    def _reader(self, name: str, source: str, dtype: torch.dtype) -> Read:
        def read(rows: slice) -> Tensor:
            weight = self._weights.read(source, rows)
            merged = rounded(name, self._addition.of_rows(rows).to(name, weight), dtype)
            changed = int(torch.count_nonzero(merged != weight.to(dtype)))
            with self._lock:
                self.touched += merged.numel()
                self.changed += changed
            return merged

        return read


def merge(settings: MergeSettings, source: _Source, target: Path, largest: int) -> None:
    """Write the merged base into `target`, compared and with its report.

    Raises: UserError where adapters and base do not fit, nothing would change, the disk is full, or
        the result does not pass.
    """
    parts = source.parts
    if len(parts) > 1 and settings.method != "linear":
        method = Method(settings.method, settings.density, settings.combined_rank, settings.seed)
        parts = [(combine(parts, method), 1.0)]
    addition = Addition(parts)
    tied = bool(source.config.get("tie_word_embeddings"))
    untie = _HEAD in addition.names and (tied or _HEAD not in source.weights.names())
    held = shapes(source.weights)
    addition.check({_HEAD: held[_EMBEDDING], **held} if untie else held, tied=False)
    dtype = _TYPES.get(settings.dtype)
    work = _Merge(source, addition, dtype)
    plan = work.plan(untie)
    check_space(target, sum(p.size for p in plan))
    report = Report("merge", target, _kind(plan), _about(settings, source), source.notes)
    with whole_folder(target) as aside:
        copy_side_files(source.folder, aside)
        _write_config(source, aside, plan, untie)
        write_sharded(aside, plan, largest)
        _check_changed(work, report)
        _write_speech(source, aside)
        report.measure(_bytes_read(source), aside)
        report.verify(
            settings,
            lambda: FolderScorer(source.folder, adapters=parts),
            lambda: FolderScorer(aside),
            lambda: Encoder(load_vocabulary(source.folder)),
        )
        report.write(aside)
    report.finish()


def _kind(plan: Sequence[Planned]) -> str:
    """The gate: rounding to 16 bits, where the sums are rounded so."""
    return "32bit" if all(p.dtype == torch.float32 for p in plan) else "16bit"


def _check_changed(work: _Merge, report: Report) -> None:
    if not work.changed:
        raise UserError(
            "the merge changes nothing: what the adapter adds is lost in rounding",
            where=str(report.result),
            fix="Use --dtype fp32, or --weights above 1 if it is meant to count more.",
        )
    share = work.changed / work.touched
    report.about["changed"] = {"values": work.changed, "of": work.touched}
    if share < 0.02:
        report.notes.append(
            f"only {share:.1%} of the values in the adapted matrices changed; the rest of what the "
            "adapter adds is smaller than their rounding (--dtype fp32 keeps it)"
        )


def _write_config(source: _Source, folder: Path, plan: Sequence[Planned], untie: bool) -> None:
    changed = dict(source.config)
    if untie:
        changed["tie_word_embeddings"] = False
    for key in {"dtype", "torch_dtype"} & changed.keys():
        kind = next((p.dtype for p in plan if p.dtype in _NAMES), None)
        changed[key] = _NAMES.get(kind, changed[key]) if kind else changed[key]
    write_json(folder / "config.json", changed)


def _write_speech(source: _Source, folder: Path) -> None:
    """How the merged model wants to be talked to: the adapter's template and its end token."""
    from vicuna.data.templates.literal import Renderer, from_dict
    from vicuna.export.chat_format import write_speech

    saved = [t for f, _ in source.parts if (t := f.meta.get("template"))]
    if not saved:
        return
    if any(t != saved[0] for t in saved):
        source.notes.append(
            f"the adapters have different templates; the first one's ({saved[0].get('name')}) is "
            "the result's"
        )
    write_speech(Renderer(from_dict(saved[0]), Encoder(load_vocabulary(source.folder))), folder)


def _bytes_read(source: _Source) -> int:
    base = sum(nbytes(source.weights, name) for name in source.weights.names())
    return base + sum(size_of(f.path / f.weights_file) for f, _ in source.parts)


def _about(settings: MergeSettings, source: _Source) -> dict[str, Any]:
    return {
        "model": source.name,
        "adapters": [
            {"path": str(path), "weight": weight, "rank": f.lora.rank, "alpha": f.lora.alpha}
            for path, (f, weight) in zip(settings.adapter, source.parts)
        ],
        "method": settings.method if len(source.parts) > 1 else "linear",
        "dtype": settings.dtype,
    }
