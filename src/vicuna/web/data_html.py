"""What the tab Data shows, as HTML. Every word that comes from a file is escaped here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vicuna.data.conversation import Action, Problem
from vicuna.data.dataset import Lengths
from vicuna.data.loss_mask import NO_TARGET
from vicuna.data.preview import Span, spans, tokens
from vicuna.data.report import NOT_USED, OWN_NAMES, DataReport
from vicuna.web import charts
from vicuna.web.data_view import ROWS, Look
from vicuna.web.error_texts import chinese, in_words, quoted

# A text of the page in the language of whoever asks: `words.say` with its request.
Say = Callable[..., str]

ACTIONS: tuple[Action, ...] = ("dropped", "repaired", "warned")
PAGE = 25  # rows of a page
BARS = 64
SHOWN = 6000  # tokens of one example: a page of a megabyte helps nobody
_CONTROLS = {"\n": "↵\n", "\t": "⇥\t"}


def note(kind: str, text: str, fix: str = "") -> str:
    """A line that says how things are. kind: `busy`, `error`, `empty`, `good`, `warn`."""
    parts = [f"<p>{escape(part)}</p>" for part in (text, *fix.splitlines()) if part]
    return f'<div class="v-note {kind}" role="status">{"".join(parts)}</div>'


def toast(error: Exception, say: Say) -> str:
    """What went wrong, for a notice of gradio's: it takes HTML, and must get none of others."""
    return escape(in_words(str(error), say)).replace("\n", "<br>")


def report(found: DataReport, say: Say) -> str:
    """Counts, formats, and what happened for which reason how often."""
    total = {k: sum(getattr(f, k) for f in found.files) for k in _COUNTS}
    numbers = "".join(
        f'<div class="v-number {k if total[k] else "none"}"><b>{total[k]:,}</b>'
        f"<span>{escape(say(f'data.{k}'))}</span></div>"
        for k in _COUNTS
    )
    formats: dict[str, int] = {}
    for file in found.files:
        for name, count in file.formats.items():
            formats[name] = formats.get(name, 0) + count
    kinds = "".join(f"<li><b>{n:,}</b> {escape(k)}</li>" for k, n in formats.items())
    notes = "".join(note("warn", line) for line in _notes(found, say))
    files = _files(found, say) if len(found.files) > 1 else ""
    return (
        f'<section class="v-report"><div class="v-numbers">{numbers}</div>'
        f'<ul class="v-formats" aria-label="{escape(say("data.formats"))}">{kinds}</ul>'
        f"{notes}{files}{_reasons(found, say)}</section>"
    )


_COUNTS = ("records", "used", "repaired", "dropped")


def _notes(found: DataReport, say: Say) -> list[str]:
    lines = []
    for file in found.files:
        for words in file.notes():
            text = say("data.no_rows") if words.endswith(": no rows") else reason_words(words, say)
            text = say("data.no_usable_rows") if words == "no usable rows" else text
            for head, key in ((NOT_USED, "data.not_used"), (OWN_NAMES, "data.own_names")):
                if words.startswith(f"{head}: "):
                    text = say(key, names=words.removeprefix(f"{head}: "))
            lines.append(f"{Path(file.path).name}: {text}")
    return lines


def _files(found: DataReport, say: Say) -> str:
    head = _head(("file", *_COUNTS), say)
    rows = "".join(
        f"<tr><td>{escape(Path(f.path).name)}</td>"
        + "".join(f'<td class="n">{getattr(f, k):,}</td>' for k in _COUNTS)
        + "</tr>"
        for f in found.files
    )
    return table(head, rows)


def _reasons(found: DataReport, say: Say) -> str:
    counts = found.reasons()
    if not counts:
        return note("good", say("data.no_problems")) if any(f.used for f in found.files) else ""
    rows = "".join(
        f"<tr><td>{_chip(action, say)}</td><td>{escape(reason_words(reason, say))}</td>"
        f'<td class="n">{count:,}</td><td class="places">{escape(", ".join(places))}</td></tr>'
        for action, reason, count, places in counts
    )
    return table(_head(("action", "reason", "count", "places"), say), rows)


_CLASSES = {"line": "n", "count": "n", "places": "places", "file": "file"}
_CLASSES |= dict.fromkeys(_COUNTS, "n")


def _head(names: Sequence[str], say: Say) -> str:
    return "".join(
        f'<th class="{_CLASSES.get(name, "")}">{escape(say(f"data.{name}"))}</th>' for name in names
    )


def _chip(action: str, say: Say) -> str:
    return f'<span class="v-chip {action}">{escape(say(f"data.action_{action}"))}</span>'


