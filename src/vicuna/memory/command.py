"""`vicuna plan`: what a run needs on a device, without it and without the weights.

Exit code 0 also where the run does not fit: that is an answer, not a mistake (`fits` in the JSON).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from vicuna import config
from vicuna.config import PlanSettings
from vicuna.errors import SettingsError
from vicuna.memory import devices, plan, shapes
from vicuna.memory.devices import GIB, Device
from vicuna.memory.footprint import PARTS
from vicuna.memory.plan import Plan

_ABOUT = {
    "base": "frozen weights",
    "adapters": "LoRA, fp32",
    "gradients": "of the adapters, fp32",
    "optimizer": "AdamW's two moments, fp32",
    "activations": "kept for backward, and temporaries",
    "loss": "scores over the vocabulary, a chunk at a time",
    "runtime": "context, libraries, workspaces",
    "margin": "what the allocator keeps beyond that",
}


def run(words: Sequence[str]) -> int:
    """Print the plan."""
    settings, given = config.parse(PlanSettings, words)
    device = device_of(settings)
    found = plan.make(settings, shapes.config_of(settings.model), device, given)
    if settings.json_output:
        print(json.dumps(as_json(found, settings), ensure_ascii=False))
    else:
        _show(found, settings)
    return 0


def device_of(settings: PlanSettings) -> Device:
    """The device to plan for: named, of a size, or the one at hand.

    Raises: UserError, SettingsError where the name or the size is unknown, or both are given.
    """
    sized = settings.memory != "auto"
    if settings.device and sized:
        raise SettingsError(["device and memory exclude each other: give one of them"])
    if settings.device:
        return devices.by_name(settings.device)
    if sized:
        return devices.by_memory(devices.parse_memory(settings.memory))
    from vicuna.model.load import pick_device

    return devices.at_hand("cuda" if pick_device().type == "cuda" else "cpu")


def as_json(found: Plan, settings: PlanSettings) -> dict[str, Any]:
    """The plan as one object."""
    return {
        "fits": found.fits,
        "peak_bytes": found.footprint.peak,
        "parts": found.footprint.parts,
        "settings": {"model": settings.model, **plan.settings_of(found.job)},
        "alternatives": [
            {"settings": a.settings, "peak_bytes": a.peak, "cost": a.cost}
            for a in found.alternatives
        ],
        "device": {"name": found.device.name, "memory_bytes": found.device.memory},
        "tokens_per_step": settings.batch_size * found.job.longest,
        "reason": found.reason,
    }


def _show(found: Plan, settings: PlanSettings) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"[bold]{escape(settings.model)}[/] on {escape(found.device.name)}")
    table = Table(box=None, show_header=False, pad_edge=True)
    table.add_column(style="cyan")
    table.add_column(justify="right")
    table.add_column(style="dim")
    for part in PARTS:
        table.add_row(part, f"{found.footprint.parts[part] / GIB:.2f} GiB", _ABOUT[part])
    table.add_row("peak", f"[bold]{found.footprint.peak / GIB:.2f} GiB[/]", "")
    console.print(table)
    tokens = settings.batch_size * found.job.longest
    console.print(
        f"A step: {settings.batch_size} examples of at most {found.job.longest:,} tokens, "
        f"{tokens:,} at most, {found.job.rows:,} at a time"
    )
    colour, word = ("green", "It fits") if found.fits else ("red", "It does not fit")
    console.print(f"[{colour}]{word}[/]: {escape(found.reason)}")
    if found.fits:
        return
    for number, other in enumerate(found.alternatives, 1):
        line = " ".join(f"--{k} {_value(v)}" for k, v in other.settings.items())
        console.print(
            f"  {number}. {escape(line)}: {other.peak / GIB:.2f} GiB. Costs: {other.cost}"
        )
    if not found.alternatives:
        larger = plan.larger_devices(found.footprint.peak)
        console.print(
            "No settings of this base fit. Take a smaller base"
            + (f", or a larger device: {', '.join(larger)}" if larger else "")
        )


def _value(value: Any) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)
