"""JSON values one after another out of a stream of text: an array's elements, or bare objects.

An object that is no record itself and holds them is opened (`json_layouts.py`).

Values are only delimited, by decoding them once in C; the parser that follows decodes them again,
in other processes. A broken value costs itself and not the rest of the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from vicuna.data.conversation import Problem, Raw
from vicuna.data.records.encodings import MARK
from vicuna.data.records.text_stream import BLANK, CUT, Text
from vicuna.messages import Message

LIMIT = 1 << 25  # characters of one value, so that a quote never closed cannot fill the memory

# Control characters pass, and numbers stay text: one of 5,000 digits is the parser's business.
DECODER = json.JSONDecoder(strict=False, parse_int=str, parse_float=str)
_SPACE = re.compile(f"[{BLANK}]*")
_TAIL = re.compile(r"-?[A-Za-z]{0,8}|\.|[eE][+-]?|\\?u?[0-9A-Fa-f]{0,4}")
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{}]', re.DOTALL)
_FIRST_KEY = re.compile(r'((?:[\[{]\s*)+)("[^"\\]*(?:\\.[^"\\]*)*")')
_SEPARATOR = re.compile(r"[\[{\],]")


def unfinished(error: json.JSONDecodeError) -> bool:
    """Whether more text could have mended the error, as at the end of the buffer or of a cut file.

    True where the text ends in a string, a word, a number or an escape, or before a value.
    """
    if error.msg.startswith("Unterminated string"):
        return True
    tail = error.doc[error.pos : error.pos + 64]  # no tail that counts is longer
    return bool(_TAIL.fullmatch(tail.rstrip(BLANK + MARK)))


class Window:
    """A window that slides over a text; `line` is the line that `pos` stands on."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = iter(texts)
        self.buf, self.pos, self.line = "", 0, 1

    def fill(self) -> bool:
        """Forget what was passed and double what is left; False at the end of the file."""
        parts = [self.buf[self.pos :]]
        size, wanted = len(parts[0]), 2 * len(parts[0]) + 1
        while size < wanted and (block := next(self.texts, None)) is not None:
            parts.append(block)
            size += len(block)
        grown = size > len(parts[0])
        self.buf, self.pos = "".join(parts), 0
        return grown

    def more(self) -> bool:
        """`fill`, unless one value holds too much already."""
        return len(self.buf) - self.pos < LIMIT and self.fill()

    def to(self, pos: int) -> None:
        """Pass the text up to `pos`."""
        self.line += self.buf.count("\n", self.pos, pos)
        self.pos = pos

    def next(self) -> str:
        """Pass blanks; the next character, "" at the end of the file."""
        while True:
            self.to(_SPACE.match(self.buf, self.pos).end())  # type: ignore[union-attr]
            if self.pos < len(self.buf):
                return self.buf[self.pos]
            if not self.fill():
                return ""


class Shape(Protocol):
    """What `json_layouts.open_shape` made of an object that holds records.

    records: those that were found at once. listed: whether the window now stands in a list of more.
    """

    records: list[Raw]
    listed: bool

    def row(self, value: str) -> str | dict[str, Any]:
        """A record from an element of the list."""

    def close(self, window: Window, problems: list[Problem]) -> None:
        """Pass what stands behind the list."""


# Gives the records inside the object that begins at the window; None where it is one itself.
Opener = Callable[[Window, list[Problem]], "Shape | None"]


def json_values(
    texts: Iterable[str], text: Text, problems: list[Problem], open_shape: Opener
) -> Iterator[Raw]:
    """The elements of an array, or objects one after another."""
    window = Window(texts)
    inside = comma = bare = cut = False
    opened: Shape | None = None
    first = True
    line = 1  # of the last text that was not blank
    while char := window.next():
        line = window.line
        if char == ",":
            if not inside and not bare:
                reason = Message("commas between records that are not in an array")
                problems.append(Problem(line, "", reason, "repaired"))
                bare = True
            comma = True
        elif char == "[" and not inside:
            inside, comma = True, False
        elif char == "]" and inside:
            if comma:
                problems.append(Problem(line, "", Message("trailing comma before ]"), "repaired"))
            inside = comma = False
            if opened:
                window.to(window.pos + 1)
                opened.close(window, problems)
                opened = None
                continue
        elif first and char == "{" and not inside and (opened := open_shape(window, problems)):
            first = False
            yield from opened.records
            if not opened.listed:
                opened = None
                continue
            inside = True  # the window stands behind the bracket of the list
            comma = False
            continue
        else:
            comma = first = False
            value = _value(window, problems)
            if value is None:
                cut = problems[-1].reason == CUT
            elif MARK in value:
                text.drop(line)
            else:
                yield Raw(line, opened.row(value) if opened else value)
            line = window.line
            continue
        window.to(window.pos + 1)
    if inside and not cut:
        problems.append(Problem(line, "", CUT, "dropped"))


def _value(window: Window, problems: list[Problem]) -> str | None:
    """The text of the JSON value that begins here; None, after a problem, if it is broken."""
    while True:
        try:
            _, end = DECODER.raw_decode(window.buf, window.pos)
        except RecursionError:
            reason, at = "nested too deeply", window.pos
        except json.JSONDecodeError as e:
            open_end = unfinished(e)
            if open_end and window.more():
                continue
            if open_end and len(window.buf) - window.pos < LIMIT:
                problems.append(Problem(window.line, "", CUT, "dropped"))
                window.to(len(window.buf))
                return None
            reason, at = e.msg.rstrip(": "), e.pos
        else:
            # A number at the end of the buffer may go on behind it.
            if end == len(window.buf) and window.buf[end - 1] not in '}]"' and window.more():
                continue
            value = window.buf[window.pos : end]
            window.to(end)
            return value
        line = window.line + window.buf.count("\n", window.pos, at)
        problems.append(
            Problem(line, "", Message("not valid JSON: {reason}", reason=reason), "dropped")
        )
        _pass_broken(window)
        return None


def _pass_broken(window: Window) -> None:
    """Pass a broken value: to where its brackets are balanced, or where another like it begins.

    The first is exact unless a bracket or a quote is missing; then a following element that opens
    with the same key is most often found before the brackets seem balanced.
    """
    begin = 1
    if window.buf[window.pos] not in "[{":
        while not (found := _SEPARATOR.search(window.buf, window.pos + begin)):
            window.to(len(window.buf))
            if not window.fill():
                return
            begin = 0
        window.to(found.start())
        return
    while True:
        end = _balanced(window.buf, window.pos)
        another = _another(window.buf, window.pos)
        if another is not None and (end is None or another < end):
            end = another
        if end is not None or not window.more():
            window.to(len(window.buf) if end is None else end)
            return


def _balanced(text: str, pos: int) -> int | None:
    """Behind the bracket that closes the one at `pos`; strings and stray closers do not count."""
    expected = []
    for token in _TOKEN.finditer(text, pos):
        if token[0] == '"':  # opens a string that does not close
            return None
        if token[0] in "[{":
            expected.append("]" if token[0] == "[" else "}")
        elif token[0] == expected[-1]:
            expected.pop()
            if not expected:
                return token.end()
    return None


def _another(text: str, pos: int) -> int | None:
    """Where, behind the value at `pos`, one begins with the same brackets and first key."""
    own = _FIRST_KEY.match(text, pos)
    if not own:
        return None
    brackets = r"\s*".join(map(re.escape, "".join(own[1].split())))
    same = re.compile(rf"(?:,\s*|\n[ \t]*)(?={brackets}\s*{re.escape(own[2])}\s*:)")
    found = same.search(text, own.end())
    return found.end() if found else None
