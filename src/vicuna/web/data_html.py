"""What the tab Data shows, as HTML (`templates/data.html`)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from vicuna.data.conversation import Action, Problem
from vicuna.data.dataset import Lengths
from vicuna.data.loss_mask import NO_TARGET
from vicuna.data.preview import Span, spans, tokens
from vicuna.data.report import NOT_USED, OWN_NAMES, DataReport
from vicuna.web import charts
from vicuna.web.data_view import ROWS, DatasetView
from vicuna.web.error_texts import localize_reason
from vicuna.web.render import Translate, join, note, render

ACTIONS: tuple[Action, ...] = ("dropped", "repaired", "warned")
PAGE = 25  # rows of a page
BARS = 64
SHOWN = 6000  # tokens of one example: a page of a megabyte helps nobody
_SIGNS = {"\n": "↵", "\t": "⇥"}
_PIECES = re.compile(r"[\n\t]|[^\n\t]+")


_COUNTS = ("records", "used", "repaired", "dropped")
_CLASSES = {"line": "n", "count": "n", "places": "places", "file": "file"}
_CLASSES |= dict.fromkeys(_COUNTS, "n")


def report(found: DataReport, tr: Translate) -> Markup:
    """Counts, formats, and what happened for which reason how often."""
    total = {k: sum(getattr(f, k) for f in found.files) for k in _COUNTS}
    numbers = [
        _number(k if total[k] else "none", f"{total[k]:,}", tr(f"data.{k}")) for k in _COUNTS
    ]
    formats: dict[str, int] = {}
    for file in found.files:
        for name, count in file.formats.items():
            formats[name] = formats.get(name, 0) + count
    files = [_files(found, tr)] if len(found.files) > 1 else []
    return render(
        "data.report", numbers=join(numbers), formats=list(formats.items()),
        title=tr("data.formats"), notes=join([note("warn", line) for line in _notes(found, tr)]),
        tables=join([*files, _reasons(found, tr)]),
    )  # fmt: skip


def _number(kind: str, value: str, text: str) -> Markup:
    return render("common.number", kind=kind, value=value, text=text)


def _notes(found: DataReport, tr: Translate) -> list[str]:
    lines = []
    for file in found.files:
        for line in file.notes():
            text = tr("data.no_rows") if line.endswith(": no rows") else localize_reason(line, tr)
            text = tr("data.no_usable_rows") if line == "no usable rows" else text
            for head, key in ((NOT_USED, "data.not_used"), (OWN_NAMES, "data.own_names")):
                if line.startswith(f"{head}: "):
                    text = tr(key, names=line.removeprefix(f"{head}: "))
            lines.append(f"{Path(file.path).name}: {text}")
    return lines


def _files(found: DataReport, tr: Translate) -> Markup:
    rows = [(Path(f.path).name, [getattr(f, k) for k in _COUNTS]) for f in found.files]
    return _table(("file", *_COUNTS), render("data.file_rows", rows=rows), tr)


def _reasons(found: DataReport, tr: Translate) -> Markup:
    counts = found.reasons()
    if not counts:
        usable = any(f.used for f in found.files)
        return note("good", tr("data.no_problems")) if usable else Markup()
    rows = [
        (_chip(action, tr), localize_reason(reason, tr), count, ", ".join(places))
        for action, reason, count, places in counts
    ]
    names = ("action", "reason", "count", "places")
    return _table(names, render("data.reason_rows", rows=rows), tr)


def _table(names: Sequence[str], rows: Markup, tr: Translate) -> Markup:
    cells = [(_CLASSES.get(name, ""), tr(f"data.{name}")) for name in names]
    return render("common.table", head=render("data.head", cells=cells), rows=rows)


def _chip(action: str, tr: Translate) -> Markup:
    return render("common.chip", kind=action, text=tr(f"data.action_{action}"))


def problems(rows: Sequence[tuple[str, Problem]], page: int, tr: Translate) -> Markup:
    """A page of the rows with problems, from 0."""
    if not rows:
        return note("empty", tr("data.no_rows_here"))
    shown = [
        (file, p.line, localize_reason(p.field, tr), localize_reason(p.reason, tr),
         _chip(p.action, tr))
        for file, p in rows[page * PAGE : (page + 1) * PAGE]
    ]  # fmt: skip
    names = ("file", "line", "field", "reason", "action")
    table = _table(names, render("data.problem_rows", rows=shown), tr)
    more = note("warn", tr("data.more_rows", count=ROWS)) if len(rows) == ROWS else Markup()
    return table + more


def pages(rows: Sequence[Any]) -> int:
    return max(1, -(-len(rows) // PAGE))


def example(view: DatasetView, i: int, borders: bool, tr: Translate) -> Markup:
    """An example as the model sees it: what is in the loss in colour, special tokens framed.

    Args:
        borders: show where one token ends and the next begins.
    """
    shown = view.example(i)
    length, cutoff, tokenizer = len(shown.ids), view.query.cutoff, view.renderer.tokenizer
    in_loss = int((shown.labels != NO_TARGET).sum())
    left, cut = SHOWN, ""
    parts = []
    for span in spans(shown, view.renderer):
        parts.append(_span(span, view, borders, tr))
        left -= len(span.ids)
        if left <= 0:
            cut = tr("data.cut_short", count=SHOWN)
            break
    about = tr("data.example_about", length=length, learned=in_loss)
    about += f" · {tr('data.beyond', cutoff=cutoff)}" if length > cutoff else ""
    return render(
        "data.example", about=about, borders=borders, inner=join(parts), cut=cut,
        template=view.renderer.template.name, end=tokenizer.token(view.renderer.end_id), tr=tr,
    )  # fmt: skip


def _span(span: Span, view: DatasetView, borders: bool, tr: Translate) -> Markup:
    kinds = ["learned"] if span.in_loss else []
    if span.control:
        kinds += ["control"] + (["silent"] if span.silent else [])
        title = tr("data.silent_end") if span.silent else f"{span.ids[0]}"
        return render("data.special_token", kinds=" ".join(kinds), title=title, text=span.text)
    if not borders:
        return render("data.span", kinds=" ".join(kinds), inner=_visible(span.text))
    pieces = [
        render("data.piece", ids=", ".join(map(str, ids)), inner=_visible(text))
        for text, ids in tokens(span, view.renderer.tokenizer)
    ]
    return render("data.span", kinds=" ".join(kinds), inner=join(pieces))


def _visible(text: str) -> Markup:
    """Text with its line breaks and tabs shown: the model sees them, so people should."""
    pieces = [(part, _SIGNS.get(part[:1], "")) for part in _PIECES.findall(text)]
    return render("data.visible", pieces=pieces)


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


def lengths(found: Lengths, cutoff: int, tr: Translate) -> Markup:
    """The histogram with the cutoff in it."""
    limit = _axis(found)
    counts = found.histogram(limit, BARS)
    return charts.histogram(counts, limit, cutoff, tr("data.histogram"), tr("data.tokens_axis"))


def lost(found: Lengths, cutoff: int, tr: Translate) -> Markup:
    """What a cutoff loses, in numbers."""
    at = found.lost(cutoff)
    n = len(found)
    total = int(found.tokens.sum()) or 1
    cells = (
        ("kept", f"{1 - at.longer:.1%}", tr("data.kept", count=round(n * (1 - at.longer)))),
        ("longer", f"{at.longer:.1%}", tr("data.longer", count=round(n * at.longer))),
        ("dropped", f"{at.tokens_dropped / total:.1%}", tr("data.tokens_dropped")),
        ("cut", f"{at.tokens_cut / total:.1%}", tr("data.tokens_cut")),
        ("lost", f"{at.answer_lost:.1%}", tr("data.answer_lost")),
    )
    numbers = [
        _number(kind if value != "0.0%" else "none", value, text) for kind, value, text in cells
    ]
    named = [(f"p{q}", found.quantile(q)) for q in (50, 90, 99)]
    named.append((tr("data.longest"), found.longest))
    marks = " · ".join(f"{name} {value:,}" for name, value in named)
    return render("data.lost", numbers=join(numbers), marks=marks)
