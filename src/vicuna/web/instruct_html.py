"""Answers side by side, as HTML."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from vicuna.generate.thoughts import Parts, split
from vicuna.serve.worker import Queued, Snapshot
from vicuna.web import chat_html, markdown
from vicuna.web.chat_html import Draw
from vicuna.web.render import Translate, join, render

Now = Queued | Snapshot | str


def grid(columns: Sequence[tuple[str, Now, Draw]], tr: Translate) -> Markup:
    """A column for each of those who answer: (name, how its answer stands; a text: its failure;
    what draws its markdown)."""
    cells = [(name, _cell(now, tr, draw)) for name, now, draw in columns]
    return render("instruct.grid", columns=cells)


def _cell(now: Now, tr: Translate, draw: Draw) -> Markup:
    if isinstance(now, str):
        return chat_html.problem(now)
    if isinstance(now, Queued):
        text = tr("chat.ahead", ahead=now.position) if now.position else tr("chat.reading")
        return render("instruct.waiting", text=text)
    if now.finished is None:
        return _growing(now, tr, draw)
    answers = now.finished.answers
    ranked = len(answers) > 1
    cards = [
        _answer(split(a.text, now.marks), i if ranked else 0, a.score, tr)
        for i, a in enumerate(answers, 1)
    ]
    numbers = render("instruct.stats", inner=chat_html.stats(_stats(now), tr))
    return join([*cards, numbers])


def _answer(parts: Parts, place: int, score: float, tr: Translate) -> Markup:
    answered = bool(parts.answer.strip())
    nothing = tr("chat.no_answer" if parts.thought else "chat.silent")
    body = markdown.html(parts.answer) if answered else render("chat.no_answer", text=nothing)
    thoughts = chat_html.thought(parts.thought, answered, tr)
    return render("instruct.answer", place=place, score=score, thought=thoughts, body=body)


def _growing(now: Snapshot, tr: Translate, draw: Draw) -> Markup:
    several = len(now.beams) > 1
    parts = now.parts("" if several or not now.beams else now.beams[0].text)
    thoughts = chat_html.thought(parts.thought, bool(parts.answer), tr, growing=True)
    beams = chat_html.live_beams(now, "rows", tr) if several else Markup()
    return render("instruct.growing", thought=thoughts, body=draw(parts.answer), beams=beams)


def _stats(now: Snapshot) -> dict[str, object]:
    found = now.finished
    assert found is not None
    return {
        "tokens": found.completion_tokens,
        "speed": found.tokens_per_second,
        "first": found.first_token_seconds,
        "why": found.finish_reason,
    }
