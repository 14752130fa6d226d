"""HTML of the page from `templates/*.html`: everything that is put into a template is escaped.

A template file holds macros. Its line breaks and indentation are not part of the HTML: where the
page shows spaces as they are (`white-space: pre-wrap`), nothing is added. HTML that is safe as it
is, because a template made it or `markdown.py` did, is `Markup`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jinja2.ext import Extension
from markupsafe import Markup, escape

from vicuna.web.error_texts import localize_error

# A text of the page in one language, by its key: `i18n.translate` with the request.
Translate = Callable[..., str]
_TEMPLATES = Path(__file__).parent / "templates"
_BETWEEN_TAGS = re.compile(r"(?<=[>}])\n\s*|\n\s*(?=[<{])")
_IN_A_TAG = re.compile(r"\n\s*")


class _OneLine(Extension):
    """Takes the line breaks out of a template."""

    def preprocess(self, source: str, *_: object, **_more: object) -> str:
        return _IN_A_TAG.sub(" ", _BETWEEN_TAGS.sub("", source.strip()))


@lru_cache
def _module(file: str) -> Any:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        extensions=[_OneLine],
    )
    return environment.get_template(f"{file}.html").module


def render(macro: str, /, **fields: Any) -> Markup:
    """HTML of a macro, `FILE.MACRO`, with its arguments by name."""
    file, _, name = macro.partition(".")
    html: Markup = getattr(_module(file), name)(**fields)
    return html


def join(parts: Sequence[Markup]) -> Markup:
    """Pieces of HTML, one after another."""
    return Markup("").join(parts)


def note(kind: str, text: str, fix: str = "") -> Markup:
    """A line that says how things are. kind: `busy`, `error`, `empty`, `good`, `warn`."""
    lines = [line for line in (text, *fix.splitlines()) if line]
    return render("common.note", kind=kind, lines=lines)


def toast(error: Exception, tr: Translate) -> Markup:
    """What went wrong, for a notice of gradio's, which takes HTML."""
    return escape(localize_error(error, tr)).replace("\n", Markup("<br>"))
