"""An adapter as it lies on disk, read: what we save, what plain PEFT saved, what 2023 saved.

`adapter_model.safetensors`, `adapter_model.bin` or `pytorch_model.bin` (in a checkpoint, beside the
optimiser's files); keys with or without `.default`, under any wrapper; no config at all, or one
that names fewer modules than the weights hold. The caller's files are never changed.

What the weights hold beyond a LoRA (DoRA, trained embeddings, biases) is refused: left out in
silence, the answers would be those of another adapter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vicuna.errors import UserError
from vicuna.model.pickles import load_pickled
from vicuna.model.vocabulary import META
from vicuna.model.weights import SafetensorsWeights

CONFIG = "adapter_config.json"
LEAD = "base_model.model."
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_model.bin")
_WEIGHT = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight$")
# Keys of an adapter that is more than a LoRA.
_MORE = re.compile(r"lora_magnitude_vector|lora_embedding_[AB]|modules_to_save|lora_[AB]\.")
_BASE_KEY = re.compile(r"\.(weight|bias|inv_freq|SCB|weight_format)$")


@dataclass
class LoraSettings:
    """The shape of an adapter. target: `all`, or names of linear layers."""

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    target: tuple[str, ...] = ("all",)
    rslora: bool = False


@dataclass
class AdapterFiles:
    """An adapter as read from disk: PEFT's settings, tensors under PEFT's keys, and what was noted.

    meta: `vicuna.json`'s content, empty for adapters of other origin. notes: what had to be guessed
    or repaired, in words. base_name: the base as PEFT's config names it. weights_file: the file the
    tensors came from. alpha_from: where alpha was found, "" where it was assumed.
    """

    path: Path
    lora: LoraSettings
    tensors: dict[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    base_name: str = ""
    weights_file: str = ""
    alpha_from: str = ""

    @property
    def scale(self) -> float:
        """What B@A is multiplied by before it is added to a weight."""
        rank, alpha = self.lora.rank, self.lora.alpha
        return alpha / (rank**0.5 if self.lora.rslora else rank)

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(A (rank, in), B (out, rank)) by the name of the base's module.

        Raises: UserError where one of a pair is missing.
        """
        sides: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self.tensors.items():
            found = _WEIGHT.match(key)
            assert found
            module = found["module"].removeprefix(LEAD)
            sides.setdefault(module, {})[found["side"]] = tensor
        for module, pair in sides.items():
            if len(pair) != 2:
                raise UserError(
                    f"{module} has lora_{next(iter(pair))} alone, its other half is missing",
                    where=f"adapter {self.path}",
                    fix="The file is damaged; fetch it again.",
                )
        return {module: (pair["A"], pair["B"]) for module, pair in sides.items()}

    def silent(self) -> list[str]:
        """Modules to which it adds nothing: their B, or their A, is all zero."""
        return [m for m, (a, b) in self.pairs().items() if not (a.any() and b.any())]

    def not_finite(self) -> list[str]:
        """Keys of tensors with values that are no numbers."""
        return [k for k, t in self.tensors.items() if not torch.isfinite(t).all()]


# -- where it is ----


def locate_adapter(adapter: str) -> Path:
    """The folder of an adapter: a path, a run folder that holds `adapter/`, or a hub id."""
    path = Path(adapter).expanduser()
    if (path / "adapter").is_dir() and not (path / CONFIG).exists():
        return path / "adapter"
    if path.is_dir():
        return path
    if path.is_file():
        _refuse_file(path)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", adapter) and not path.parent.is_dir():
        return _from_hub(adapter)
    raise UserError(
        "no such adapter",
        where=f"adapter {adapter}",
        fix="Give a folder with adapter_config.json, a run folder, or a hub id.",
    )


def _refuse_file(path: Path) -> None:
    from vicuna.model.old_files import refuse_old

    refuse_old(path)
    if path.name in WEIGHT_FILES:
        raise UserError("an adapter is a folder", where=str(path), fix=f"Give {path.parent}.")


