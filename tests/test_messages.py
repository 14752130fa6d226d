"""Messages keep what they were made of: through pickles, JSON, processes, and into Chinese."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from vicuna.errors import ERROR_FILE, SettingsError, UserError, read_error_file, write_error_file
from vicuna.i18n import translate as i18n
from vicuna.i18n.translate import translate
from vicuna.messages import Message, lines, restored, with_messages

BOUND = Message("{name} is {value:,}, but must be at least {bound}", name="{x}", value=0, bound=1)


@pytest.fixture(autouse=True)
def chinese(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {
        "{where}: {what}": "{where}：{what}",
        "{number} mistakes in the settings:\n{mistakes}": "{number} 处错误：\n{mistakes}",
        BOUND.template: "{name} 为 {value:,}，至少应为 {bound}",
        "no answer": "没有回答",
        "{reason}: {details}": "{reason}：{details}",
    }
    monkeypatch.setattr(i18n, "catalogue", lambda _: known)


def test_a_message_is_its_sentence() -> None:
    assert BOUND == "{x} is 0, but must be at least 1"
    assert Message('write {"a": 1}') == 'write {"a": 1}'  # without fields, nothing is filled in
    assert Message("{n:,}", n=np.int64(5000)).fields == {"n": 5000}
    assert Message("{path}", path=Path("a")).fields == {"path": "a"}


def test_messages_and_errors_come_whole_out_of_a_pickle() -> None:
    for error in (
        UserError("{a} is {{odd}}", a="{b}", where="here", fix="Mend {a}."),
        SettingsError([BOUND, "another"], fix="Mend {both}."),
    ):
        again = pickle.loads(pickle.dumps(error))
        assert (str(again), again.args) == (str(error), error.args)
        assert translate(again.message, "zh") == translate(error.message, "zh")
    assert pickle.loads(pickle.dumps(BOUND)).fields == BOUND.fields


def test_errors_say_place_and_way_out() -> None:
    error = UserError("{a} is odd", a=1, where="here", fix="Mend {a}.")
    assert str(error) == "here: 1 is odd\nMend 1."
    assert error.fix.template == "Mend {a}."
    assert str(UserError(error.what, fix=error.fix)) == "1 is odd\nMend 1."
    assert str(SettingsError([BOUND])) == str(BOUND)


def test_translation_goes_into_fields() -> None:
    whole = UserError("{reason}: {details}", reason=Message("no answer"), details=BOUND).message
    assert translate(whole, "zh") == "没有回答：{x} 为 0，至少应为 1"
    assert translate(whole, "en") == str(whole)
    several = SettingsError([BOUND, "no answer", "some words of others"])
    assert translate(several.message, "zh") == (
        "3 处错误：\n- {x} 为 0，至少应为 1\n- 没有回答\n- 「some words of others」"
    )
    assert translate("no answer", "zh") == "没有回答"
    assert translate(UserError("no answer", where="a.jsonl").message, "zh") == "a.jsonl：没有回答"


def test_fields_of_users_are_not_translated() -> None:
    named = Message("{reason}: {details}", reason="no answer", details="a.txt")
    assert translate(named, "zh") == "「no answer」：a.txt"


def test_json_gives_messages_back() -> None:
    data = {"why": BOUND, "all": [lines([BOUND, "x"], "- ")], "n": 1, "plain": "no answer"}
    read = restored(json.loads(json.dumps(with_messages(data))))
    assert read == data
    assert read["why"].fields == BOUND.fields
    assert translate(read["all"][0], "zh") == "- {x} 为 0，至少应为 1\n- x"
    assert with_messages({"plain": "x"}) == {"plain": "x"}


@pytest.mark.parametrize(
    "hostile",
    [
        {"text": "t", "template": "{a:>999999999999}", "fields": {"a": 1}},
        {"text": "t", "template": "{a.__class__}", "fields": {"a": 1}},
        {"text": "t", "template": BOUND.template, "fields": {"value": "no number"}},
        {"text": "t", "template": "{a}", "fields": [1]},
        {"text": "t", "template": 7, "fields": {}},
        7,
    ],
)
def test_a_message_of_somebody_else_is_looked_up_and_never_filled_in(hostile: object) -> None:
    (read,) = restored({"why": "t", "messages": {"t": hostile}}).values()
    assert translate(read, "zh") == "t"


def test_an_error_is_left_for_the_process_that_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = UserError(BOUND, where="here")
    write_error_file(error)  # nobody asked
    path = tmp_path / "error.json"
    assert read_error_file(path, str(error)) == str(error)
    monkeypatch.setenv(ERROR_FILE, str(path))
    write_error_file(error)
    assert translate(read_error_file(path, str(error)), "zh") == "here：{x} 为 0，至少应为 1"
    assert not isinstance(read_error_file(path, "another error"), Message)
