"""Adapters of mlx-lm, read as PEFT's: A is its `lora_a` transposed, B its `lora_b`, alpha its scale
times the rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from vicuna.errors import UserError
from vicuna.model.lora_config import CONFIG
from vicuna.weights.read import SafetensorsWeights

WEIGHTS = "adapters.safetensors"
_SIDES = {"lora_a": "A", "lora_b": "B"}


def read(folder: Path, lead: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors under PEFT's keys, PEFT's config) of a folder that mlx-lm wrote.

    Args:
        lead: what PEFT's keys begin with.

    Raises: UserError where it is not a LoRA of linear layers, or its scale is not known.
    """
    own = _config(folder)
    kind = own.get("fine_tune_type", "lora")
    if kind != "lora":
        raise _refusal(folder / CONFIG, f"fine_tune_type {kind}")
    path = folder / WEIGHTS
    weights = SafetensorsWeights([path])
    tensors: dict[str, Tensor] = {}
    for key in weights.names():
        module, _, side = key.rpartition(".")
        if side not in _SIDES:
            raise _refusal(path, f"it holds {key}")
        if len(weights.shape(key)) != 2 or "embed" in module.rsplit(".", 1)[-1]:
            raise _refusal(path, f"{key} is not that of a linear layer")
        tensors[f"{lead}{module}.lora_{_SIDES[side]}.weight"] = weights.read(key).T.contiguous()
    if not tensors:
        raise UserError("no LoRA weights in this file", where=str(path))
    return tensors, _as_peft(own, tensors, folder)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(
            "mlx-lm's {config} is missing or broken: {error}",
            config=CONFIG,
            error=e,
            where=str(path),
            fix="It says what the adapter is scaled by; copy it from where it was trained.",
        ) from e
    if not isinstance(loaded, dict):
        raise UserError("{config} is broken: expected a table", config=CONFIG, where=str(path))
    return loaded


def _as_peft(own: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> dict[str, Any]:
    settings = own.get("lora_parameters")
    scale = settings.get("scale") if isinstance(settings, dict) else None
    if not isinstance(settings, dict) or not isinstance(scale, (int, float)):
        raise UserError(
            "mlx-lm's config has no lora_parameters with a scale",
            where=str(folder / CONFIG),
            fix="Without it the adapter's strength is not known; copy the config from where it was "
            "trained.",
        )
    if "alpha" in settings:
        raise UserError(
            "mlx-lm's lora_parameters have a scale and an alpha: versions before 0.19 multiplied "
            "by scale * alpha / rank, later ones by scale alone",
            where=str(folder / CONFIG),
            fix="Delete alpha there; of an old version, write scale * alpha / rank as scale.",
        )
    rank = next(t.shape[0] for k, t in tensors.items() if k.endswith(".lora_A.weight"))
    return {
        "r": rank,
        "lora_alpha": scale * rank,
        # Each layer's sum is scaled alike, whatever its rank.
        "alpha_pattern": {
            k.split(".lora_A.")[0].removeprefix("base_model.model."): scale * t.shape[0]
            for k, t in tensors.items()
            if k.endswith(".lora_A.weight") and t.shape[0] != rank
        },
        "base_model_name_or_path": own.get("model"),
    }


def _refusal(where: Path, what: str) -> UserError:
    return UserError(
        "this adapter of mlx-lm is more than a LoRA of linear layers: {details}",
        details=what,
        where=str(where),
        fix="Fuse it with mlx-lm (mlx_lm.fuse --model BASE --adapter-path ADAPTER "
        "--save-path FOLDER), then use --model FOLDER.",
    )
