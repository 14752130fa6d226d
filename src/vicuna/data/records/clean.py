"""What happens to JSON text and to a single string on the way into a conversation.

| the value is                            | what happens                                     |
|-----------------------------------------|--------------------------------------------------|
| null, NaN                               | counts as missing                                |
| a number                                | its text, repaired                               |
| true, false, a list, an object          | the record is dropped: guessing would invent text|
| text with a lone surrogate              | the record is dropped: no tokenizer can take it  |
| text with zero-width characters         | they are removed, repaired; emoji keep theirs    |
| text with U+FFFD                        | warned of, with the count                        |
| text with a backslash and an n as a line break | warned of                                 |
| text with CRLF, or white space around it| LF, stripped; not worth a word                   |

Runs once or more for every record: one search decides whether any rule applies at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from vicuna.data.conversation import Action, Number
from vicuna.data.records.python_literals import printed

# The reasons a user reads. Stable; a detail may follow after ": ".
BROKEN_JSON = "broken JSON"
PYTHON = "Python's notation instead of JSON"
DUPLICATE_KEY = "duplicate key"
NUMBER = "number taken as text"
NOT_TEXT = "not text"
LONE_SURROGATE = "lone surrogate (half of a broken character)"
ZERO_WIDTH = "zero-width characters removed"
LOST_CHARACTERS = "characters lost in an earlier conversion (U+FFFD)"
LITERAL_NEWLINE = "literal \\n instead of a line break"
PLACEHOLDER_INPUT = "placeholder input emptied"

Note = Callable[[str, str, Action], None]


def names(words: str) -> tuple[str, ...]:
    """A table of words that reads as a line."""
    return tuple(words.split())


class Unusable(Exception):
    """The record cannot be used: which field, and why."""

    def __init__(self, field: str, reason: str) -> None:
        self.field, self.reason = field, reason
        super().__init__(field, reason)


class _DuplicateKey(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise _DuplicateKey
    return made


def _constant(name: str) -> Number | None:
    return None if name == "NaN" else Number(name)


def _decoder(hook: Callable[[list[tuple[str, Any]]], Any]) -> json.JSONDecoder:
    return json.JSONDecoder(
        object_pairs_hook=hook, parse_int=Number, parse_float=Number, parse_constant=_constant
    )


_FAST = _decoder(_unique)
# The value that begins at a place, without looking for blanks around it.
_SCAN = _FAST.scan_once  # type: ignore[attr-defined]


def parse_json(text: str, note: Note) -> Any:
    """The value of JSON text, its numbers as they were written.

    Of a key that stands twice in an object the last value is kept, and that is noted. Such a record
    is rare, so only then is the text read again, to name the key.

    Raises: Unusable where it is not JSON.
    """
    try:
        value, end = _SCAN(text, 0)
        if end == len(text):
            return value
    except (StopIteration, ValueError, RecursionError, _DuplicateKey):
        pass  # said below
    try:
        try:
            return _FAST.decode(text)
        except _DuplicateKey:
            return _decoder(lambda pairs: _keep_last(pairs, note)).decode(text)
    except json.JSONDecodeError as e:
        if _PRINTED.match(text) and (value := printed(text)) is not None:
            note("", PYTHON, "repaired")
            return value
        words = e.msg.removesuffix(": ")
        raise Unusable("", f"{BROKEN_JSON}: {words} (character {e.pos + 1})") from None
    except RecursionError:
        raise Unusable("", f"{BROKEN_JSON}: nested too deeply") from None


_PRINTED = re.compile(r"[\[{\s]+'")


def _keep_last(pairs: list[tuple[str, Any]], note: Note) -> dict[str, Any]:
    made: dict[str, Any] = {}
    twice: dict[str, None] = {}
    for key, value in pairs:
        if key in made:
            twice[key] = None
        made[key] = value
    for key in twice:
        note(shorten(key), DUPLICATE_KEY, "repaired")
    return made


def parse_list(text: str) -> Any:
    """The value of a table's cell that holds a list as JSON text; None where it is not JSON."""
    try:
        return _FAST.decode(text)
    except (ValueError, RecursionError, _DuplicateKey):
        return None


def shorten(words: str, width: int = 60) -> str:
    """Words from the data, short enough for a table."""
    return words if len(words) <= width else words[: width - 3] + "..."


