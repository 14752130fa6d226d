"""Code in answers, coloured: spans with classes around escaped text, and nothing else.

`static/style.css` has the colours, light and dark.
"""

from __future__ import annotations

from functools import lru_cache
from html import escape

LONGEST = 100_000  # characters; longer code stays plain
SMALL = 2_000  # characters of growing code that are coloured anew each time
STEP = 1.25


@lru_cache(maxsize=256)
def coloured(code: str, language: str) -> str:
    """Code as HTML. Plain where the language is not known."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter

    lexer = _lexer(language)
    if lexer is None or len(code) > LONGEST:
        return escape(code)
    return str(highlight(code, lexer, HtmlFormatter(nowrap=True, classprefix="h-")))


def growing(code: str, language: str) -> str:
    """Code that grows, each time somewhat longer: what is coloured anew grows in steps of a
    quarter, so that a long block costs no more than a few times its length."""
    if len(code) <= SMALL:
        return coloured(code, language)
    limit = float(SMALL)
    while limit * STEP <= len(code):
        limit *= STEP
    head = code.rfind("\n", 0, int(limit)) + 1
    return coloured(code[:head], language) + escape(code[head:])


@lru_cache
def _lexer(language: str) -> object | None:
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    if not language:
        return None
    try:
        return get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return None
