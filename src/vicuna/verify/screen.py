"""A report on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from vicuna.console import Console

if TYPE_CHECKING:
    from vicuna.verify.report import Report

# A perplexity that rose by more is said beside "passes": the gates of few bits are wide.
_NOTABLE = 1.1
_NAMES = {"zh": "Chinese", "en": "English", "data": "your data"}


def show(report: Report, removed: bool = False) -> None:
    """Sizes, then a row for each kind of text, then the verdict."""
    console = Console()
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
    passed = f"gate: mean KL {gate.max_kl:g}, perplexity × {gate.max_perplexity_ratio:g}"
    assert report.comparison is not None
    ratio = report.comparison.perplexity_ratio
    if ratio < _NOTABLE:
        return passed
    rose = f"{ratio:.1f} times what it was" if ratio >= 2 else f"up by {ratio - 1:.0%}"
    return f"{passed}\n[yellow]but it is worse than before[/]: perplexity is {rose}"


def _size(number: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} B"