# Text

_SUSPECT = re.compile("[\r\\\\\u200b-\u200d\u2060\ufeff\ufffd\ud800-\udfff]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_EMOJI = "[\u2190-\u2bff\u3030\u303d\u3297\u3299\ufe0f\U0001f000-\U0001faff\U000e0020-\U000e007f]"
# A zero-width joiner makes one emoji of several; anywhere else in Chinese text it is debris.
_INVISIBLE = re.compile(
    f"[\u200b\u2060\ufeff]|(?<!{_EMOJI})[\u200c\u200d]|[\u200c\u200d](?!{_EMOJI})"
)
# Paths, LaTeX (\\nabla), and code ("...\\n") mean what they say: a letter or a bracket before it,
# a small letter or a quote behind it.
_LITERAL_NEWLINE = re.compile(r"(?<![A-Za-z0-9_\\/:%\"'`“‘(\[{$])\\n(?![a-z\"'`”’)\]},，、|])")

_EMPTY_INPUTS = frozenset(
    names(
        "<无输入> <noinput> <no_input> <无> <空> <empty> <none> <null> <input> 无输入 没有输入 "
        "无需输入 不需要输入 noinput no_input n/a none null nan 无 [无输入] 【无输入】 （无输入） "
        "(无输入) （无） (无) [noinput] (noinput) 无输入。"
    )
) | {"no input", "<no input>", "[no input]", "(no input)", "no input."}
_EMPTY_ANSWERS = frozenset(
    names(
        "<无输出> <nooutput> <no_output> <noutput> <empty> <none> <null> <output> <输出> 无输出 "
        "没有输出 nooutput no_output todo tbd n/a null nan 待补充 待填写 [无输出] 【无输出】 "
        "（无输出） (无输出) [nooutput] (nooutput) <待补充> [待补充] （待补充） 无输出。"
    )
) | {"no output", "<no output>", "[no output]", "(no output)", "no output."}
_LONGEST = max(map(len, _EMPTY_INPUTS | _EMPTY_ANSWERS))


def clean(value: Any, field: str, note: Note) -> str | None:
    """The text of a value by the rules above; None where it is missing.

    Args:
        field: the name to report it under.
        note: called with (field, reason, action) for each change and doubt.

    Raises: Unusable where the record must be dropped.
    """
    if value is None:
        return None
    if type(value) is not str:
        number = _number(value, field)
        if number is not None:
            note(field, NUMBER, "repaired")
        return number
    if not _SUSPECT.search(value):
        return value.strip()
    return _clean_slowly(value, field, note)


def _clean_slowly(text: str, field: str, note: Note) -> str:
    if _SURROGATE.search(text):
        raise Unusable(field, LONE_SURROGATE)
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    visible = _INVISIBLE.sub("", text)
    if visible != text:
        note(field, f"{ZERO_WIDTH}: {len(text) - len(visible)}", "repaired")
    if "\ufffd" in visible:
        note(field, f"{LOST_CHARACTERS}: {visible.count('�')}", "warned")
    if "\\n" in visible and _LITERAL_NEWLINE.search(visible):
        note(field, LITERAL_NEWLINE, "warned")
    return visible.strip()


def _number(value: Any, field: str) -> str | None:
    """The text of a number; None for NaN, which tables write for an empty cell."""
    if isinstance(value, Number):
        return str(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return None if value != value else str(value)
        except ValueError:  # more digits than Python converts
            raise Unusable(field, f"{NOT_TEXT}: a number of too many digits") from None
    raise Unusable(field, f"{NOT_TEXT}: {kind(value)}")


def kind(value: Any) -> str:
    """What JSON calls a value."""
    known = {bool: "true or false", list: "a list", tuple: "a list", dict: "an object"}
    known |= {str: "a text", Number: "a number", int: "a number", float: "a number"}
    return "null" if value is None else known.get(type(value), type(value).__name__)


def is_placeholder_input(text: str) -> bool:
    """Whether the separate input of an instruction only says that there is none."""
    return len(text) <= _LONGEST and text.lower() in _EMPTY_INPUTS


def is_placeholder_answer(text: str) -> bool:
    """Whether an answer only holds the place of one that was never written."""
    return len(text) <= _LONGEST and text.lower() in _EMPTY_ANSWERS
