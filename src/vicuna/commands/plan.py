"""`vicuna plan`: what a run needs on a device, without the device and without the weights.

Exit code 0 also if the run does not fit: that is an answer, not a mistake (`fits` in the JSON).
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
    "optimizer": "its moments",
    "activations": "kept for backward, and temporaries",
    "loss": "logits, a chunk at a time",
    "runtime": "fixed part of a process: libraries, context, workspaces",
    "margin": "what the allocator keeps beyond that",
}


def run(argv: Sequence[str]) -> int:
    """Print the plan."""
    settings, named = config.parse(PlanSettings, argv)
    device = device_of(settings)
    shape, notes = model_shapes.config_and_notes(settings.model)
    warnings = [] if notes else _check_base(settings)
    result = plan.make(settings, shape, device, named)
    if settings.json_output:
        say_json(with_messages(as_json(result, settings) | {"notes": notes, "warnings": warnings}))
    else:
        for note in notes:
            say(f"note: {note}")
        _show(result, settings)
        for warning in warnings:
            say(f"warning: {warning}")
    return 0


def _check_base(settings: PlanSettings) -> list[str]:
    """The warnings of `vicuna doctor`; none for a shape that is known by name alone.

    Raises: UserError if it finds an error: that base cannot be trained, whatever fits.
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
    """The device to plan for: by name, by size, or this machine's.

    Raises: UserError, SettingsError if the name or the size is unknown, or both are given.
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


def as_json(result: Plan, settings: PlanSettings) -> dict[str, Any]:
    """The plan as one object."""
    return {
        "fits": result.fits,
        "peak_bytes": result.footprint.peak,
        "parts": result.footprint.parts,
        "settings": {"model": settings.model, **plan.settings_of(result.spec)},
        "alternatives": [
            {"settings": a.settings, "peak_bytes": a.peak, "cost": a.cost}
            for a in result.alternatives
        ],
        "device": {"name": result.device.name, "memory_bytes": result.device.memory},
        "tokens_per_step": settings.batch_size * result.spec.longest,
        "reason": result.reason,
    }


def _show(result: Plan, settings: PlanSettings) -> None:
    from rich.markup import escape
    from rich.table import Table

    from vicuna.console import Console

    console = Console()
    console.print(f"[bold]{escape(settings.model)}[/] on {escape(result.device.name)}")
    table = Table(box=None, show_header=False, pad_edge=True)
    table.add_column(style="cyan")
    table.add_column(justify="right")
    table.add_column(style="dim")
    for part in PARTS:
        table.add_row(part, f"{result.footprint.parts[part] / GIB:.2f} GiB", _ABOUT[part])
    table.add_row("peak", f"[bold]{result.footprint.peak / GIB:.2f} GiB[/]", "")
    console.print(table)
    tokens = settings.batch_size * result.spec.longest
    console.print(
        f"A step: {settings.batch_size} examples of at most {result.spec.longest:,} tokens, "
        f"{tokens:,} at most, {result.spec.tokens:,} at a time"
    )
    colour, word = ("green", "It fits") if result.fits else ("red", "It does not fit")
    console.print(f"[{colour}]{word}[/]: {escape(result.reason)}")
    if result.fits:
        return
    for number, other in enumerate(result.alternatives, 1):
        line = " ".join(f"--{k} {_value(v)}" for k, v in other.settings.items())
        console.print(
            f"  {number}. {escape(line)}: {other.peak / GIB:.2f} GiB. Costs: {other.cost}"
        )
    if not result.alternatives:
        larger = plan.larger_devices(result.footprint.peak)
        console.print(
            "No settings of this base fit. Take a smaller base"
            + (f", or a larger device: {', '.join(larger)}" if larger else "")
        )


def _value(value: Any) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)