def _from_hub(adapter: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "adapter_model.*", "pytorch_model.bin"]
        return Path(snapshot_download(adapter, allow_patterns=wanted))
    except Exception as e:  # network, name, login: the hub library has a dozen kinds
        raise UserError(
            f"the hub has no such adapter or cannot be reached ({type(e).__name__})",
            where=f"adapter {adapter}",
            fix="Check the name; HF_ENDPOINT sets a mirror, HF_HUB_OFFLINE=1 uses the local cache.",
        ) from e


# -- reading ----


def read_adapter(adapter: str, checked: bool = True) -> AdapterFiles:
    """Read an adapter of any age.

    Args:
        checked: False reads one with values that are no numbers, too: to look at it.

    Raises: UserError where the folder holds none, its weights are damaged, or it is more than a
        LoRA.
    """
    folder = locate_adapter(adapter)
    notes: list[str] = []
    tensors, file = _read_tensors(folder, notes)
    modules, rank = _shape_of(tensors, folder)
    config, origin = _read_config(folder, rank, notes)
    _check_config(config, folder, modules, rank, notes)
    alpha = config.get("lora_alpha")
    if alpha is None:
        origin = ""
        notes.append(
            f"{'no ' + CONFIG if not config else 'no lora_alpha in ' + CONFIG}: rank {rank} and "
            f"modules read from the weights, alpha {2 * rank} assumed (the 2023 project's rule)"
        )
    lora = LoraSettings(
        rank=rank,
        alpha=_number(2 * rank if alpha is None else alpha, "lora_alpha", folder),
        target=tuple(modules),
        rslora=bool(config.get("use_rslora", False)),
    )
    meta = read_json(folder / META) if (folder / META).is_file() else {}
    name = str(config.get("base_model_name_or_path") or "")
    files = AdapterFiles(folder, lora, tensors, meta, notes, name, file, origin)
    files.pairs()
    if checked:
        _check_values(files)
    return files


def _read_tensors(folder: Path, notes: list[str]) -> tuple[dict[str, Tensor], str]:
    """(LoRA tensors under PEFT's keys, the file they came from)."""
    for name in WEIGHT_FILES:
        path = folder / name
        if not path.is_file():
            continue
        loaded: Mapping[str, Tensor]
        if path.suffix == ".safetensors":
            weights = SafetensorsWeights([path])
            loaded = {key: weights.read(key) for key in weights.names()}
        else:
            loaded = load_pickled(path)
            notes.append(f"old format {name}")
        tensors = {_plain_key(k): v.contiguous() for k, v in loaded.items() if _WEIGHT.match(k)}
        if not tensors:
            raise UserError("no LoRA weights in this file", where=str(path), fix=_made_empty(path))
        _check_rest([k for k in loaded if not _WEIGHT.match(k)], path, notes)
        return tensors, name
    inside = sorted(p.parent.name for n in WEIGHT_FILES for p in folder.glob(f"checkpoint-*/{n}"))
    fix = f"Name a checkpoint in it: {', '.join(inside[-3:])}." if inside else (
        "It needs adapter_model.safetensors (or the old adapter_model.bin)."
    )  # fmt: skip
    raise UserError("no adapter weights in this folder", where=str(folder), fix=fix)


def _made_empty(path: Path) -> str:
    if path.stat().st_size > 4096:
        return "It is no LoRA adapter."
    return "Saved without its weights (a known fault of 2023); take an earlier checkpoint."


def _plain_key(key: str) -> str:
    """The key as PEFT writes it to disk today, whatever the model was wrapped in."""
    key = re.sub(r"\.lora_([AB])\.default\.weight$", r".lora_\1.weight", key)
    at = key.find(LEAD)
    return key[at:] if at >= 0 else LEAD + key


def _check_rest(keys: list[str], path: Path, notes: list[str]) -> None:
    """Refuse what was trained beside the LoRA; a checkpoint's copy of the base is left alone."""
    more = [k for k in keys if _MORE.search(k)]
    if not more and path.name == WEIGHT_FILES[0]:
        more = keys
    if not more and path.name == WEIGHT_FILES[1]:
        more = [k for k in keys if "base_layer" not in k]
    if more:
        raise UserError(
            f"this adapter is more than a LoRA: it also holds {more[0]}"
            + (f" and {len(more) - 1} more" if len(more) > 1 else ""),
            where=str(path),
            fix="Without them its answers would be others. Merge it with the program that made it, "
            "and use the result as --model.",
        )
    if keys:
        notes.append(f"{path.name} also holds {len(keys)} tensors of the base, not used")


