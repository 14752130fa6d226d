"""Counts add up under any sequence of operations, and the report says what is worth saying."""

from __future__ import annotations

import io
import json
import pickle
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from vicuna.data.conversation import Action, Conversation, Parsed, Problem, Turn
from vicuna.data.records import reasons
from vicuna.data.report import DataReport, FileReport


def parsed(line: int, *actions: Action, name: str = "alpaca", reason: str = "r") -> Parsed:
    problems = [Problem(line, "output", reason, a) for a in actions]
    talk = Conversation([Turn("user", "问"), Turn("assistant", "答")], line)
    return Parsed(None if "dropped" in actions else talk, name, problems)


def unchinese(line: int) -> Parsed:
    found = parsed(line)
    found.problems.append(Problem(line, "", reasons.NO_CHINESE, "warned"))
    return found


def counts(report: FileReport) -> tuple[int, int, int, int]:
    return report.records, report.used, report.repaired, report.dropped


def test_counts() -> None:
    report = FileReport("a.jsonl")
    report.add(parsed(1))
    report.add(parsed(2, "repaired", "repaired", "warned"))
    report.add(parsed(3, "dropped", "dropped", name="chat"))
    report.file_problem(Problem(4, "", "file is cut off here", "dropped"), is_record=True)
    report.file_problem(Problem(1, "", "encoding is GB18030", "warned"), is_record=False)
    assert counts(report) == (4, 2, 1, 2)
    assert report.formats == {"alpaca": 2, "chat": 1, "unknown": 1}
    assert [p.line for p in report.problems] == [1, 2, 2, 2, 3, 3, 4]
    report.drop_used(2, "output", "too long: 900 tokens")
    assert counts(report) == (4, 1, 0, 3)
    report.drop_used(1, "output", "too long: 800 tokens")
    assert report.notes() == ["no usable rows"]


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "file", "drop", "warn", "merge", "json"]),
        st.integers(1, 6),
        st.lists(st.sampled_from(["dropped", "repaired", "warned"]), max_size=3),
        st.booleans(),
    ),
    max_size=25,
)


@given(STEPS)
def test_every_record_is_used_or_dropped(steps: list[Any]) -> None:
    report = FileReport("a.jsonl")
    for step, line, actions, is_record in steps:
        if step == "add":
            report.add(parsed(line, *actions))
        elif step == "file":
            report.file_problem(Problem(line, "", "x", "dropped"), is_record)
        elif step == "drop":
            report.drop_used(line, "output", "too long")
        elif step == "warn":
            report.warn(line, "", "exact duplicate: of line 1")
        elif step == "merge":
            part = FileReport("a.jsonl")
            for action in actions:
                part.add(parsed(line, action))
            report.merge(pickle.loads(pickle.dumps(part)))
        else:
            report = FileReport.from_json(json.loads(json.dumps(report.to_json())))
        assert report.records == report.used + report.dropped
        assert sum(report.formats.values()) == report.records
        assert 0 <= report.repaired <= report.used


@given(STEPS)
def test_parts_merged_say_what_the_whole_says(steps: list[Any]) -> None:
    whole, merged = FileReport("a"), FileReport("a")
    for k, (_, _, actions, _) in enumerate(steps):
        part = FileReport("a")
        for report in (whole, part):
            report.add(parsed(k + 1, *actions))
        merged.merge(part)
    assert merged.to_json() == whole.to_json()


def test_repair_of_a_dropped_record_no_longer_counts_after_json() -> None:
    report = FileReport("a.jsonl")
    report.add(parsed(1, "repaired"))
    report.add(parsed(2, "repaired"))
    report.file_problem(Problem(2, "", "trailing comma before ]", "repaired"), is_record=False)
    again = FileReport.from_json(report.to_json())
    assert again.to_json() == report.to_json()
    again.drop_used(1, "", "too long")
    assert counts(again) == (2, 1, 1, 1)


def test_share_without_chinese() -> None:
    report = FileReport("a.jsonl")
    for line in range(1, 5):
        report.add(unchinese(line))
    assert report.notes() == []  # no Chinese at all: an English file, nothing to say
    assert report.problems == []
    report.add(parsed(5))
    report.add(parsed(6))
    assert report.notes() == ["4 of 6 records have no Chinese text"]
    assert [p.line for p in report.problems] == [1, 2, 3, 4]
    again = FileReport.from_json(report.to_json())
    again.drop_used(6, "", "too long")
    assert again.notes() == report.notes()
    for line in range(7, 100):
        report.add(parsed(line))
    assert report.notes() == []
    assert report.problems == []


def test_text_instead_of_a_list_matters_only_beside_chats() -> None:
    report = FileReport("a.jsonl")
    report.add(parsed(1, "warned", name="pair", reason=reasons.ONE_TURN))
    assert report.problems == []
    report.add(parsed(2, name="chat"))
    assert [p.line for p in report.problems] == [1]


def test_empty_file() -> None:
    report = DataReport([FileReport("dir/a.jsonl")])
    assert report.notes() == ["dir/a.jsonl: no rows"]
    assert DataReport.from_json(report.to_json()).to_json() == report.to_json()


def test_table_groups_reasons_and_names_places() -> None:
    report = FileReport("dir/a.jsonl")
    for line in range(1, 6):
        report.add(parsed(line, "dropped", reason=f"broken JSON: [bold]{line}[/bold]"))
    report.add(parsed(6, name="chat"))
    console = Console(file=io.StringIO(), width=120, force_terminal=False)
    console.print(DataReport([report, FileReport("b[x].jsonl")]).rich_table())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "5 alpaca, 1 chat" in text
    assert "a.jsonl:1 output" in text
    assert "a.jsonl:4 output" not in text
    assert text.count("broken JSON") == 1
    assert "b[x].jsonl: no rows" in text


def test_many_problems_stay_small() -> None:
    report = FileReport("a.jsonl")
    for line in range(20_000):
        report.warn(line, "output", "zero-width characters removed: 1")
    assert len(pickle.dumps(report)) < 20_000 * 20
