"""Results as Markdown tables, and tables into docs/performance.md between their markers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent.parent / "docs" / "performance.md"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; every column but the first is aligned to the right."""
    lines = [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
    return "\n".join([*lines, *(_line([str(c) for c in row]) for row in rows)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(c.replace("|", "/") for c in cells) + " |"


def machine_words(machine: dict[str, Any]) -> str:
    """One line that says what a table was measured on."""
    bf16 = ", ".join(machine["bf16_instructions"]) or "no bf16 instructions"
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    return (
        f"{machine['date']}; {machine['cpu']}, {machine['threads']} of {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB, {bf16}; Python {machine['python']}; {versions}."
    )


def write(name: str, text: str, docs: Path = DOCS) -> None:
    """Put `text` between the markers `<!-- begin: NAME -->` and `<!-- end: NAME -->`.

    Raises: SystemExit where the document has no such markers.
    """
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    old = docs.read_text(encoding="utf-8")
    head, found, rest = old.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{docs} has no place for this result: add the lines {begin} and {end}")
    docs.write_text(f"{head}{begin}\n{text.strip()}\n{end}{tail}", encoding="utf-8")
