"""Keys that change what a record or a turn means: honoured here, or the record is dropped by name.

| key                              | what it does                                              |
|----------------------------------|-----------------------------------------------------------|
| images, audio, video             | the record is dropped                                     |
| tools, tool calls                | the record is dropped                                     |
| a weight or mask that says no    | a turn's answer is not in the loss; the record is dropped |
| a label that says bad            | the same                                                  |
| reasoning                        | the thought of the answer                                 |
| a system prompt                  | the system turn                                           |

A value that is not understood is no mark; its key is then among the columns that were not used.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from vicuna.data.records import field_names
from vicuna.data.records.clean import NOT_TEXT, Note, Number, Unusable, kind, shorten
from vicuna.data.records.field_names import empty
from vicuna.data.records.reasons import (
    BAD_ANSWER,
    LABEL_ODD,
    MASK_ODD,
    MEDIA,
    NOT_LEARNED,
    TOOL,
    WEIGHT,
)
from vicuna.data.records.turn_order import Said

_YES = frozenset(("true", "yes", "y", "1", "on", "good", "chosen", "correct", "right", "positive"))
_YES |= {"accepted", "thumbs_up", "thumbsup", "up", "like", "liked", "upvote", "safe", "是", "好"}
_YES |= {"desirable", "preferred", "accept", "pass", "passed", "valid", "正确", "正", "训练", "win"}
_NO = frozenset(("false", "no", "n", "0", "-1", "off", "bad", "rejected", "incorrect", "wrong"))
_NO |= {"negative", "thumbs_down", "thumbsdown", "down", "dislike", "disliked", "downvote"}
_NO |= {"unsafe", "undesirable", "reject", "fail", "failed", "invalid", "否", "坏", "错误", "差"}
_NO |= {"lose", "负", "不训练"}


class Reading:
    """A record while it is read: its values, which of them were used, and what was noted.

    values: under the names of `keys`. used: names that decided something or were taken for text.
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


def record(reading: Reading, said: list[Said]) -> list[Said]:
    """Honour the keys of a record; gives what was said with its thought, system and mask.

    Raises: Unusable where the record must be dropped.
    """
    values, used = reading.values, reading.used
    for key in [k for k in values if k in field_names.MEANINGFUL and k not in used]:
        value = values[key]
        if empty(value):
            used.add(key)
        elif key in field_names.MEDIA:
            raise Unusable(key, f"{MEDIA}: {key}")
        elif key in field_names.TOOLS:
            if not isinstance(value, Number) and not isinstance(value, (bool, int, float)):
                raise Unusable(key, f"{TOOL}: {key}")
        elif key in field_names.SYSTEMS and said:  # plain text has no place for one
            used.add(key)
            said = [Said("system", joined(value, key, reading)[0], key), *said]
        elif key in field_names.THOUGHTS:
            said = _with_thought(said, value, key, reading)
        elif not said and key in field_names.GOOD and not isinstance(value, bool):
            continue  # beside plain text a label is a class
        elif (learned := _learned(key, value, reading.note)) is not None:
            used.add(key)
            if isinstance(learned, list):
                said = _masked(said, learned, key)
            elif not learned:
                raise Unusable(key, f"{_reason(key)}: {key} {_brief(value)}")
    return said


def merit(values: dict[str, Any]) -> float | None:
    """How good a record's answer is said to be, against others to its question; more is better."""
    for names, sign in ((field_names.RANKS, -1.0), (field_names.SCORES, 1.0)):
        for key in names:
            if (number := number_of(values.get(key))) is not None:
                return sign * number
    return None


def turn(item: dict[str, Any], taken: Iterable[str], where: str, reading: Reading) -> Said | None:
    """Honour the keys of a turn beside its speaker and words (`taken`).

    Returns: a `Said` that holds only `thought` and `learned`; None where there is nothing to say.

    Raises: Unusable where the record must be dropped.
    """
    thought: Any = None
    learned = True
    outer = where.split("[")[0]
    for key, value in item.items():
        if key in taken or empty(value):
            continue
        if key in field_names.MEDIA or key == "files":
            raise Unusable(f"{where}.{key}", f"{MEDIA}: {key}")
        if key in field_names.TOOLS:
            raise Unusable(where, TOOL)
        if key in field_names.THOUGHTS:
            if thought is None:
                thought = thinking(value)
            continue
        marked = _learned(key, value, lambda _, reason, action: reading.note(where, reason, action))
        if isinstance(marked, list):
            raise Unusable(f"{where}.{key}", f"{MASK_ODD}: {shorten(_brief(value), 40)}")
        if marked is not None:
            learned = learned and marked
        elif key not in field_names.HARMLESS and key not in _PLAIN_TURN:
            reading.leave(f"{outer}[].{key}")
    if thought is None and learned:
        return None
    return Said("assistant", None, where, thought=thought, learned=learned)


# Beside a turn these say how it came about, or who it was.
_PLAIN_TURN = frozenset(("name", "timestamp", "time", "created_at", "updated_at", "date", "turn"))


