"""A conversation as HTML: what was said, the answer that grows, its beams, the room that is left.

Every text of a person or a model passes through `markdown.html` or `escape`. Buttons carry what
they do in `data-act` and which turn they mean in `data-i` (`html_events.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from vicuna.data.conversation import Turn
from vicuna.errors import UserError
from vicuna.serve.worker import BeamState, Snapshot
from vicuna.web import markdown, probabilities
from vicuna.web.error_texts import told
from vicuna.web.sessions import Note, Session

Say = Callable[..., str]
Draw = Callable[[str], str]
TAIL = 160  # characters of the agreed text before a beam's own
_ICONS = {
    "copy": '<path d="M9 9h11v11H9z"/><path d="M5 15H4V4h11v1"/>',
    "edit": '<path d="M4 20h4L19 9l-4-4L4 16z"/>',
    "again": '<path d="M20 11A8 8 0 1 0 18 17"/><path d="M20 5v6h-6"/>',
    "undo": '<path d="M9 14 4 9l5-5"/><path d="M4 9h10a6 6 0 0 1 0 12h-3"/>',
    "up": '<path d="M7 11v9H4v-9zM7 11l4-8a2 2 0 0 1 2 2v4h6l-1 11H7"/>',
    "down": '<path d="M7 13V4H4v9zM7 13l4 8a2 2 0 0 0 2-2v-4h6L18 4H7"/>',
}


def icon(name: str) -> str:
    """A small drawing of lines in the text's colour."""
    return f'<svg viewBox="0 0 24 24" aria-hidden="true">{_ICONS[name]}</svg>'


def _button(act: str, i: int, label: str, on: bool = False) -> str:
    pressed = " on" if on else ""
    return (
        f'<button type="button" class="v-act{pressed}" data-act="{act}" data-i="{i}" '
        f'title="{escape(label)}" aria-label="{escape(label)}">{icon(act)}</button>'
    )


def history(session: Session, say: Say, can_rate: bool = True) -> str:
    """All that was said; where nothing was, a word on how to begin."""
    turns, notes = session.chat.turns, session.notes
    if not turns:
        return f'<div class="v-hello"><h2>{say("chat.hello")}</h2><p>{say("chat.begin")}</p></div>'
    parts = []
    for i, note in enumerate(notes):
        edited = session.editing is not None and i >= session.editing
        question, answer = turns[2 * i], turns[2 * i + 1]
        parts.append(_question(question.text, i, say, edited))
        parts.append(_answer(answer, note, i, say, i == len(notes) - 1, edited, can_rate))
    if len(turns) > 2 * len(notes):
        parts.append(_question(turns[-1].text, len(notes), say, False, asked=True))
    return "".join(parts)


def _question(text: str, i: int, say: Say, edited: bool, asked: bool = False) -> str:
    acts = "" if asked else _button("edit", i, say("chat.edit"))
    faded = " faded" if edited else ""
    return (
        f'<div class="v-turn user{faded}"><div class="v-said">{escape(text)}</div>'
        f'<div class="v-acts">{acts}</div></div>'
    )


def _answer(
    turn: Turn, note: Note, i: int, say: Say, last: bool, edited: bool, can_rate: bool
) -> str:
    acts = [_button("copy", i, say("chat.copy"))]
    if last:
        acts.append(_button("again", i, say("chat.again")))
        acts.append(_button("undo", i, say("chat.undo")))
    if can_rate:
        acts += [_button(r, i, say(f"chat.{r}"), note.rating == r) for r in ("up", "down")]
    faded = " faded" if edited else ""
    text, first = turn.text, note.thought_tokens
    body = markdown.html(text) if text.strip() else f"<p class='v-fine'>{say('chat.no_answer')}</p>"
    thoughts = thought(turn.thought, bool(text.strip()), say)
    if note.tokens:
        body = probabilities.html(note.tokens[first:], say) if note.tokens[first:] else body
        inner = probabilities.html(note.tokens[:first], say) if first else ""
        thoughts = _folded(inner, bool(text.strip()), say("chat.thought")) if inner else thoughts
    return (
        f'<div class="v-turn answer{faded}">{thoughts}<div class="v-said v-md">{body}</div>'
        f'<div class="v-acts">{"".join(acts)}{stats(note.stats, say)}</div>'
        '<textarea class="v-raw" readonly tabindex="-1" aria-hidden="true">'
        f"{escape(text)}</textarea></div>"
    )


def thought(text: str, answered: bool, say: Say, growing: bool = False) -> str:
    """A thought apart from its answer: folded away once the answer has begun."""
    if not text.strip():
        return ""
    title = say("chat.thinking" if growing and not answered else "chat.thought")
    return _folded(f'<div class="v-thinks">{escape(text)}</div>', answered, title)


