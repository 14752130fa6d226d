"""A report on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from vicuna.verify.report import Report

_NAMES = {"zh": "Chinese", "en": "English", "data": "your data"}


def show(report: Report, removed: bool = False) -> None:
    """Sizes, then a row for each kind of text, then the verdict."""
    console = Console(highlight=False)
    for note in report.notes:
        console.print(f"[yellow]note[/] {escape(note)}")
    console.print(
        f"{escape(str(report.result))}: {_size(report.bytes_after)} "
        f"(read {_size(report.bytes_before)}), peak memory {_size(report.peak_memory)}"
    )
    if report.comparison is None:
        console.print("[yellow]not compared[/] with what was read (--no-verify)")
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("compared on", "tokens", "perplexity", "KL mean", "largest", "logits", "agree"):
        table.add_column(title, justify="left" if title == "compared on" else "right")
    for kind, d in report.comparison.texts.items():
        table.add_row(
            _NAMES.get(kind, kind),
            f"{d.tokens:,}",
            f"{d.perplexity_before:.4g} → {d.perplexity_after:.4g}",
            f"{d.mean_kl:.2g}",
            f"{d.largest_kl:.2g}",
            f"±{d.largest_logit_difference:.2g}",
            f"{d.agreement:.1%}",
        )
    console.print(table)
    for question, answer in report.answers.items():
        console.print(f"{escape(question)} [dim]→[/] {escape(answer)}")
    if report.misses:
        state = "removed" if removed else "kept"
        console.print(f"[red]does not pass[/] ({state}): {escape('; '.join(report.misses))}")
    else:
        console.print("[green]passes[/]: " + _passed(report))


def _passed(report: Report) -> str:
    gate = report.gate
    assert gate is not None
    if gate.exact:
        return "every score is the same"
    return f"gate: mean KL {gate.max_kl:g}, perplexity × {gate.max_perplexity_ratio:g}"


def _size(number: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} B"
