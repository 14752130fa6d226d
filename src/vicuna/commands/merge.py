"""`vicuna merge`: merge adapters into their base, compare the result with base + adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vicuna import config
from vicuna.config import MergeSettings
from vicuna.config.precisions import PRECISIONS
from vicuna.convert.combine import Method, combine
from vicuna.convert.merge import Merge
from vicuna.data.templates.registry import template_from_dict
from vicuna.data.templates.renderer import Renderer
from vicuna.data.tokenizer import Tokenizer
from vicuna.errors import SettingsError, UserError
from vicuna.export.chat_format import write_chat_format
from vicuna.files import whole_folder
from vicuna.json_yaml import read_json
from vicuna.memory.devices import parse_memory
from vicuna.messages import Message
from vicuna.model import adapter as adapters
from vicuna.model.adapter import AdapterFiles
from vicuna.model.adapter_base import named_base
from vicuna.model.base import EMBEDDED, locate
from vicuna.model.lora_delta import LoraDelta
from vicuna.model.vocabulary import load_vocabulary
from vicuna.verify.logits import FolderLogits
from vicuna.verify.report import Report, size_of
from vicuna.weights.output_folder import check_space, result_folder
from vicuna.weights.read import Weights, nbytes, open_weights

_FEW = 0.02  # share of changed values below which a note says so

WeightedAdapters = list[tuple[AdapterFiles, float]]


@dataclass
class _Inputs:
    """What a merge reads: the base, and the adapters with their weights."""

    name: str
    folder: Path
    config: dict[str, Any]
    weights: Weights
    adapters: WeightedAdapters
    notes: list[str] = field(default_factory=list)


def run(argv: Sequence[str]) -> int:
    """Merge, compare, report."""
    settings, _ = config.parse(MergeSettings, argv)
    largest = parse_memory(settings.max_shard_size)
    weights = _adapter_weights(settings)
    weighted = [(adapters.read_adapter(a), w) for a, w in zip(settings.adapter, weights)]
    model = settings.model or _base_of(weighted)
    folder = locate(model)
    target = result_folder(
        settings.output_dir, settings.force, [folder, *(a.path for a, _ in weighted)]
    )
    inputs = _open(settings, model, folder, weighted)
    _merge(settings, inputs, target, largest)
    return 0


def _adapter_weights(settings: MergeSettings) -> list[float]:
    wrong = []
    if not settings.adapter:
        wrong.append("adapter is missing: give one (--adapter A) or several (--adapter A B)")
    try:
        weights = [float(w) for w in settings.weights] or [1.0] * len(settings.adapter)
    except ValueError:
        weights = []
        wrong.append(
            Message("weights is {weights}, but must be numbers", weights=",".join(settings.weights))
        )
    if weights and len(weights) != len(settings.adapter):
        wrong.append(f"weights has {len(weights)} values for {len(settings.adapter)} adapters")
    if len(settings.adapter) < 2 and settings.method != "linear":
        wrong.append(f"method {settings.method} combines several adapters, but there is only one")
    if wrong:
        raise SettingsError(wrong)
    return weights


def _base_of(weighted: WeightedAdapters) -> str:
    for files, _ in weighted:
        if files.base:
            return named_base(files)
    raise UserError(
        "no adapter says which base it belongs to",
        where="model",
        fix="Name it: --model FOLDER_OR_HUB_ID.",
    )


def _open(settings: MergeSettings, model: str, folder: Path, weighted: WeightedAdapters) -> _Inputs:
    """The base and its adapters, checked to belong together."""
    base_config = read_json(folder / "config.json")
    _refuse_quantised(base_config, folder)
    notes = [note for files, _ in weighted for note in files.notes]
    for files, _ in weighted:
        notes += adapters.check_belongs(files, folder, settings.allow_other_base)
        if len(files.silent()) == len(files.pairs()):
            raise UserError(
                "this adapter adds nothing: every B is zero",
                where=f"adapter {files.path}",
                fix="It was saved before its first step, or is damaged; use another checkpoint.",
            )
    if model.lower().endswith(".gguf") or model == EMBEDDED:
        notes.append(
            "the base is a GGUF file: what its quantization lost stays lost, and the "
            "adapter is merged into the weights as they were read from it"
        )
    return _Inputs(model, folder, base_config, open_weights(folder), weighted, notes)


def _refuse_quantised(base: dict[str, Any], folder: Path) -> None:
    quantised = base.get("quantization_config") or {}
    if not quantised:
        return
    method = str(quantised.get("quant_method", "an unknown method"))
    raise UserError(
        "these weights are quantized ({method}): merging would round each to its few bits a "
        "second time, and most of what the adapter has learned is smaller than that rounding",
        method=method,
        where=str(folder),
        fix="Merge into the base in 16 bits, then quantize the result (vicuna quantize, vicuna "
        "export gguf). Or do not merge: --model BASE --adapter A is exact.",
    )


def _merge(settings: MergeSettings, inputs: _Inputs, target: Path, largest: int) -> None:
    """Write the merged model into `target`, compared with base + adapters, with its report.

    Raises: UserError if adapters and base do not fit, nothing would change, the disk is full, or
        the result is too far from what it was made from.
    """
    weighted = inputs.adapters
    if len(weighted) > 1 and settings.method != "linear":
        method = Method(settings.method, settings.density, settings.combined_rank, settings.seed)
        weighted = [(combine(weighted, method), 1.0)]
    name = settings.dtype
    dtype = None if name == "auto" else getattr(torch, PRECISIONS[name].dtype)
    merge = Merge(inputs.config, inputs.weights, LoraDelta(weighted), dtype)
    check_space(target, merge.size)
    full = all(p.dtype == torch.float32 for p in merge.tensors)
    gate = "32bit" if full else "16bit"
    report = Report("merge", target, gate, _about(settings, inputs), inputs.notes)
    with whole_folder(target) as aside:
        merge.write(inputs.folder, aside, largest)
        _check_changed(merge, report)
        _write_chat_format(inputs, aside)
        report.measure(_bytes_read(inputs), aside)
        report.verify(
            settings,
            lambda: FolderLogits(inputs.folder, adapters=weighted),
            lambda: FolderLogits(aside),
            lambda: Tokenizer(load_vocabulary(inputs.folder)),
        )
        report.write(aside)
    report.finish()


def _check_changed(merge: Merge, report: Report) -> None:
    if not merge.changed:
        raise UserError(
            "the merge changes nothing: what the adapter adds is lost in rounding",
            where=str(report.result),
            fix="Use --dtype fp32, or --weights above 1 to scale the adapter up.",
        )
    share = merge.changed / merge.touched
    report.about["changed"] = {"values": merge.changed, "of": merge.touched}
    if share < _FEW:
        report.notes.append(
            Message(
                "only {share:.1%} of the values in the adapted matrices changed; the "
                "rest of what the adapter adds is smaller than their rounding (--dtype "
                "fp32 keeps it)",
                share=share,
            )
        )


def _write_chat_format(inputs: _Inputs, folder: Path) -> None:
    """Give the merged model the adapter's template and end token."""
    saved = [t for f, _ in inputs.adapters if (t := f.meta.get("template"))]
    if not saved:
        return
    if any(t != saved[0] for t in saved):
        inputs.notes.append(
            Message(
                "the adapters have different templates; the result gets the first one's ({name})",
                name=saved[0].get("name"),
            )
        )
    write_chat_format(
        Renderer(template_from_dict(saved[0]), Tokenizer(load_vocabulary(inputs.folder))), folder
    )


def _bytes_read(inputs: _Inputs) -> int:
    base = sum(nbytes(inputs.weights, name) for name in inputs.weights.names())
    return base + sum(size_of(f.path / f.weights_file) for f, _ in inputs.adapters)


def _about(settings: MergeSettings, inputs: _Inputs) -> dict[str, Any]:
    return {
        "model": inputs.name,
        "adapters": [
            {"path": str(path), "weight": weight, "rank": f.lora.rank, "alpha": f.lora.alpha}
            for path, (f, weight) in zip(settings.adapter, inputs.adapters)
        ],
        "method": settings.method if len(inputs.adapters) > 1 else "linear",
        "dtype": settings.dtype,
    }
