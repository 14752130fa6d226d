"""`vicuna adapter inspect | upgrade`: describe an adapter, or convert it to today's PEFT format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vicuna import config
from vicuna.config import AdapterInspectSettings, AdapterUpgradeSettings
from vicuna.errors import EXIT_MISTAKE, SettingsError, UserError
from vicuna.files import whole_folder
from vicuna.messages import Message
from vicuna.model.adapter import AdapterFiles, read_adapter, save_files
from vicuna.paths import shell_word
from vicuna.terminal import say, say_json
from vicuna.verify.report import Report, size_of
from vicuna.weights.output_folder import check_space, result_folder

_LISTED = 3  # names of tensors or modules that a line shows


def _named(
    settings: AdapterInspectSettings | AdapterUpgradeSettings, positional: Sequence[str]
) -> str:
    """The adapter that the command line names, with or without --adapter."""
    names = [*positional, *([settings.adapter] if settings.adapter else [])]
    if len(names) != 1:
        raise SettingsError(["adapter is missing: give a folder, a run, or a hub id"])
    return names[0]


# -- inspect ----


def inspect(argv: Sequence[str]) -> int:
    """Print what an adapter is; exit code 2 where it cannot be used as it is."""
    positional: list[str] = []
    settings, _ = config.parse(AdapterInspectSettings, argv, free=positional)
    files = read_adapter(_named(settings, positional), checked=False)
    found = facts(files)
    if settings.json_output:
        say_json(found)
    else:
        _show(found)
    return EXIT_MISTAKE if found["not_finite"] else 0


def facts(files: AdapterFiles) -> dict[str, Any]:
    """All there is to say of an adapter."""
    belongs, template = files.meta.get("base") or {}, files.meta.get("template") or {}
    pairs, silent = files.pairs(), files.silent()
    return {
        "path": str(files.path),
        "weights": files.weights_file,
        "bytes": size_of(files.path / files.weights_file),
        "parameters": sum(t.numel() for t in files.tensors.values()),
        "dtype": sorted({str(t.dtype).removeprefix("torch.") for t in files.tensors.values()}),
        "rank": files.lora.rank,
        "alpha": files.lora.alpha,
        "alpha_assumed": not files.alpha_from,
        "rslora": files.lora.rslora,
        "scale": files.scale,
        "own_ranks": files.lora.ranks,
        "own_alphas": files.lora.alphas,
        "copies_of_the_base": sorted(files.copies),
        "modules": list(files.lora.target),
        "matrices": len(pairs),
        "base": files.base or None,
        "base_shape": {k: v for k, v in belongs.items() if k not in ("name", "weights")} or None,
        "template": template.get("name"),
        "largest": max(
            (float(t.abs().max()) for t in files.tensors.values() if torch.isfinite(t).all()),
            default=None,
        ),
        "adds_nothing": len(silent) == len(pairs),
        "silent": silent,
        "not_finite": files.not_finite(),
        "plain_peft": files.weights_file.endswith(".safetensors") and not files.notes,
        "notes": files.notes,
    }


def _show(found: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from vicuna.console import Console

    table = Table(box=None, show_header=False, pad_edge=True)
    table.add_column(style="cyan")
    table.add_column()
    assumed = "assumed: it is not recorded anywhere" if found["alpha_assumed"] else ""
    rows = {
        "weights": f"{found['weights']}, {found['bytes'] / 2**20:.1f} MiB, "
        f"{found['parameters']:,} values in {', '.join(found['dtype'])}",
        "rank": str(found["rank"])
        + (" (rank-stabilised)" if found["rslora"] else "")
        + _of_their_own(found["own_ranks"]),
        "alpha": f"{found['alpha']:g}"
        + (f" ({assumed})" if assumed else "")
        + _of_their_own(found["own_alphas"]),
        "modules": f"{', '.join(found['modules'])} ({found['matrices']} matrices)",
        "base": found["base"] or "not recorded",
        "template": found["template"] or "not recorded",
    }
    for name, text in rows.items():
        table.add_row(name, escape(text))
    console = Console()
    console.print(f"[bold]{escape(found['path'])}[/]: a LoRA adapter")
    console.print(table)
    for text, colour in _verdicts(found):
        console.print(f"  [{colour}]{escape(text)}[/]")


def _of_their_own(values: dict[str, float]) -> str:
    """What differs from the rest, in words."""
    if not values:
        return ""
    low, high = min(values.values()), max(values.values())
    shown = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    return f"; {shown} in {len(values)} matrices"


def _verdicts(found: dict[str, Any]) -> list[tuple[str, str]]:
    lines = [(note, "yellow") for note in found["notes"]]
    if copies := found["copies_of_the_base"]:
        some = ", ".join(copies[:_LISTED])
        lines.append((f"holds a copy of the base's {some}: compared with the base in use", "dim"))
    if found["not_finite"]:
        some = ", ".join(found["not_finite"][:_LISTED])
        lines.append((f"{len(found['not_finite'])} tensors contain NaN or Inf: {some}", "red"))
    if found["adds_nothing"]:
        lines.append(("it adds nothing: every B is zero", "red"))
    elif found["silent"]:
        some = ", ".join(found["silent"][:_LISTED])
        lines.append((f"adds nothing to {len(found['silent'])} matrices: {some}", "yellow"))
    if not found["plain_peft"]:
        lines.append(
            ("usable as it is; vicuna adapter upgrade converts it to today's format", "dim")
        )
    return lines


# -- upgrade ----


def upgrade(argv: Sequence[str]) -> int:
    """Write a sound PEFT adapter into a new place; the source stays as it is."""
    positional: list[str] = []
    settings, _ = config.parse(AdapterUpgradeSettings, argv, free=positional)
    files = read_adapter(_named(settings, positional))
    target = result_folder(settings.output_dir, settings.force, [files.path])
    notes = list(files.notes)
    if settings.alpha:
        if files.alpha_from and files.lora.alpha != settings.alpha:
            raise UserError(
                "the adapter's own alpha is {alpha:g}",
                alpha=files.lora.alpha,
                where="alpha",
                fix="Leave out --alpha.",
            )
        files.lora.alpha = settings.alpha
        notes = [n for n in notes if "assumed" not in n]
        notes.append(Message("alpha {alpha:g} (from --alpha)", alpha=settings.alpha))
    size = sum(t.numel() * t.element_size() for t in files.tensors.values())
    check_space(target, size)
    name = _named(settings, positional)
    about = {"adapter": name, "rank": files.lora.rank, "alpha": files.lora.alpha}
    report = Report("adapter upgrade", target, "exact", about, notes)
    with whole_folder(target) as aside:
        save_files(files, aside)
        report.measure(size_of(files.path / files.weights_file), aside)
        if settings.verify:
            _check_written(files, aside)
            report.about["tensors_compared"] = len(files.tensors)
            report.about["identical"] = True
        report.write(aside)
    _show_result(report, target, settings.verify)
    return 0


def _check_written(files: AdapterFiles, folder: Path) -> None:
    """Read back what was written: an adapter's tensors are few enough to compare all of them."""
    again = read_adapter(str(folder))
    same = files.tensors.keys() == again.tensors.keys() and all(
        torch.equal(t, again.tensors[k]) and t.dtype == again.tensors[k].dtype
        for k, t in files.tensors.items()
    )
    if not same or again.lora != files.lora or again.notes:
        raise UserError(
            "the result read back differs from its source; it was removed", where=str(folder)
        )  # a disk that lies: nothing here rounds


def _show_result(report: Report, target: Path, compared: bool) -> None:
    for note in report.notes:
        say(f"note: {note}")
    same = f", all {report.about['tensors_compared']} tensors as they were" if compared else ""
    say(f"{target}: {report.bytes_after / 2**20:.1f} MiB{same}")
    say(f"report     {report.path}")
    say(f"\n  vicuna adapter inspect {shell_word(target)}")
