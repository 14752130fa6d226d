"""Answers side by side, as HTML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from vicuna.generate.thoughts import Parts, split
from vicuna.serve.worker import Queued, Snapshot
from vicuna.web import chat_html, markdown
from vicuna.web.chat_html import Draw

Say = Callable[..., str]


Now = Queued | Snapshot | str


def grid(columns: Sequence[tuple[str, Now, Draw]], say: Say) -> str:
    """A column for each of those who answer: (name, how its answer stands; a text: its failure;
    what draws its markdown)."""
    cells = "".join(
        f'<section class="v-column"><h3>{escape(name)}</h3>{_cell(now, say, draw)}</section>'
        for name, now, draw in columns
    )
    return f'<div class="v-columns n{min(len(columns), 3)}">{cells}</div>'


def _cell(now: Now, say: Say, draw: Draw) -> str:
    if isinstance(now, str):
        return chat_html.problem(now)
    if isinstance(now, Queued):
        words = say("chat.ahead", ahead=now.position) if now.position else say("chat.reading")
        return f'<p class="v-wait">{words}</p>'
    if now.finished is None:
        return _growing(now, say, draw)
    answers = now.finished.answers
    score = len(answers) > 1
    cards = "".join(
        _answer(split(a.text, now.marks), i if score else 0, a.score, say)
        for i, a in enumerate(answers, 1)
    )
    return cards + f'<p class="v-acts">{chat_html.stats(_stats(now), say)}</p>'


def _answer(said: Parts, place: int, score: float, say: Say) -> str:
    head = f"<header><i>{place}</i><b>{score + 0.0:.3f}</b></header>" if place else ""
    answered = bool(said.answer.strip())
    nothing = say("chat.no_answer" if said.thought else "chat.silent")
    body = markdown.html(said.answer) if answered else f"<p class='v-fine'>{nothing}</p>"
    thoughts = chat_html.thought(said.thought, answered, say)
    return f'<article class="v-answer">{head}{thoughts}<div class="v-md">{body}</div></article>'


def _growing(now: Snapshot, say: Say, draw: Draw) -> str:
    several = len(now.beams) > 1
    parts = now.parts("" if several or not now.beams else now.beams[0].text)
    thoughts = chat_html.thought(parts.thought, bool(parts.answer), say, growing=True)
    text = f'<div class="v-md v-growing">{draw(parts.answer)}</div>'
    beams = chat_html.live_beams(now, "rows", say) if several else ""
    return f'<article class="v-answer">{thoughts}{text}</article>{beams}'


def _stats(now: Snapshot) -> dict[str, object]:
    found = now.finished
    assert found is not None
    return {
        "tokens": found.completion_tokens,
        "speed": found.tokens_per_second,
        "first": found.first_token_seconds,
        "why": found.finish_reason,
    }
