"""Conversations of the page: asked, edited, taken back, rated, saved and loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vicuna.data.conversation import Raw
from vicuna.data.records.formats import parse
from vicuna.errors import UserError
from vicuna.generate.thoughts import Parts
from vicuna.serve.queue import Job
from vicuna.web.sessions import Session, Sessions, rate


@pytest.fixture
def session() -> Session:
    made = Session("0" * 32)
    for question, answer in (("一", "甲"), ("二", "乙"), ("三", "丙")):
        said(made, question, answer)
    return made


def said(session: Session, question: str, answer: str) -> None:
    session.begin(question)
    session.end(session.request_id, Parts("", answer), {"tokens": 1})


def texts(session: Session) -> list[str]:
    return [turn.text for turn in session.chat.turns]


def test_an_edited_question_replaces_what_follows(session: Session) -> None:
    session.editing = 1
    said(session, "二二", "新")
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
    said(session, "四", "  ")
    assert texts(session)[-1] == "丙"
    assert len(session.notes) == 3


@pytest.mark.parametrize("meanwhile", ["clear", "load", "clear and ask"])
def test_an_answer_to_a_conversation_that_is_gone_goes_nowhere(
    session: Session, meanwhile: str
) -> None:
    session.begin("四")
    asked, job = session.request_id, Job("a", lambda _: None)
    session.job = job
    if meanwhile == "load":
        session.load(json.dumps({"instruction": "译 cat", "output": "猫"}))
    else:
        session.clear()
    if meanwhile == "clear and ask":
        session.begin("五")
    session.end(asked, Parts("", "丁"), {})
    assert job.cancelled.is_set()
    assert not session.busy
    left = {"clear": [], "load": ["译 cat", "猫"], "clear and ask": ["五"]}[meanwhile]
    assert texts(session) == left
    assert len(session.notes) == len(left) // 2


def test_a_question_without_an_answer_is_not_saved(session: Session) -> None:
    session.begin("四")
    assert session.open_question
    assert [t.text for t in session.answered().turns] == ["一", "甲", "二", "乙", "三", "丙"]


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
    for name in ("", "../x", "A" * 32, "0" * 31):
        with pytest.raises(UserError, match="no session"):
            sessions.get(name)
