"""`vicuna COMMAND --help`: the settings of a command, by group, with their defaults."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from vicuna.config import Settings
from vicuna.console import Console

_LAST = ("Verifying",)  # groups that several commands share, below what is a command's own


def show(settings: type[Settings], usage: str, about: str) -> None:
    """Print usage, what the command is for, and a table of its settings."""
    console = Console()
    console.print(f"{escape(about.strip())}\n\n[bold]{escape(usage)}[/] \\[--key value ...]\n")
    groups: dict[str, list[tuple[str, str, str]]] = {}
    for name, field in settings.model_fields.items():
        extra = field.json_schema_extra
        group = str(extra.get("group", "Other")) if isinstance(extra, dict) else "Other"
        default = "" if field.default in ("", [], (), None) else str(field.default)
        shown = "json" if name == "json_output" else name
        groups.setdefault(group, []).append((shown, default, field.description or ""))
    for group, rows in sorted(groups.items(), key=lambda item: item[0] in _LAST):
        table = Table(title=group, title_justify="left", box=None, show_header=False, pad_edge=True)
        table.add_column(no_wrap=True, style="cyan", min_width=26)
        table.add_column(no_wrap=True, style="dim", min_width=12)
        table.add_column()
        for name, default, text in rows:
            table.add_row(f"--{name}", escape(default), escape(text))
        console.print(table)
        console.print()
