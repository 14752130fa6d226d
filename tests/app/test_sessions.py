"""Conversations of the page: asked, edited, taken back, rated, saved and loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vicuna.app.sessions import Session, Sessions, rate
from vicuna.data.formats import parse
from vicuna.data.types import Raw
from vicuna.errors import UserError


@pytest.fixture
def session() -> Session:
    made = Session("0" * 32)
    for question, answer in (("一", "甲"), ("二", "乙"), ("三", "丙")):
        made.begin(question)
        made.end(answer, {"tokens": 1})
    return made


def texts(session: Session) -> list[str]:
    return [turn.text for turn in session.chat.turns]


def test_an_edited_question_replaces_what_follows(session: Session) -> None:
    session.editing = 1
    session.begin("二二")
    session.end("新", {})
    assert texts(session) == ["一", "甲", "二二", "新"]
    assert len(session.notes) == 2
    assert session.editing is None


def test_taking_back_gives_the_question_and_cuts_there(session: Session) -> None:
    assert session.cut(1) == "二"
    assert texts(session) == ["一", "甲"]
    with pytest.raises(UserError, match="no such question"):
        session.cut(1)
    with pytest.raises(UserError, match="no such question"):
        session.question(-1)


def test_an_answer_of_nothing_takes_its_question_along(session: Session) -> None:
    session.begin("四")
    session.end("  ", {})
    assert texts(session)[-1] == "丙"
    assert len(session.notes) == 3


def test_ratings_are_data(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "data" / "up.jsonl"
    session.chat.system = "你是助手"
    rate(session, 1, "up", path)
    rate(session, 1, "up", path)  # taken back on the page
    assert session.notes[1].rating == ""
    (line,) = path.read_text(encoding="utf-8").splitlines()
    found = parse(Raw(1, line)).conversation
    assert found is not None
    assert [t.text for t in found.turns] == ["你是助手", "一", "甲", "二", "乙"]
    with pytest.raises(UserError, match="no such answer"):
        rate(session, 9, "down", path)


def test_a_saved_conversation_is_loaded_again(session: Session, tmp_path: Path) -> None:
    session.chat.system = "短"
    session.chat.save(tmp_path / "talk.jsonl")
    other = Session("1" * 32)
    other.load((tmp_path / "talk.jsonl").read_text(encoding="utf-8"))
    assert (other.chat.system, texts(other)) == ("短", texts(session))
    assert len(other.notes) == 3
    other.load(json.dumps({"instruction": "译", "input": "cat", "output": "猫"}))
    assert texts(other) == ["译\ncat", "猫"]
    for bad in ("", "{", '{"nothing": 1}'):
        with pytest.raises(UserError, match="not a conversation"):
            other.load(bad)
    assert texts(other) == ["译\ncat", "猫"]


def test_sessions_are_apart_and_the_oldest_go() -> None:
    sessions = Sessions(most=2)
    a, b, c = (f"{i:032x}" for i in (10, 11, 12))
    sessions.get(a).begin("hello")
    assert sessions.get(b).chat.turns == []
    assert sessions.get(a).chat.turns[0].text == "hello"
    sessions.get(c)
    assert sessions.get(a).chat.turns  # b was the oldest
    assert sessions.get("") is not sessions.get("")
    for name in ("../x", "A" * 32, "0" * 31):
        with pytest.raises(UserError, match="no session"):
            sessions.get(name)
