"""One record while it is read: its values, and which of its keys were used."""

from __future__ import annotations

from typing import Any

from vicuna.data.records import field_names
from vicuna.data.records.field_names import empty
from vicuna.data.records.reasons import Note


class Record:
    """A record while it is read: its values, which of them were used, and what was noted.

    values: under the names of `field_names.py`. used: names that decided something or were taken
    for text.
    left: keys of turns and of parts of their content that were not used.
    """

    __slots__ = ("left", "note", "spelt", "used", "values")

    def __init__(self, values: dict[str, Any], note: Note, spelt: dict[str, str]) -> None:
        self.values, self.note, self.spelt = values, note, spelt
        self.used: set[str] = set()
        self.left: dict[str, None] | None = None

    def take(self, key: str | None) -> Any:
        """A value that is used from now on; None where the record has no such key."""
        if key is None or key not in self.values:
            return None
        self.used.add(key)
        return self.values[key]

    def leave(self, key: str) -> None:
        """Note a key of a turn, or of a part of its content, that is not used."""
        self.left = self.left or {}
        self.left[key] = None

    def unused(self) -> tuple[str, ...]:
        """The keys that have a value and decided nothing."""
        if self.used.issuperset(self.values) and not self.left:
            return ()
        rest = [
            self.spelt.get(key, key)
            for key, value in self.values.items()
            if key not in self.used and key not in field_names.HARMLESS and key and not empty(value)
        ]
        return (*rest, *(self.left or ()))


_YES = frozenset(("true", "yes", "y", "1", "on", "good", "chosen", "correct", "right", "positive"))
_YES |= {"accepted", "thumbs_up", "thumbsup", "up", "like", "liked", "upvote", "safe", "是", "好"}
_YES |= {"desirable", "preferred", "accept", "pass", "passed", "valid", "正确", "正", "训练", "win"}
_NO = frozenset(("false", "no", "n", "0", "-1", "off", "bad", "rejected", "incorrect", "wrong"))
_NO |= {"negative", "thumbs_down", "thumbsdown", "down", "dislike", "disliked", "downvote"}
_NO |= {"unsafe", "undesirable", "reject", "fail", "failed", "invalid", "否", "坏", "错误", "差"}
_NO |= {"lose", "负", "不训练"}


def says(value: Any) -> bool | None:
    """Yes or no, however it is written; None where it is neither."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        word = value.strip().lower().replace(" ", "_")
        if word in _YES:
            return True
        if word in _NO:
            return False
    number = number_of(value)
    return None if number is None else True if number == 1 else False if number <= 0 else None


def number_of(value: Any) -> float | None:
    """The value of a number, also where a table or JSON holds it as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if number == number else None