def _learned(key: str, value: Any, note: Note) -> bool | list[bool] | None:
    """What a weight, mask or label says: learn it, or not; None where it says neither."""
    if key in field_names.PARTIAL:
        raise Unusable(key, f"{MASK_ODD}: {key}")
    if key in field_names.LEARNED:
        if isinstance(value, (list, tuple)):
            marks = [_weight(v) for v in value]
            if None in marks:
                raise Unusable(key, f"{MASK_ODD}: {shorten(_brief(value), 40)}")
            return [bool(m) for m in marks]
        number = number_of(value)
        if number is not None and number > 0 and number != 1:
            note(key, f"{WEIGHT}: {key} {_brief(value)}", "warned")
            return True
        return says(value)
    if key in field_names.MASKED:
        if isinstance(value, (list, tuple)):
            marks = [says(v) for v in value]
            if None in marks:
                raise Unusable(key, f"{MASK_ODD}: {shorten(_brief(value), 40)}")
            return [not m for m in marks]
        if isinstance(value, str) and (role := field_names.ROLES.get(value.strip().lower())):
            return role != "assistant"
        marked = says(value)
        return None if marked is None else not marked
    if key in field_names.GOOD:
        return _judged(key, value, says(value), note)
    if key in _FLAGS and str(value).lower() in ("true", "false"):
        return (str(value).lower() == "true") == _FLAGS[key]
    if key in field_names.BAD:
        marked = says(value)
        return _judged(key, value, None if marked is None else not marked, note)
    return None


def _judged(key: str, value: Any, learned: bool | None, note: Note) -> bool | None:
    if learned is None:
        note(key, f"{LABEL_ODD}: {key} {shorten(_brief(value), 40)}", "warned")
    return learned


# The names of better and worse answers may be flags of one answer as well.
_FLAGS = {**dict.fromkeys(field_names.CHOSEN, True), **dict.fromkeys(field_names.REJECTED, False)}


def _weight(value: Any) -> bool | None:
    number = number_of(value)
    return says(value) if number is None else number > 0


def _reason(key: str) -> str:
    judged = key in field_names.GOOD or key in field_names.BAD or key in _FLAGS
    return BAD_ANSWER if judged else NOT_LEARNED


def _brief(value: Any) -> str:
    return (
        json.dumps(value, ensure_ascii=False, default=str) if not isinstance(value, str) else value
    )


def _masked(said: list[Said], learned: list[bool], key: str) -> list[Said]:
    """A mask with an entry for each turn, or for each answer."""
    answers = [i for i, s in enumerate(said) if s.role == "assistant"]
    spoken = [i for i, s in enumerate(said) if s.role != "system"]
    for places in (answers, spoken, list(range(len(said)))):
        if len(places) == len(learned):
            masks = dict(zip(places, learned))
            return [
                s._replace(learned=s.learned and masks.get(i, True)) for i, s in enumerate(said)
            ]
    raise Unusable(key, f"{MASK_ODD}: {len(learned)} entries for {len(answers)} answers")


def _with_thought(said: list[Said], value: Any, key: str, reading: Reading) -> list[Said]:
    """Reasoning beside the conversation: that of its last answer, or a list with one for each."""
    answers = [i for i, s in enumerate(said) if s.role == "assistant"]
    if not answers:
        return said
    words = value if isinstance(value, list) and len(value) == len(answers) > 1 else [value]
    made = list(said)
    for i, part in zip(answers[-len(words) :], words):
        if made[i].thought is None and not empty(part):
            made[i] = made[i]._replace(thought=thinking(part))
            reading.used.add(key)
    return made


# Content in parts


def thinking(value: Any) -> Any:
    """A thought as one text, also where it comes in parts."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return value
    parts = []
    for part in value:
        if isinstance(part, dict):
            part = next((part[k] for k in _THOUGHT_WORDS if part.get(k)), None)
            part = thinking(part)
        if isinstance(part, str):
            parts.append(part)
    return "\n".join(parts) if parts else None


_THOUGHT_WORDS = ("thinking", "reasoning", "text", "content", "summary", "value")
_THOUGHT_PARTS = frozenset(("thinking", "reasoning", "thought", "think", "thoughts", "analysis"))
_TEXT_PARTS = frozenset(("text", "input_text", "output_text", "refusal"))


def joined(content: Any, field: str, reading: Reading) -> tuple[Any, Any]:
    """Content in parts as one text, and the thought among them.

    Raises: Unusable where a part is no text.
    """
    if isinstance(content, dict) and isinstance(content.get("parts"), list):
        content = content["parts"]  # Gemini's, ChatGPT's
    elif isinstance(content, dict) and ("text" in content or "type" in content):
        content = [content]
    if not isinstance(content, list):
        return content, None
    parts: list[str] = []
    thoughts: list[Any] = []
    for part in content:
        if not isinstance(part, dict):
            if type(part) is not str:
                raise Unusable(field, f"{NOT_TEXT}: {kind(part)}")
            parts.append(part)
            continue
        name = part.get("type")
        if name in _THOUGHT_PARTS or part.get("thought") is True:
            thoughts.append(thinking(part))
            continue
        text = part.get("text")
        if isinstance(text, dict):
            text = text.get("value")
        if type(text) is not str or (name is not None and name not in _TEXT_PARTS):
            raise Unusable(field, _foreign(name, part))
        parts.append(text)
        for key, value in part.items():
            if key not in ("type", "text", "thought") and not empty(value) and key != "id":
                outer = field.split("[")[0]
                reading.leave(f"{outer}[].{field.rsplit('.', 1)[-1]}[].{key}")
    said = [t for t in thoughts if t]
    return "\n".join(parts), ("\n".join(said) if said else None)


def _foreign(name: Any, part: dict[str, Any]) -> str:
    """The reason for a part that is no text."""
    words = str(name) if name else ", ".join(map(str, part))
    lower = words.lower()
    if any(m in lower for m in ("image", "audio", "video", "file", "inline_data", "inlinedata")):
        return f"{MEDIA}: {shorten(words, 40)}"
    if "tool" in lower or "function" in lower:
        return f"{TOOL}: {shorten(words, 40)}"
    return f"{NOT_TEXT}: {shorten(words, 40) if words else kind(part)}"
