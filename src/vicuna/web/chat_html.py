"""A conversation as HTML: what was said, the answer that grows, its beams, the room that is left.

The HTML is in `templates/chat.html`. Texts of models pass through `markdown.html`; all others are
escaped by the template. Buttons carry what they do in `data-act` and which turn they mean in
`data-i` (`html_events.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from markupsafe import Markup

from vicuna.data.conversation import Turn
from vicuna.errors import UserError
from vicuna.serve.worker import Snapshot
from vicuna.web import markdown, probabilities
from vicuna.web.error_texts import localized_parts
from vicuna.web.render import Translate, join, render
from vicuna.web.sessions import AnswerMeta, Session

Draw = Callable[[str], Markup]
TAIL = 160  # characters of the agreed text before a beam's own


def history(session: Session, tr: Translate, can_rate: bool = True) -> Markup:
    """All turns of a conversation; for an empty one, a line on how to begin."""
    turns, notes = session.chat.turns, session.notes
    if not turns:
        return render("chat.hello", tr=tr)
    parts = []
    for i, note in enumerate(notes):
        edited = session.editing is not None and i >= session.editing
        question, answer = turns[2 * i], turns[2 * i + 1]
        parts.append(_question(question.text, i, edited, tr))
        parts.append(_answer(answer, note, i, i == len(notes) - 1, edited, can_rate, tr))
    if len(turns) > 2 * len(notes):
        parts.append(_question(turns[-1].text, len(notes), False, tr, editable=False))
    return join(parts)


def _question(text: str, i: int, faded: bool, tr: Translate, editable: bool = True) -> Markup:
    return render("chat.question", text=text, i=i, faded=faded, editable=editable, tr=tr)


def _answer(
    turn: Turn, note: AnswerMeta, i: int, last: bool, edited: bool, can_rate: bool, tr: Translate
) -> Markup:
    text, first = turn.text, note.thought_tokens
    answered = bool(text.strip())
    body = markdown.html(text) if answered else _no_answer(tr("chat.no_answer"))
    thoughts = thought(turn.thought, answered, tr)
    if note.tokens:
        body = probabilities.html(note.tokens[first:], tr) if note.tokens[first:] else body
        if first:
            inner = probabilities.html(note.tokens[:first], tr)
            thoughts = _folded(inner, answered, tr("chat.thought"))
    return render(
        "chat.answer", i=i, body=body, thought=thoughts, raw=text, faded=edited, last=last,
        can_rate=can_rate, rating=note.rating, stats=stats(note.stats, tr), tr=tr,
    )  # fmt: skip


def _no_answer(text: str) -> Markup:
    return render("chat.no_answer", text=text)


def thought(text: str, answered: bool, tr: Translate, growing: bool = False) -> Markup:
    """A thought apart from its answer: folded away once the answer has begun."""
    if not text.strip():
        return Markup()
    title = tr("chat.thinking" if growing and not answered else "chat.thought")
    return _folded(render("chat.thought_text", text=text), answered, title)


def _folded(inner: Markup, folded: bool, title: str) -> Markup:
    return render("chat.thought", inner=inner, folded=folded, title=title)


def stats(numbers: dict[str, Any], tr: Translate) -> Markup:
    """Numbers under an answer, and why it stopped if the model did not end it."""
    if not numbers:
        return Markup()
    text = tr(
        "chat.stats", tokens=numbers["tokens"], speed=f"{numbers['speed']:.1f}",
        first=f"{numbers['first']:.2f}",
    )  # fmt: skip
    why = numbers.get("why", "stop")
    ended = "" if why in _OWN_END else tr(f"chat.ended_{why}")
    return render("chat.stats", text=text, who=numbers.get("who", ""), ended=ended)


_OWN_END = ("stop", "stop_string")


def growing(snapshot: Snapshot, view: str, tr: Translate, draw: Draw = markdown.html) -> Markup:
    """The answer as it stands, and its beams as `columns` or `rows`, or not (`hidden`).

    Args:
        draw: markdown to HTML.
    """
    several = len(snapshot.beams) > 1
    shown = live_beams(snapshot, view, tr) if several and view != "hidden" else Markup()
    own = "" if several or not snapshot.beams else snapshot.beams[0].text
    parts = snapshot.parts(own)
    thoughts = thought(parts.thought, bool(parts.answer), tr, growing=True)
    body = None if thoughts and not parts.answer else draw(parts.answer)
    tokens = tr("chat.tokens", tokens=snapshot.tokens)
    return render("chat.growing", thought=thoughts, body=body, beams=shown, tokens=tokens)


def live_beams(snapshot: Snapshot, view: str, tr: Translate) -> Markup:
    """All beams, best first: the agreed text solid, what is still open dim."""
    prefix = snapshot.text[-TAIL:]
    if len(snapshot.text) > TAIL:
        prefix = "…" + prefix
    ranked = sorted(snapshot.beams, key=lambda b: (not b.finished, -b.score))
    return render("chat.beams", prefix=prefix, branches=ranked, view=view, tr=tr)


def waiting(ahead: int, tr: Translate) -> Markup:
    """The place in the queue; for the first, that the prompt is being read."""
    text = tr("chat.ahead", ahead=ahead) if ahead else tr("chat.reading")
    return render("chat.waiting", text=text)


def problem(what: str, fix: str = "") -> Markup:
    """What went wrong, and what to do."""
    return render("chat.problem", what=what, fix=fix)


def error_note(error: UserError, tr: Translate) -> Markup:
    """An error of the user's, and what to do."""
    return problem(*localized_parts(error, tr))


def editing(question: int, tr: Translate) -> Markup:
    """That a question (counted from 0) is being edited, and a button to leave it as it was."""
    return render("chat.editing", number=question + 1, tr=tr)


def gauge(used: int, limit: int, dropped: int, tr: Translate) -> Markup:
    """How much of the context the conversation takes, and what was left out for it."""
    share = min(1.0, used / limit) if limit else 0.0
    level = "full" if share > 0.9 else "high" if share > 0.7 else ""
    text = tr("chat.gauge", used=f"{used:,}", limit=f"{limit:,}")
    left_out = tr("chat.dropped", turns=dropped // 2) if dropped else ""
    return render("chat.gauge", level=level, share=f"{share:.1%}", text=text, dropped=left_out)
