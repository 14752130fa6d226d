"""What happens to a single string on the way into a conversation.

| the value is                            | what happens                                     |
|-----------------------------------------|--------------------------------------------------|
| null, NaN                               | counts as missing                                |
| a number                                | its text, repaired                               |
| true, false, a list, an object          | the record is dropped: guessing would invent text|
| text with a lone surrogate              | the record is dropped: no tokenizer can take it  |
| text with zero-width characters         | they are removed, repaired; emoji keep theirs    |
| text with U+FFFD                        | warned of, with the count                        |
| text with a backslash and an n as a line break | warned of                                 |
| text with CRLF, or white space around it| LF, stripped; not noted                          |

Runs once or more for every record: one search decides whether any rule applies at all.
"""

from __future__ import annotations

import re
from typing import Any

from vicuna.data.conversation import Number
from vicuna.data.records.field_names import names
from vicuna.data.records.parse_values import kind
from vicuna.data.records.reasons import (
    LITERAL_NEWLINE,
    LONE_SURROGATE,
    LOST_CHARACTERS,
    NOT_TEXT,
    NUMBER,
    ZERO_WIDTH,
    Note,
    Unusable,
)
from vicuna.messages import Message

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
        note(
            field,
            Message("{reason}: {count}", reason=ZERO_WIDTH, count=len(text) - len(visible)),
            "repaired",
        )
    if "\ufffd" in visible:
        note(
            field,
            Message("{reason}: {count}", reason=LOST_CHARACTERS, count=visible.count("�")),
            "warned",
        )
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
            raise Unusable(
                field, Message("{reason}: a number of too many digits", reason=NOT_TEXT)
            ) from None
    raise Unusable(field, Message("{reason}: {type}", reason=NOT_TEXT, type=kind(value)))


def is_placeholder_input(text: str) -> bool:
    """Whether the separate input of an instruction only says that there is none."""
    return len(text) <= _LONGEST and text.lower() in _EMPTY_INPUTS


def is_placeholder_answer(text: str) -> bool:
    """Whether an answer only holds the place of one that was never written."""
    return len(text) <= _LONGEST and text.lower() in _EMPTY_ANSWERS