def _shape_of(tensors: dict[str, Tensor], folder: Path) -> tuple[list[str], int]:
    """(names of the adapted modules, rank) as the weights themselves say."""
    modules: set[str] = set()
    ranks: set[int] = set()
    for key, tensor in tensors.items():
        found = _WEIGHT.match(key)
        assert found
        if tensor.ndim != 2 or not tensor.numel() or not tensor.is_floating_point():
            raise UserError(
                f"{key} is no matrix of numbers: {tuple(tensor.shape)} {tensor.dtype}",
                where=str(folder),
            )
        modules.add(found["module"].rsplit(".", 1)[-1])
        ranks.add(tensor.shape[0] if found["side"] == "A" else tensor.shape[1])
    if len(ranks) != 1:
        raise UserError(f"layers of different ranks {sorted(ranks)}", where=str(folder))
    return sorted(modules), ranks.pop()


def _read_config(folder: Path, rank: int, notes: list[str]) -> tuple[dict[str, Any], str]:
    """(PEFT's config, where it lies). A checkpoint without one takes its run's of this rank."""
    if (folder / CONFIG).is_file():
        return read_json(folder / CONFIG), CONFIG
    above = folder.resolve().parent / CONFIG
    if folder.name.startswith("checkpoint-") and above.is_file():
        config = read_json(above)
        if config.get("r") == rank:
            notes.append(f"no {CONFIG} here; the run's, one folder up, was read")
            return config, str(above)
    return {}, ""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON table.

    Raises: UserError where it is none.
    """
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{path.name} is missing or broken: {e}", where=str(path)) from e
    if not isinstance(loaded, dict):
        raise UserError(f"{path.name} is broken: expected a table", where=str(path))
    return loaded


def _number(value: Any, key: str, folder: Path) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not number > 0 or number == float("inf"):
        raise UserError(f"{key} is {value!r}, but must be above 0", where=str(folder / CONFIG))
    return number


def _check_config(
    config: dict[str, Any], folder: Path, modules: list[str], rank: int, notes: list[str]
) -> None:
    """Refuse kinds of adapters that are not a plain LoRA; note what the weights contradict."""
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise UserError(f"only LoRA adapters can be used, this is {kind}", where=str(folder))
    if config.get("use_dora"):
        raise UserError(
            "this is a DoRA adapter, which is not supported",
            where=str(folder),
            fix="Merge it with PEFT, and use the result as --model.",
        )
    if set((config.get("alpha_pattern") or {}).values()) - {config.get("lora_alpha")}:
        raise UserError("layers of different alpha are not supported", where=str(folder))
    named = config.get("target_modules") or []
    if isinstance(named, list) and named:
        ends = {str(n).rsplit(".", 1)[-1] for n in named}
        if extra := sorted(set(modules) - ends):
            notes.append(
                f"the config forgets modules that the weights hold: {', '.join(extra)}; they are "
                "used"
            )
    if config.get("r", rank) != rank:
        notes.append(f"the config says rank {config['r']}, the weights have {rank}")


def _check_values(files: AdapterFiles) -> None:
    bad = files.not_finite()
    if bad:
        raise UserError(
            f"{bad[0]} holds values that are no numbers"
            + (f", and so do {len(bad) - 1} more tensors" if len(bad) > 1 else ""),
            where=f"adapter {files.path}",
            fix="The training overflowed or the file is damaged; take an earlier checkpoint.",
        )
    if len(files.silent()) == len(files.pairs()):
        files.notes.append("every B is zero: this adapter adds nothing to its base")


def plain_config(files: AdapterFiles, modules: Iterable[str] | None = None) -> dict[str, Any]:
    """PEFT's config of an adapter that was read, as PEFT writes it today."""
    from peft import LoraConfig

    config = LoraConfig(
        r=files.lora.rank,
        lora_alpha=files.lora.alpha,  # type: ignore[arg-type]
        target_modules=sorted(modules or files.lora.target),
        use_rslora=files.lora.rslora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=files.meta.get("base", {}).get("name") or files.base_name or None,
        inference_mode=True,
    ).to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    return dict(config)
