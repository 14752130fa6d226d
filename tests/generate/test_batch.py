"""A file of questions becomes a file of answers, whatever it holds and wherever it was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from generate_kit import saying

from vicuna.data.conversation import Raw, Turn
from vicuna.data.templates.renderer import Renderer
from vicuna.errors import UserError
from vicuna.generate.batch import Tally, answer_file
from vicuna.generate.prompt_file import question, questions
from vicuna.generate.settings import Settings


def quiet(_: str) -> None:
    pass


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, *records: Any) -> Path:
    text = (r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records)
    path.write_text("".join(line + "\n" for line in text), encoding="utf-8")
    return path


Q, A, S = Turn("user", "问"), Turn("assistant", "答"), Turn("system", "礼貌")
ROUND = {"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}

RECORDS = [
    ({"instruction": "问"}, [Q]),
    ({"instruction": "问", "input": "料", "output": ""}, [Turn("user", "问", "料")]),
    ({"instruction": "问", "output": "旧答"}, [Q]),
    ({"messages": [ROUND[0]]}, [Q]),
    ({"messages": [*ROUND, ROUND[0]]}, [Q, A, Q]),
    ({"messages": [*ROUND, *ROUND]}, [Q, A, Q]),
    ({"messages": [{"role": "system", "content": "礼貌"}, ROUND[0]]}, [S, Q]),
    ([ROUND[0]], [Q]),
    ({"conversations": [{"from": "human", "value": "问"}]}, [Q]),
    ({"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "x"}]}, [Q]),
    ({"input": ["问"], "output": []}, [Q]),
    ({"input": ["问", "问"], "output": ["答"]}, [Q, A, Q]),
    ({"input": ["问", "问"], "output": ["答", "旧答"]}, [Q, A, Q]),
    ({"prompt": "问"}, [Q]),
    ({"question": "问", "answer": ""}, [Q]),
    ({"history": [["问", "答"]], "input": "问"}, [Q, A, Q]),
    ({"text": "问"}, [Q]),
    ("问", [Q]),
    (42, [Turn("user", "42")]),
]


@pytest.mark.parametrize(("record", "turns"), RECORDS, ids=lambda v: str(v)[:60])
def test_what_a_record_asks(record: Any, turns: list[Turn]) -> None:
    asked = question(Raw(1, json.dumps(record)))
    assert (asked.turns, asked.reason) == (turns, "")
    if isinstance(record, dict):
        assert asked.given == record
        assert question(Raw(1, record)).turns == turns


@pytest.mark.parametrize(
    "record",
    [
        '{"instruction": "问"',
        {"instruction": ""},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": []},
        {"input": ["问", "问", "问"], "output": ["答"]},
        {"messages": [ROUND[0], {"role": "assistant", "content": ""}, ROUND[0]]},
        {"foo": 1},
    ],
    ids=str,
)
def test_records_that_ask_nothing_have_a_reason(record: Any) -> None:
    asked = question(Raw(1, record if isinstance(record, str) else json.dumps(record)))
    assert not asked.turns
    assert asked.reason


def test_plain_lines(tmp_path: Path) -> None:
    for name in ("q.txt", "q"):
        file = tmp_path / name
        file.write_text("一是什么？\n二是什么？\n\n三是什么？\n", encoding="utf-8")
        asked = list(questions(file, []))
        assert [q.turns[0].text for q in asked] == ["一是什么？", "二是什么？", "三是什么？"]
        assert [q.line for q in asked] == [1, 2, 4]


def test_answers_beside_what_was_given(renderer: Renderer, tmp_path: Path) -> None:
    source = write(
        tmp_path / "q.jsonl",
        {"id": 7, "instruction": "问", "output": "旧答"},
        {"instruction": ""},
        "你好",
    )
    output = tmp_path / "a.jsonl"
    said: list[str] = []
    engine = saying(renderer, "一", "abcdef")
    tally = answer_file(
        engine, renderer, Settings(max_new_tokens=3), source, output, "礼貌", said.append
    )
    assert tally == Tally(answered=2, before=0, failed=1)
    first, second, third = lines(output)
    assert first == {
        "id": 7,
        "instruction": "问",
        "reference": "旧答",
        "output": "一",
        "finish_reason": "stop",
    }
    assert second["finish_reason"] == "error"
    assert second["error"]
    assert third == {"instruction": "你好", "output": "abc", "finish_reason": "length"}
    assert engine.prompts[0] == renderer.prompt([S, Q])
    assert any(f"{source}:2: " in line for line in said)


def test_what_cannot_be_read_is_said(renderer: Renderer, tmp_path: Path) -> None:
    source = tmp_path / "q.jsonl"
    source.write_bytes(b'{"instruction": "a"}\n{"instruction": "cut off he')
    said: list[str] = []
    answer_file(
        saying(renderer, "b"), renderer, Settings(), source, tmp_path / "a", say=said.append
    )
    assert any(":2: " in line and "dropped" in line for line in said)


@pytest.mark.parametrize("stopped_after", [0, 1, 2, 4])
@pytest.mark.parametrize("partial", ["", '{"instruction": "q'])
def test_goes_on_where_it_stopped(
    renderer: Renderer, tmp_path: Path, stopped_after: int, partial: str
) -> None:
    source = write(tmp_path / "q.jsonl", *({"instruction": f"q{i}"} for i in range(4)))
    whole, output = tmp_path / "whole.jsonl", tmp_path / "a.jsonl"
    answers = ["a", "b", "c", "d"]
    answer_file(saying(renderer, *answers), renderer, Settings(), source, whole, say=quiet)
    kept = whole.read_text().splitlines(keepends=True)[:stopped_after]
    output.write_text("".join(kept) + partial)
    said: list[str] = []
    engine = saying(renderer, *answers[stopped_after:])
    tally = answer_file(engine, renderer, Settings(), source, output, say=said.append)
    assert output.read_text() == whole.read_text()
    assert tally == Tally(4 - stopped_after, stopped_after, 0)
    assert len(engine.prompts) == 4 - stopped_after
    assert any(f"already has {stopped_after} answers" in s for s in said) == bool(stopped_after)


def test_each_answer_is_on_disk_before_the_next_begins(renderer: Renderer, tmp_path: Path) -> None:
    source = write(tmp_path / "q.jsonl", "one", "two")
    output = tmp_path / "a.jsonl"

    def hook(_: int) -> None:
        if len(engine.prompts) == 2:
            raise KeyboardInterrupt

    engine = saying(renderer, "a", "b", hook=hook)
    with pytest.raises(KeyboardInterrupt):
        answer_file(engine, renderer, Settings(), source, output, say=quiet)
    assert [line["output"] for line in lines(output)] == ["a"]


@pytest.mark.parametrize(
    "other",
    [
        '{"instruction": "other", "output": "a", "finish_reason": "stop"}\n',
        '{"instruction": "q"}\n',
        '{"instruction": "q", "output": "a", "finish_reason": "stop"}\n' * 2,
        "notes of mine",
        "notes\nof mine\n",
        "[1]\n",
    ],
)
def test_another_file_is_never_touched(renderer: Renderer, tmp_path: Path, other: str) -> None:
    source = write(tmp_path / "q.jsonl", {"instruction": "q"})
    output = tmp_path / "a.jsonl"
    output.write_text(other)
    with pytest.raises(UserError, match="left as it is"):
        answer_file(saying(renderer), renderer, Settings(), source, output, say=quiet)
    assert output.read_text() == other


def test_the_input_is_no_output(renderer: Renderer, tmp_path: Path) -> None:
    source = write(tmp_path / "q.jsonl", {"instruction": "q"})
    with pytest.raises(UserError):
        answer_file(saying(renderer), renderer, Settings(), source, source, say=quiet)


def test_no_such_folder(renderer: Renderer, tmp_path: Path) -> None:
    source = write(tmp_path / "q.jsonl", {"instruction": "q"})
    with pytest.raises(UserError, match="cannot write"):
        answer_file(
            saying(renderer), renderer, Settings(), source, tmp_path / "no" / "a", say=quiet
        )


def test_records_that_do_not_fit(renderer: Renderer, tmp_path: Path) -> None:
    long = [{"role": r, "content": "好" * 30} for r in ("user", "assistant")]
    source = write(
        tmp_path / "q.jsonl",
        {"instruction": "好" * 100},
        {"messages": [*long, {"role": "user", "content": "q"}]},
    )
    output = tmp_path / "a.jsonl"
    engine = saying(renderer, "b", context_length=60)
    tally = answer_file(engine, renderer, Settings(), source, output, say=quiet)
    assert tally == Tally(answered=1, before=0, failed=1)
    first, second = lines(output)
    assert "context only 60" in first["error"]
    assert (second["output"], second["dropped_turns"]) == ("b", 2)
