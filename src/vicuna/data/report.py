"""What happened to every record: used, repaired, dropped, warned of, and where.

Nothing is lost in silence: `records == used + dropped` always holds, and each problem has a line.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vicuna.data.checks import NO_CHINESE
from vicuna.data.types import Parsed, Problem

if TYPE_CHECKING:
    from rich.console import RenderableType

# Below this share of rows without Chinese nothing is said: quotations and code are normal.
WORTH_SAYING = 0.05
PLACES = 3


@dataclass
class FileReport:
    """The counts of one file. Picklable: worker processes send theirs back to be merged."""

    path: str
    formats: Counter[str] = field(default_factory=Counter)
    used: int = 0
    dropped: int = 0
    problems: list[Problem] = field(default_factory=list)
    without_chinese: int = 0
    _repaired: set[int] = field(default_factory=set)

    @property
    def records(self) -> int:
        return self.used + self.dropped

    @property
    def repaired(self) -> int:
        """Records used after at least one repair."""
        return len(self._repaired)

    def add(self, parsed: Parsed) -> None:
        """Count one record."""
        self.formats[parsed.format] += 1
        if parsed.conversation is None:
            self.dropped += 1
            self.problems += parsed.problems
            return
        self.used += 1
        for problem in parsed.problems:
            if problem.reason == NO_CHINESE:
                self.without_chinese += 1
                continue
            self.problems.append(problem)
            if problem.action == "repaired":
                self._repaired.add(problem.line)

    def file_problem(self, problem: Problem, is_record: bool) -> None:
        """Note what the reader found; a cut-off line is a record, an encoding is not."""
        self.problems.append(problem)
        if is_record:
            self.dropped += 1

    def drop_used(self, line: int, field: str, reason: str) -> None:
        """A later stage drops a record that was counted as used."""
        self.problems.append(Problem(line, field, reason, "dropped"))
        self.used -= 1
        self.dropped += 1
        self._repaired.discard(line)

    def warn(self, line: int, field: str, reason: str) -> None:
        """A later stage warns of a record."""
        self.problems.append(Problem(line, field, reason, "warned"))

    def merge(self, other: FileReport) -> None:
        """Add the counts of another part of the same file."""
        self.formats += other.formats
        self.used += other.used
        self.dropped += other.dropped
        self.problems += other.problems
        self.without_chinese += other.without_chinese
        self._repaired |= other._repaired

    def notes(self) -> list[str]:
        """What is to be said about the file as a whole."""
        if not self.records:
            return [f"{self.path}: no rows"]
        notes = []
        if not self.used:
            notes.append(f"{self.path}: no usable rows")
        share = self.without_chinese / max(1, self.used)
        if WORTH_SAYING < share < 1:
            notes.append(
                f"{self.path}: {self.without_chinese} of {self.used} records have no Chinese text"
            )
        return notes

    def to_json(self) -> dict[str, Any]:
        """Plain data, problems in order of their lines."""
        return {
            "path": self.path,
            "formats": dict(self.formats),
            "records": self.records,
            "used": self.used,
            "repaired": self.repaired,
            "dropped": self.dropped,
            "without_chinese": self.without_chinese,
            "problems": [p._asdict() for p in sorted(self.problems, key=lambda p: p.line)],
            "notes": self.notes(),
        }

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> FileReport:
        """The report that `to_json` wrote."""
        problems = [Problem(**p) for p in saved["problems"]]
        gone = {p.line for p in problems if p.action == "dropped"}
        return cls(
            path=saved["path"],
            formats=Counter(saved["formats"]),
            used=saved["used"],
            dropped=saved["dropped"],
            problems=problems,
            without_chinese=saved["without_chinese"],
            _repaired={p.line for p in problems if p.action == "repaired"} - gone,
        )


@dataclass
class DataReport:
    """The reports of all files of a run."""

    files: list[FileReport] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {"files": [f.to_json() for f in self.files]}

    def rich_table(self) -> RenderableType:
        """One table of the files' numbers, one of the reasons with the first places, the notes."""
        from rich.console import Group
        from rich.markup import escape
        from rich.table import Table

        table = Table(box=None, header_style="bold", pad_edge=False)
        for title in ("file", "formats", "records", "used", "repaired", "dropped"):
            right = title in ("records", "used", "repaired", "dropped")
            table.add_column(title, justify="right" if right else "left")
        for f in self.files:
            formats = ", ".join(f"{n:,} {name}" for name, n in f.formats.most_common())
            numbers = (f"{n:,}" for n in (f.records, f.used, f.repaired, f.dropped))
            table.add_row(escape(f.path), formats, *numbers)
        parts: list[RenderableType] = [table]
        reasons = self._reasons()
        if reasons.row_count:
            parts += ["", reasons]
        parts += [f"[yellow]note:[/] {escape(n)}" for f in self.files for n in f.notes()]
        return Group(*parts)

    def _reasons(self) -> Any:
        from rich.markup import escape
        from rich.table import Table

        counts: Counter[tuple[str, str]] = Counter()
        places: dict[tuple[str, str], list[str]] = {}
        for f in self.files:
            for p in f.problems:
                key = (p.action, p.reason.partition(": ")[0])
                counts[key] += 1
                first = places.setdefault(key, [])
                if len(first) < PLACES:
                    detail = p.reason.partition(": ")[2]
                    words = f"{Path(f.path).name}:{p.line} {p.field}".rstrip()
                    first.append(f"{words} ({detail})" if detail else words)
        table = Table(box=None, header_style="bold", pad_edge=False)
        for title in ("what", "why", "how often", "where (first places)"):
            table.add_column(title, justify="right" if title == "how often" else "left")
        order = {"dropped": 0, "repaired": 1, "warned": 2}
        colours = {"dropped": "red", "repaired": "cyan", "warned": "yellow"}
        for (action, reason), n in sorted(counts.items(), key=lambda c: (order[c[0][0]], -c[1])):
            more = ", ..." if n > PLACES else ""
            where = escape(", ".join(places[action, reason]) + more)
            table.add_row(f"[{colours[action]}]{action}[/]", escape(reason), f"{n:,}", where)
        return table
