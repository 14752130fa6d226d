"""The thought of a reasoning model: folded away, apart from its answer, and never text of it."""

from __future__ import annotations

import json
import re
from functools import partial

import pytest

from vicuna.data.templates.base import ThoughtMarks
from vicuna.generate.events import Answer, Finished
from vicuna.generate.thoughts import Parts
from vicuna.serve.queue import Job
from vicuna.serve.worker import BeamState, Snapshot
from vicuna.web import chat_html, instruct_html, markdown, tab_chat
from vicuna.web.i18n import translate
from vicuna.web.probabilities import ShownToken, thought_tokens
from vicuna.web.sessions import Session

ZH = partial(translate, "zh")
WHOLE = "<think>\n2 + 2 是 4\n</think>\n\n四"
# (marks, what the model says): the prompt may have opened the thought already.
WAYS = [(ThoughtMarks(), WHOLE), (ThoughtMarks(opened=True), WHOLE.removeprefix("<think>\n"))]


def finished(text: str) -> Finished:
    return Finished((Answer(text, (1, 2), 0.0, "stop"),), "stop", 1, 0.1, 0.2)


def grows(text: str, marks: ThoughtMarks, split_at: int) -> Snapshot:
    """What became final, and an open branch behind it."""
    return Snapshot(text[:split_at], (BeamState(text[split_at:], 0.0, 3),), marks=marks)


@pytest.mark.parametrize(("marks", "text"), WAYS)
@pytest.mark.parametrize("place", ["chat", "instruct"])
def test_a_thought_is_open_while_it_grows_and_folded_once_the_answer_begins(
    marks: ThoughtMarks, text: str, place: str
) -> None:
    def draw(snapshot: Snapshot) -> str:
        if place == "chat":
            return chat_html.growing(snapshot, "columns", ZH)
        return instruct_html.grid([("law", snapshot, markdown.html)], ZH)

    for end in range(1, len(text) + 1):
        html = draw(grows(text[:end], marks, end // 2))
        assert not re.search("think&gt;|&lt;", html), text[:end]  # no part of a mark
        answered = "四" in html
        assert ("<details" in html) == ("2" in html)
        assert ('<details class="v-thought" open>' in html) == ("2" in html and not answered)
    assert answered
    html = draw(Snapshot(text, finished=finished(text), marks=marks)) if place == "instruct" else ""
    assert not html or ('<details class="v-thought"><summary>' in html and "think&gt;" not in html)


@pytest.mark.parametrize(("marks", "text"), WAYS)
def test_a_thought_stays_beside_the_answer_in_history_files_and_prompts(
    marks: ThoughtMarks, text: str
) -> None:
    session, job = Session("0" * 32), Job("a", lambda _: None)
    job.latest = Snapshot(text, finished=finished(text), marks=marks)
    session.begin("2 + 2?")
    session.end(session.request_id, *tab_chat._kept(job, "law"))
    turn = session.chat.turns[-1]
    assert (turn.text, turn.thought) == ("四", "2 + 2 是 4")
    html = chat_html.history(session, ZH)
    assert '<details class="v-thought"><summary>思考过程</summary>' in html
    assert re.search(r'class="v-raw"[^>]*>四</textarea>', html)  # what is copied
    other = Session("1" * 32)
    other.load(json.dumps({"messages": session.answered().messages()}))
    assert other.chat.turns == session.chat.turns


def test_an_answer_that_was_stopped_in_its_thought_is_kept_and_says_so() -> None:
    session, job = Session("0" * 32), Job("a", lambda _: None)
    job.latest = grows("<think>\nlet me see", ThoughtMarks(), 15)
    session.begin("2 + 2?")
    kept = tab_chat._kept(job, "law")
    assert not tab_chat._silent(job)
    session.end(session.request_id, *kept)
    assert len(session.notes) == 1
    assert not session.open_question
    html = chat_html.history(session, ZH)
    assert '<details class="v-thought" open>' in html
    assert "回答开始之前就停止了" in html


def test_tokens_of_a_thought_are_apart_where_their_probabilities_are_shown() -> None:
    tokens = [
        ShownToken(text, 0.5, ((text, 0.5),)) for text in ("<think>", "hm", "</think>", "\n", "四")
    ]
    tokens.append(ShownToken("", 0.9, (("<|im_end|>", 0.9),)))
    assert thought_tokens(tokens, Parts("hm", "四")) == 4
    assert thought_tokens(tokens, Parts("hm", "")) == 6
    assert thought_tokens(tokens, Parts("", "hm")) == 0
    session = Session("0" * 32)
    session.begin("?")
    session.end(session.request_id, Parts("hm", "四"), {}, tokens, 4)
    folded, _, rest = chat_html.history(session, ZH).partition("</details>")
    assert "hm" in folded
    assert "四" not in folded
    assert "四" in rest
    assert "v-tok" in rest
    assert "hm" not in rest