def _folded(inner: str, folded: bool, title: str) -> str:
    return (
        f'<details class="v-thought"{"" if folded else " open"}><summary>{escape(title)}</summary>'
        f"{inner}</details>"
    )


def stats(found: dict[str, Any], say: Say) -> str:
    """Numbers under an answer, and how it ended where it did not end by itself."""
    if not found:
        return ""
    words = say(
        "chat.stats", tokens=found["tokens"], speed=f"{found['speed']:.1f}",
        first=f"{found['first']:.2f}",
    )  # fmt: skip
    who = f" · {escape(found['who'])}" if found.get("who") else ""
    why = found.get("why", "stop")
    ended = f' <b class="v-ended">{say(f"chat.ended_{why}")}</b>' if why not in _OWN_END else ""
    return f'<span class="v-stats">{words}{who}{ended}</span>'


_OWN_END = ("stop", "stop_string")


def growing(snapshot: Snapshot, view: str, say: Say, draw: Draw = markdown.html) -> str:
    """The answer as it stands, and its beams as `columns` or `rows`, or not (`hidden`).

    Args:
        draw: markdown to HTML.
    """
    several = len(snapshot.beams) > 1
    beams = live_beams(snapshot, view, say) if several and view != "hidden" else ""
    own = "" if several or not snapshot.beams else snapshot.beams[0].text
    parts = snapshot.parts(own)
    thoughts = thought(parts.thought, bool(parts.answer), say, growing=True)
    text = f'<div class="v-said v-md v-growing">{draw(parts.answer)}</div>'
    if thoughts and not parts.answer:
        text = ""
    return (
        f'<div class="v-turn answer live">{thoughts}{text}{beams}'
        f'<div class="v-acts"><span class="v-stats">{say("chat.tokens", tokens=snapshot.tokens)}'
        "</span></div></div>"
    )


def live_beams(snapshot: Snapshot, view: str, say: Say) -> str:
    """All beams, best first: the agreed text solid, what is still open dim."""
    agreed = snapshot.text[-TAIL:]
    if len(snapshot.text) > TAIL:
        agreed = "…" + agreed
    cards = "".join(_beam(agreed, b, i, say) for i, b in enumerate(_ranked(snapshot.beams), 1))
    return f'<div class="v-beams {view}" role="list">{cards}</div>'


def _ranked(branches: Sequence[BeamState]) -> Sequence[BeamState]:
    return sorted(branches, key=lambda b: (not b.finished, -b.score))


def _beam(agreed: str, beam: BeamState, place: int, say: Say) -> str:
    state = " done" if beam.finished else ""
    badge = f"<i>{say('chat.beam_done')}</i>" if beam.finished else f"<i>{place}</i>"
    return (
        f'<div class="v-beam{state}" role="listitem"><header>{badge}'
        f"<b>{beam.score + 0.0:.3f}</b></header>"
        f"<p><span>{escape(agreed)}</span><em>{escape(beam.text)}</em></p></div>"
    )


def waiting(ahead: int, say: Say) -> str:
    """A place in the queue, or that it is read."""
    words = say("chat.ahead", ahead=ahead) if ahead else say("chat.reading")
    return f'<div class="v-turn answer live"><div class="v-wait">{words}</div></div>'


def problem(what: str, fix: str = "") -> str:
    """What went wrong, in words."""
    more = f"<p>{escape(fix)}</p>" if fix else ""
    return f'<div class="v-note error" role="alert"><p>{escape(what)}</p>{more}</div>'


def mistake(error: UserError, say: Say) -> str:
    """A mistake that can be mended, and how."""
    return problem(*told(error, say))


def editing(question: int, say: Say) -> str:
    """That a question (counted from 0) is being edited, and a button to leave it as it was."""
    label = f"{escape(say('chat.leave'))} <kbd>Esc</kbd>"
    return (
        f'<div class="v-note busy-not"><p>{escape(say("chat.editing", number=question + 1))} '
        f'<button type="button" class="v-text-act" data-act="leave">{label}</button></p></div>'
    )


def gauge(used: int, limit: int, dropped: int, say: Say) -> str:
    """How much of the context the conversation takes, and what was left out for it."""
    share = min(1.0, used / limit) if limit else 0.0
    level = "full" if share > 0.9 else "high" if share > 0.7 else ""
    words = say("chat.gauge", used=f"{used:,}", limit=f"{limit:,}")
    left_out = f" <b>{say('chat.dropped', turns=dropped // 2)}</b>" if dropped else ""
    return (
        f'<div class="v-gauge {level}"><div class="v-track"><div style="width:{share:.1%}"></div>'
        f"</div><span>{words}{left_out}</span></div>"
    )
