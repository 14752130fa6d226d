"""Where an adapter is: a folder, a run, or a hub id; what else is given is named for what it is."""

from __future__ import annotations

from pathlib import Path

from vicuna.errors import UserError
from vicuna.hub import must_be_hub_id, snapshot
from vicuna.model import adapter_kinds
from vicuna.model.lora_config import CONFIG
from vicuna.paths import given_path
from vicuna.weights.legacy_files import refuse_old


def locate_adapter(adapter: str) -> Path:
    """The folder of an adapter: a path, a run folder that holds `adapter/`, or a hub id."""
    path = given_path(adapter)
    if (path / "adapter").is_dir() and not (path / CONFIG).exists():
        return path / "adapter"
    if path.is_dir():
        return path
    if path.is_file():
        _refuse_file(path)
    if must_be_hub_id(adapter):
        return _from_hub(adapter)
    raise UserError(
        "no such adapter",
        where=f"adapter {adapter}",
        fix="Give a folder with adapter_config.json, a run folder, or a hub id.",
    )


def _refuse_file(path: Path) -> None:
    refuse_old(path)
    adapter_kinds.refuse_file(path)


def _from_hub(adapter: str) -> Path:
    patterns = ["*.json", "adapter_model.*", "adapters.safetensors", "pytorch_model.bin"]
    return snapshot(adapter, patterns, where=f"adapter {adapter}")
