"""What happened to every record: counts while reading, one table and one JSON at the end.

Always `records == used + dropped`, for a file and for any part of it. A record is dropped once,
however many problems it has; `repaired` counts used records with at least one repair.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from vicuna.data.conversation import Action, Parsed, Problem
from vicuna.data.records.reasons import NO_CHINESE, ONE_TURN, UNKNOWN_FORMAT
from vicuna.messages import Message, restored, with_messages

if TYPE_CHECKING:
    from rich.console import RenderableType

# Below this share, rows without Chinese (numbers, code, a translation) are what one expects.
WORTH_SAYING = 0.05
NOT_USED = "columns not used"
OWN_NAMES = "no column has a name that is known here"
COUNTED = 100  # names that are counted one by one
MORE_COLUMNS = "and others"
PLACES = 3  # examples of a reason in the table
# What no name has, and what most have: a header's words, or a plain identifier.
_DATA = re.compile(r"[。？！?!；;：:，“”]|[吗呢吧么]$|.{16}| \S+ ")
_HEADER = re.compile(
    r"(?:问|答|问题|答案|回复|回答|用户|客服|标题|内容|文本|输入|输出|指令|名称?|编号|类别?|部门"
    r"|时间|日期|原文|译文|描述|方|人|[A-Za-z_]\d*)$"
)
_TABLE = re.compile(r"\.(?:csv|tsv|tab)(?:\.\w+)?$")
_ORDER: tuple[Action, ...] = ("dropped", "repaired", "warned")


class FileReport:
    """What became of the records of one file, or of a part of it.

    Problems lie in two arrays and a table of their distinct words: 12 bytes each, because a file
    may have 700,000. It pickles as it is.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.formats: dict[str, int] = {}
        self.records = self.used = self.repaired = self.dropped = 0
        self.unused: dict[str, int] = {}  # column: used records that have it
        self.source_notes: list[str] = []  # of whoever found the file, such as splits not read
        self.conversations = 0  # records that became one, dropped later or not
        self._lines = array("q")
        self._words = array("I")  # index into the distinct (field, reason, action)
        self._table: dict[tuple[str, str, Action], int] = {}
        self._repaired_at: dict[int, int] = {}  # line: used records there with a repair

    def add(self, parsed: Parsed) -> None:
        """Count a record and what was found in it."""
        self.records += 1
        self.formats[parsed.format] = self.formats.get(parsed.format, 0) + 1
        if parsed.conversation is None:
            self.dropped += 1
        else:
            self.used += 1
            self.conversations += 1
            if parsed.unused:
                self._count_unused(dict.fromkeys(parsed.unused, 1))
        if parsed.problems:
            self._add_problems(parsed)

    def _count_unused(self, found: dict[str, int]) -> None:
        for name, count in found.items():
            if name not in self.unused and len(self.unused) >= COUNTED:
                name = MORE_COLUMNS
            self.unused[name] = self.unused.get(name, 0) + count

    def _add_problems(self, parsed: Parsed) -> None:
        repaired = None
        for problem in parsed.problems:
            self._note(problem)
            if problem.action == "repaired":
                repaired = problem.line
        if repaired is not None and parsed.conversation is not None:
            self.repaired += 1
            self._repaired_at[repaired] = self._repaired_at.get(repaired, 0) + 1

    def file_problem(self, problem: Problem, is_record: bool) -> None:
        """Note what the reader found.

        Args:
            is_record: a record was lost by it (a cut-off last line), so it counts as dropped;
                otherwise it concerns the file (its encoding, a comma too many).
        """
        self._note(problem)
        if is_record:
            self.records += 1
            self.dropped += 1
            self.formats["unknown"] = self.formats.get("unknown", 0) + 1

    def drop_used(self, line: int, field: str, reason: str) -> None:
        """Drop a record that was counted as used, because a later stage cannot use it.

        Call it on the report that counted the record, or on one that was merged from it.
        """
        self._note(Problem(line, field, reason, "dropped"))
        if not self.used:
            return
        self.used -= 1
        self.dropped += 1
        if self.repaired and self._repaired_at.get(line, 0):
            self._repaired_at[line] -= 1
            self.repaired -= 1
        self.repaired = min(self.repaired, self.used)

    def warn(self, line: int, field: str, reason: str) -> None:
        """Note something about a record that is used as it is."""
        self._note(Problem(line, field, reason, "warned"))

    def merge(self, other: FileReport) -> None:
        """Add the counts of another part of the same file."""
        self.records += other.records
        self.used += other.used
        self.repaired += other.repaired
        self.dropped += other.dropped
        self.conversations += other.conversations
        self._count_unused(other.unused)
        for name, count in other.formats.items():
            self.formats[name] = self.formats.get(name, 0) + count
        for line, count in other._repaired_at.items():
            self._repaired_at[line] = self._repaired_at.get(line, 0) + count
        index = [self._table.setdefault(words, len(self._table)) for words in other._table]
        self._lines.extend(other._lines)
        self._words.extend(array("I", (index[i] for i in other._words)))

    def _note(self, problem: Problem) -> None:
        words = (problem.field, problem.reason, problem.action)
        self._lines.append(problem.line)
        self._words.append(self._table.setdefault(words, len(self._table)))

    # What it says

    @property
    def problems(self) -> list[Problem]:
        """All problems in order of line, without those that are no news about this file."""
        return list(self._reported())

    def _reported(self) -> Iterator[Problem]:
        distinct = list(self._table)
        silent = self._silent()
        lines, words = self._lines, self._words
        for i in sorted(range(len(lines)), key=lines.__getitem__):
            field, reason, action = distinct[words[i]]
            if reason not in silent:
                yield Problem(lines[i], field, reason, action)

    def _silent(self) -> frozenset[str]:
        """Reasons that say something only beside other records of the same file."""
        silent = set()
        if not self._share():
            silent.add(NO_CHINESE)
        if "chat" not in self.formats:
            silent.add(ONE_TURN)
        return frozenset(silent)

    def _share(self) -> str:
        """How many records have no Chinese; "" where none has any, or where they are few."""
        key: tuple[str, str, Action] = ("", NO_CHINESE, "warned")
        if key not in self._table:
            return ""
        without = self._words.count(self._table[key])
        if without >= self.conversations or without <= WORTH_SAYING * self.conversations:
            return ""
        return Message(
            "{without} of {conversations} records have no Chinese text",
            without=without,
            conversations=self.conversations,
        )

    def notes(self) -> list[str]:
        """What concerns the file as a whole."""
        if not self.records:
            return [f"{self.path}: no rows"]
        notes = [] if self.used else ["no usable rows"]
        if not self.used and (hint := self._headers()):
            notes.append(hint)
        if self.unused:
            ranked = sorted(self.unused.items(), key=lambda item: -item[1])
            named = ", ".join(f"{name} ({count:,})" for name, count in ranked)
            notes.append(Message("{reason}: {names}", reason=NOT_USED, names=named))
        notes += self.source_notes
        if share := self._share():
            notes.append(share)
        return notes

    def _headers(self) -> str:
        """What to do where no record has a name that is known here."""
        names = [f for f, reason, _ in self._table if reason == UNKNOWN_FORMAT and f]
        if not names or set(self.formats) != {"unknown"}:
            return ""
        own = [name.strip() for name in names[0].split(",")]
        one, two = own[0], own[1] if len(own) > 1 else "..."
        known = f"{OWN_NAMES}: {names[0]}"
        advice = f"say what they are: {self.path}@columns.instruction={one},columns.output={two}"
        like_data = any(map(_DATA.search, own))
        if _TABLE.search(self.path.lower()):
            header = "put a header line above it, such as instruction,output"
            if like_data:
                return f"{known}; the first row looks like data: {header}"
            if not all(map(_HEADER.search, own)):
                return f"{known}; if the first row is data already, {header}; else {advice}"
        elif self.records == 1 and (like_data or len(own) > 2):
            return (
                f"{known}; if it is a map of questions to answers, write each as a record: "
                '{"instruction": QUESTION, "output": ANSWER}'
            )
        elif like_data:
            return f'{known}; write records such as {{"instruction": ..., "output": ...}}'
        return f"{known}; {advice}"

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        report = {
            "path": self.path,
            "formats": dict(self.formats),
            "records": self.records,
            "used": self.used,
            "repaired": self.repaired,
            "dropped": self.dropped,
            "conversations": self.conversations,
            "unused": dict(self.unused),
            "problems": [p._asdict() for p in self._reported()],
            "notes": self.notes(),
            **({"said": self.source_notes} if self.source_notes else {}),
        }
        return with_messages(report)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> FileReport:
        """The report that `to_json` wrote; records can still be dropped and warned of."""
        data = restored(data)
        report = cls(data["path"])
        report.formats = dict(data["formats"])
        report.records, report.used = data["records"], data["used"]
        report.repaired, report.dropped = data["repaired"], data["dropped"]
        # Reports of older versions do not have it.
        report.conversations = data.get("conversations", report.used)
        report.unused = dict(data.get("unused", {}))
        report.source_notes = list(data.get("said", []))
        dropped: set[int] = set()
        repaired: set[int] = set()
        for item in data["problems"]:
            problem = Problem(item["line"], item["field"], item["reason"], item["action"])
            report._note(problem)
            # Repairs of a record name a field; those without one concern the file.
            if problem.action == "repaired" and problem.field:
                repaired.add(problem.line)
            elif problem.action == "dropped":
                dropped.add(problem.line)
        # Many records may share a line (an array without line breaks): then it is only known that
        # some of them were repaired.
        for line in repaired - dropped:
            report._repaired_at[line] = 1
        if len(repaired) == 1 and report.repaired:
            report._repaired_at[repaired.pop()] = report.repaired
        return report


