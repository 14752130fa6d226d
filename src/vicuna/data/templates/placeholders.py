"""A conversation's outline: all of it that a chat template may see.

Of every text a template gets a placeholder, between the white space at its ends and the words that
the template looks for (`</think>`), because these decide how it renders.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import count
from typing import Any, NamedTuple

from vicuna.data.templates.sandbox_worker import environment

GAP = "\0"  # a text's place in an outline
PLACEHOLDER = re.compile(r"XqZ(\d+)ZqX")
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
            thought=None if m.thought is None else _fill_gaps(m.thought, numbers),
            content=_fill_gaps(m.content, numbers),
        )
        for m in outline
    ]


def with_placeholders(text: str, first: int) -> str:
    """The outline of a text with placeholders in its gaps, numbered from `first` on."""
    return _fill_gaps(text, count(first))


def _fill_gaps(text: str, numbers: Iterator[int]) -> str:
    pieces = text.split(GAP)
    return pieces[0] + "".join(placeholder(next(numbers)) + piece for piece in pieces[1:])


def placeholder(n: int) -> str:
    """The placeholder of a text."""
    return f"XqZ{n}ZqX"


def begins_thought(content: str) -> bool:
    """Whether a content begins with a thought, in an outline or in words."""
    return content.lstrip().startswith("<think>") and "</think>" in content


@lru_cache(maxsize=64)
def watched_in(source: str) -> frozenset[str]:
    """The texts that a template looks for. It is parsed here, as it was before in its sandbox."""
    try:
        return frozenset(_watched(environment().parse(source)))
    except RecursionError:  # deeper than this process can look; the check of a base will tell
        return frozenset()


# String methods and filters that look for a text.
_LOOKING = {
    "split", "rsplit", "partition", "rpartition", "startswith", "endswith", "replace", "find",
    "rfind", "index", "count", "removeprefix", "removesuffix",
}  # fmt: skip


def _watched(tree: Any) -> set[str]:
    """Texts that a template looks for in other texts."""
    from jinja2 import nodes

    found: set[str] = set()

    def add(node: Any) -> None:
        constants = [node] if isinstance(node, nodes.Const) else list(node.find_all(nodes.Const))
        found.update(c.value for c in constants if isinstance(c.value, str) and c.value)

    for compare in tree.find_all(nodes.Compare):
        # `'content' in message` asks for a key, which is a plain word.
        if any(op.op in ("in", "notin") for op in compare.ops):
            before = set(found)
            add(compare.expr)
            found -= {w for w in found - before if re.fullmatch(r"\w+", w)}
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr in _LOOKING and call.args:
            add(call.args[0])
    for use in tree.find_all(nodes.Filter):
        if use.name in ("replace", "split") and use.args:
            add(use.args[0])
    return found
