"""A conversation's outline: all of it that a chat template may see.

Of every text a template gets a placeholder, between the white space at its ends and the words that
the template looks for (`</think>`), because these decide how it renders.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import count
from typing import NamedTuple

GAP = "\0"  # a text's place in an outline
HOLE = re.compile(r"XqZ(\d+)ZqX")
THINK = "<think>\n\0\n</think>\n\n"
MANY = 20_000  # outlines that are kept


class Message(NamedTuple):
    """One message's outline. thought: None if nothing stands beside the content."""

    role: str
    content: str
    thought: str | None = None

    @property
    def gaps(self) -> int:
        return self.content.count(GAP) + (self.thought or "").count(GAP)


Outline = tuple[Message, ...]
# An answer with and without a thought, which is a field of the message or stands in its content.
ANSWERS = {
    (False, "field"): Message("assistant", GAP),
    (True, "field"): Message("assistant", GAP, GAP),
    (True, "inline"): Message("assistant", THINK + GAP),
}


def cut(text: str, words: re.Pattern[str] | None, texts: list[str]) -> str:
    """The outline of a text; what fills its gaps goes to `texts`.

    words: that the template looks for; they are seen, and the white space beside them.
    """
    if not text:
        return ""
    found = list(words.finditer(text)) if words else []
    if not found and not (text[0].isspace() or text[-1].isspace()):
        texts.append(text)
        return GAP
    outline, at = [], 0
    for start, end in [*((f.start(), f.end()) for f in found), (len(text), len(text))]:
        between = text[at:start]
        inner = between.strip()
        if inner:
            texts.append(inner)
            left, _, right = between.partition(inner)
            outline.append(f"{left}{GAP}{right}")
        else:
            outline.append(between)
        outline.append(text[start:end])
        at = end
    return "".join(outline)


def any_of(words: Sequence[str]) -> re.Pattern[str] | None:
    longest_first = sorted(set(words), key=lambda w: (-len(w), w))
    return re.compile("|".join(map(re.escape, longest_first))) if words else None


def numbered(outline: Outline) -> list[Message]:
    """Messages with placeholders in their gaps, numbered from the first to the last; a thought's
    come before its answer's."""
    numbers = count()
    return [
        Message(
            m.role,
            thought=None if m.thought is None else _spelled(m.thought, numbers),
            content=_spelled(m.content, numbers),
        )
        for m in outline
    ]


def filled(text: str, first: int) -> str:
    """The outline of a text with placeholders in its gaps, numbered from `first` on."""
    return _spelled(text, count(first))


def _spelled(text: str, numbers: Iterator[int]) -> str:
    pieces = text.split(GAP)
    return pieces[0] + "".join(hole(next(numbers)) + piece for piece in pieces[1:])


def hole(n: int) -> str:
    """The placeholder of a text."""
    return f"XqZ{n}ZqX"


def begins_thought(content: str) -> bool:
    """Whether a content begins with a thought, in an outline or in words."""
    return content.lstrip().startswith("<think>") and "</think>" in content