class DataReport:
    """The reports of all files of a run."""

    def __init__(self, files: Iterable[FileReport] = ()) -> None:
        self.files = list(files)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data: `data.json`, and `vicuna data check --json`."""
        return {"files": [f.to_json() for f in self.files]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> DataReport:
        """The report that `to_json` wrote."""
        return cls(FileReport.from_json(f) for f in data["files"])

    def notes(self) -> list[str]:
        """What concerns files as a whole, each with its file's name."""
        return [_with_path(f.path, note) for f in self.files for note in f.notes()]

    def rich_table(self) -> RenderableType:
        """A row of numbers for each file, then a row for each reason, then the notes."""
        from rich.console import Group
        from rich.text import Text

        parts: list[RenderableType] = [self._numbers()]
        reasons = self._reasons()
        if reasons.row_count:
            parts.append(reasons)
        parts += [Text(note, style="yellow") for note in self.notes()]
        return Group(*parts)

    def _numbers(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table()
        table.add_column("file", overflow="fold")
        table.add_column("formats")
        for name in ("records", "used", "repaired", "dropped"):
            table.add_column(name, justify="right")
        for f in self.files:
            formats = ", ".join(f"{count:,} {name}" for name, count in f.formats.items())
            numbers = (f.records, f.used, f.repaired, f.dropped)
            table.add_row(Text(f.path), formats, *(f"{n:,}" for n in numbers))
        return table

    def reasons(self) -> list[tuple[Action, str, int, list[str]]]:
        """(action, reason, how often, first places), most frequent first within an action."""
        counts: dict[tuple[Action, str], int] = {}
        places: dict[tuple[Action, str], list[str]] = {}
        for f in self.files:
            name = re.split(r"[/\\]", f.path)[-1]
            for problem in f._reported():
                key = (problem.action, problem.summary)
                counts[key] = counts.get(key, 0) + 1
                if counts[key] <= PLACES:
                    place = f"{name}:{problem.line} {problem.field}".rstrip()
                    places.setdefault(key, []).append(place)
        ranked = sorted(counts, key=lambda k: (_ORDER.index(k[0]), -counts[k]))
        return [(*key, counts[key], places[key]) for key in ranked]

    def _reasons(self) -> Any:
        """One row an action and reason."""
        from rich.table import Table
        from rich.text import Text

        table = Table("action", "reason")
        table.add_column("count", justify="right")
        table.add_column("first places")
        for action, reason, count, places in self.reasons():
            table.add_row(action, Text(reason), f"{count:,}", Text("\n".join(places)))
        return table


def _with_path(path: str, note: str) -> str:
    return note if note.startswith(f"{path}: ") else f"{path}: {note}"