def table(head: str, rows: str) -> str:
    """A table of cells that are HTML already; it scrolls by itself where it is too wide."""
    return (
        f'<div class="v-scroll"><table class="v-table"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


# Tables of texts: reasons by their English, and the details behind their colons.
_REASONS = ("reason.", "detail.")


def reason_words(reason: str, say: Say) -> str:
    """A reason and its details in the language of the page; words of others between quotes."""
    if say("page.code") == "en":
        return reason
    if (whole := chinese(reason, _REASONS)) is not None:
        return whole
    head, colon, details = reason.partition(": ")
    if colon and (known := chinese(head, _REASONS)) is not None:
        return f"{known}：{chinese(details, _REASONS) or quoted(details)}"
    return quoted(reason)


def problems(rows: Sequence[tuple[str, Problem]], page: int, say: Say) -> str:
    """A page of the rows with problems, from 0."""
    if not rows:
        return note("empty", say("data.no_rows_here"))
    shown = rows[page * PAGE : (page + 1) * PAGE]
    body = "".join(
        f'<tr><td class="file">{escape(name)}</td><td class="n">{p.line:,}</td>'
        f"<td><code>{escape(reason_words(p.field, say))}</code></td>"
        f"<td>{escape(reason_words(p.reason, say))}</td>"
        f"<td>{_chip(p.action, say)}</td></tr>"
        for name, p in shown
    )
    head = _head(("file", "line", "field", "reason", "action"), say)
    more = note("warn", say("data.more_rows", count=ROWS)) if len(rows) == ROWS else ""
    return table(head, body) + more


def pages(rows: Sequence[Any]) -> int:
    return max(1, -(-len(rows) // PAGE))


def example(look: Look, i: int, borders: bool, say: Say) -> str:
    """An example as the model sees it: what is learned in colour, control tokens framed.

    Args:
        borders: show where one token ends and the next begins.
    """
    found = look.example(i)
    length = len(found.ids)
    learned = int((found.labels != NO_TARGET).sum())
    left = SHOWN
    parts = []
    for span in spans(found, look.renderer):
        parts.append(_span(span, look, borders, say))
        left -= len(span.ids)
        if left <= 0:
            parts.append(f"<em>{escape(say('data.cut_short', count=SHOWN))}</em>")
            break
    cutoff = look.wish.cutoff
    long = f" · {escape(say('data.beyond', cutoff=cutoff))}" if length > cutoff else ""
    about = escape(say("data.example_about", length=length, learned=learned))
    return (
        f'<div class="v-example"><p class="about">{about}{long}</p>'
        f'<div class="v-tokens{" borders" if borders else ""}" dir="auto">{"".join(parts)}</div>'
        f"{_legend(look, say)}</div>"
    )


def _span(span: Span, look: Look, borders: bool, say: Say) -> str:
    classes = ["learned"] if span.learned else []
    if span.control:
        classes += ["control"] + (["silent"] if span.silent else [])
        title = say("data.silent_end") if span.silent else f"{span.ids[0]}"
        return f'<b class="{" ".join(classes)}" title="{escape(title)}">{escape(span.text)}</b>'
    if not borders:
        return f'<span class="{" ".join(classes)}">{_visible(span.text)}</span>'
    pieces = "".join(
        f'<i title="{", ".join(map(str, ids))}">{_visible(text)}</i>'
        for text, ids in tokens(span, look.renderer.tokenizer)
    )
    return f'<span class="{" ".join(classes)}">{pieces}</span>'


def _visible(text: str) -> str:
    """Escaped, and line breaks and tabs shown: the model sees them, so people should."""
    shown = escape(text)
    for character, sign in _CONTROLS.items():
        shown = shown.replace(character, f"<u>{sign[0]}</u>{character}")
    return shown


def _legend(look: Look, say: Say) -> str:
    end = escape(look.renderer.tokenizer.token(look.renderer.end_id))
    return (
        f'<p class="v-key"><span class="learned">{escape(say("data.key_learned"))}</span>'
        f"<span>{escape(say('data.key_other'))}</span>"
        f'<b class="control">{escape(say("data.key_control"))}</b>'
        f"<span>{escape(say('data.key_template'))} {escape(look.renderer.template.name)}, "
        f"{escape(say('data.key_end'))} <code>{end}</code></span></p>"
    )


def limit_of(lengths: Lengths) -> int:
    """How far the slider goes: to a round number that no example is longer than."""
    return _round_up(lengths.longest)


def _axis(lengths: Lengths) -> int:
    """How far the histogram goes: beyond all but the very longest examples, which would make its
    bars narrow."""
    return _round_up(lengths.quantile(99.8))


def _round_up(tokens: int) -> int:
    tokens = max(tokens, 128)
    step = 128 if tokens <= 2048 else 512 if tokens <= 8192 else 2048
    return -(-tokens // step) * step


def lengths(found: Lengths, cutoff: int, say: Say) -> str:
    """The histogram with the cutoff in it."""
    limit = _axis(found)
    counts = found.histogram(limit, BARS)
    return charts.histogram(counts, limit, cutoff, say("data.histogram"), say("data.tokens_axis"))


def lost(found: Lengths, cutoff: int, say: Say) -> str:
    """What a cutoff loses, in numbers."""
    at = found.lost(cutoff)
    n = len(found)
    total = int(found.tokens.sum()) or 1
    cells = (
        ("kept", f"{1 - at.longer:.1%}", say("data.kept", count=round(n * (1 - at.longer)))),
        ("longer", f"{at.longer:.1%}", say("data.longer", count=round(n * at.longer))),
        ("dropped", f"{at.tokens_dropped / total:.1%}", say("data.tokens_dropped")),
        ("cut", f"{at.tokens_cut / total:.1%}", say("data.tokens_cut")),
        ("lost", f"{at.answer_lost:.1%}", say("data.answer_lost")),
    )
    numbers = "".join(
        f'<div class="v-number {name if value != "0.0%" else "none"}"><b>{value}</b>'
        f"<span>{escape(words)}</span></div>"
        for name, value, words in cells
    )
    named = [(f"p{q}", found.quantile(q)) for q in (50, 90, 99)]
    named.append((say("data.longest"), found.longest))
    marks = " · ".join(f"{name} {value:,}" for name, value in named)
    return f'<div class="v-numbers small">{numbers}</div><p class="v-fine">{escape(marks)}</p>'
