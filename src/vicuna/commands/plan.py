"""`vicuna plan`: what a run needs on a device, without it and without the weights.

Exit code 0 also where the run does not fit: that is an answer, not a mistake (`fits` in the JSON).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vicuna import config
from vicuna.config import PlanSettings
from vicuna.errors import SettingsError, UserError
from vicuna.memory import devices, model_shapes, plan
from vicuna.memory.devices import GIB, Device
from vicuna.memory.footprint import PARTS
from vicuna.memory.plan import Plan
from vicuna.messages import with_messages
from vicuna.paths import shell_word
from vicuna.terminal import say, say_json

_ABOUT = {
    "base": "frozen weights",
    "adapters": "LoRA, fp32",
    "gradients": "of the adapters, fp32",
    "optimizer": "AdamW's two moments, fp32",
    "activations": "kept for backward, and temporaries",
    "loss": "scores over the vocabulary, a chunk at a time",
    "runtime": "fixed part of a process: libraries, context, workspaces",
    "margin": "what the allocator keeps beyond that",
}


def run(words: Sequence[str]) -> int:
    """Print the plan."""
    settings, given = config.parse(PlanSettings, words)
    device = device_of(settings)
    shape, notes = model_shapes.config_and_notes(settings.model)
    warnings = [] if notes else _check_base(settings)
    found = plan.make(settings, shape, device, given)
    if settings.json_output:
        say_json(with_messages(as_json(found, settings) | {"notes": notes, "warnings": warnings}))
    else:
        for note in notes:
            say(f"note: {note}")
        _show(found, settings)
        for warning in warnings:
            say(f"warning: {warning}")
    return 0


def _check_base(settings: PlanSettings) -> list[str]:
    """What `vicuna doctor` warns of; nothing of a shape that is known by name alone.

    Raises: UserError where it finds an error: that base cannot be trained, whatever fits.
    """
    if model_shapes.is_known(settings.model):
        return []
    from vicuna.commands.doctor import examine
    from vicuna.model.base import locate_vocabulary

    _, findings = examine(locate_vocabulary(settings.model), settings.template)
    errors = [f.text for f in findings if f.level == "error"]
    if errors:
        raise UserError(
            "this base cannot be trained as it is: {errors}",
            errors="; ".join(errors),
            model=shell_word(settings.model),
            where=settings.model,
            fix="vicuna doctor {model} lists all that was checked.",
        )
    return [f.text for f in findings if f.level == "warning"]


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
        "settings": {"model": settings.model, **plan.settings_of(found.spec)},
        "alternatives": [
            {"settings": a.settings, "peak_bytes": a.peak, "cost": a.cost}
            for a in found.alternatives
        ],
        "device": {"name": found.device.name, "memory_bytes": found.device.memory},
        "tokens_per_step": settings.batch_size * found.spec.longest,
        "reason": found.reason,
    }


def _show(found: Plan, settings: PlanSettings) -> None:
    from rich.markup import escape
    from rich.table import Table

    from vicuna.console import Console

    console = Console()
    console.print(f"[bold]{escape(settings.model)}[/] on {escape(found.device.name)}")
    table = Table(box=None, show_header=False, pad_edge=True)
    table.add_column(style="cyan")
    table.add_column(justify="right")
    table.add_column(style="dim")
    for part in PARTS:
        table.add_row(part, f"{found.footprint.parts[part] / GIB:.2f} GiB", _ABOUT[part])
    table.add_row("peak", f"[bold]{found.footprint.peak / GIB:.2f} GiB[/]", "")
    console.print(table)
    tokens = settings.batch_size * found.spec.longest
    console.print(
        f"A step: {settings.batch_size} examples of at most {found.spec.longest:,} tokens, "
        f"{tokens:,} at most, {found.spec.tokens:,} at a time"
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
