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

from vicuna.data.conversation import Number
from vicuna.data.records import field_names
from vicuna.data.records.content_parts import joined, thinking
from vicuna.data.records.field_names import empty
from vicuna.data.records.reasons import (
    BAD_ANSWER,
    LABEL_ODD,
    MASK_ODD,
    MEDIA,
    NOT_LEARNED,
    TOOL,
    WEIGHT,
    Note,
    Unusable,
    shorten,
)
from vicuna.data.records.record import Record, number_of, says
from vicuna.data.records.turn_order import Utterance
from vicuna.messages import Message


def apply_record_flags(record: Record, utterances: list[Utterance]) -> list[Utterance]:
    """Honour the keys of a record; gives what was said with its thought, system and mask.

    Raises: Unusable where the record must be dropped.
    """
    values, used = record.values, record.used
    for key in [k for k in values if k in field_names.MEANINGFUL and k not in used]:
        value = values[key]
        if empty(value):
            used.add(key)
        elif key in field_names.MEDIA:
            raise Unusable(key, Message("{reason}: {key}", reason=MEDIA, key=key))
        elif key in field_names.TOOLS:
            if not isinstance(value, Number) and not isinstance(value, (bool, int, float)):
                raise Unusable(key, Message("{reason}: {key}", reason=TOOL, key=key))
        elif key in field_names.SYSTEMS and utterances:  # plain text has no place for one
            used.add(key)
            utterances = [Utterance("system", joined(value, key, record)[0], key), *utterances]
        elif key in field_names.THOUGHTS:
            utterances = _with_thought(utterances, value, key, record)
        elif not utterances and key in field_names.GOOD and not isinstance(value, bool):
            continue  # beside plain text a label is a class
        elif (in_loss := _says_in_loss(key, value, record.note)) is not None:
            used.add(key)
            if isinstance(in_loss, list):
                utterances = _masked(utterances, in_loss, key)
            elif not in_loss:
                raise Unusable(
                    key,
                    Message(
                        "{reason}: {key} {value}", reason=_reason(key), key=key, value=_brief(value)
                    ),
                )
    return utterances


def merit(values: dict[str, Any]) -> float | None:
    """How good a record's answer is said to be, against others to its question; more is better."""
    for names, sign in ((field_names.RANKS, -1.0), (field_names.SCORES, 1.0)):
        for key in names:
            if (number := number_of(values.get(key))) is not None:
                return sign * number
    return None


def turn_flags(
    item: dict[str, Any], taken: Iterable[str], where: str, record: Record
) -> Utterance | None:
    """Honour the keys of a turn beside its speaker and words (`taken`).

    Returns: a `Said` that holds only `thought` and `learned`; None where there is nothing to say.

    Raises: Unusable where the record must be dropped.
    """
    thought: Any = None
    in_loss = True
    outer = where.split("[")[0]
    for key, value in item.items():
        if key in taken or empty(value):
            continue
        if key in field_names.MEDIA or key == "files":
            raise Unusable(
                Message("{place}.{key}", place=where, key=key),
                Message("{reason}: {key}", reason=MEDIA, key=key),
            )
        if key in field_names.TOOLS:
            raise Unusable(where, TOOL)
        if key in field_names.THOUGHTS:
            if thought is None:
                thought = thinking(value)
            continue
        marked = _says_in_loss(
            key, value, lambda _, reason, action: record.note(where, reason, action)
        )
        if isinstance(marked, list):
            raise Unusable(
                Message("{place}.{key}", place=where, key=key),
                Message("{reason}: {value}", reason=MASK_ODD, value=shorten(_brief(value), 40)),
            )
        if marked is not None:
            in_loss = in_loss and marked
        elif key not in field_names.HARMLESS and key not in _PLAIN_TURN:
            record.leave(f"{outer}[].{key}")
    if thought is None and in_loss:
        return None
    return Utterance("assistant", None, where, thought=thought, in_loss=in_loss)


# Beside a turn these say how it came about, or who it was.
_PLAIN_TURN = frozenset(("name", "timestamp", "time", "created_at", "updated_at", "date", "turn"))


def _says_in_loss(key: str, value: Any, note: Note) -> bool | list[bool] | None:
    """What a weight, mask or label says: learn it, or not; None where it says neither."""
    if key in field_names.PARTIAL:
        raise Unusable(key, Message("{reason}: {key}", reason=MASK_ODD, key=key))
    if key in field_names.LEARNED:
        if isinstance(value, (list, tuple)):
            marks = [_weight(v) for v in value]
            if None in marks:
                raise Unusable(
                    key,
                    Message("{reason}: {value}", reason=MASK_ODD, value=shorten(_brief(value), 40)),
                )
            return [bool(m) for m in marks]
        number = number_of(value)
        if number is not None and number > 0 and number != 1:
            note(
                key,
                Message("{reason}: {key} {value}", reason=WEIGHT, key=key, value=_brief(value)),
                "warned",
            )
            return True
        return says(value)
    if key in field_names.MASKED:
        if isinstance(value, (list, tuple)):
            marks = [says(v) for v in value]
            if None in marks:
                raise Unusable(
                    key,
                    Message("{reason}: {value}", reason=MASK_ODD, value=shorten(_brief(value), 40)),
                )
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


def _judged(key: str, value: Any, in_loss: bool | None, note: Note) -> bool | None:
    if in_loss is None:
        note(
            key,
            Message(
                "{reason}: {key} {value}",
                reason=LABEL_ODD,
                key=key,
                value=shorten(_brief(value), 40),
            ),
            "warned",
        )
    return in_loss


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


def _masked(utterances: list[Utterance], in_loss: list[bool], key: str) -> list[Utterance]:
    """A mask with an entry for each turn, or for each answer."""
    answers = [i for i, s in enumerate(utterances) if s.role == "assistant"]
    spoken = [i for i, s in enumerate(utterances) if s.role != "system"]
    for places in (answers, spoken, list(range(len(utterances)))):
        if len(places) == len(in_loss):
            masks = dict(zip(places, in_loss))
            return [
                s._replace(in_loss=s.in_loss and masks.get(i, True))
                for i, s in enumerate(utterances)
            ]
    raise Unusable(
        key,
        Message(
            "{reason}: {count} entries for {answers} answers",
            reason=MASK_ODD,
            count=len(in_loss),
            answers=len(answers),
        ),
    )


def _with_thought(
    utterances: list[Utterance], value: Any, key: str, record: Record
) -> list[Utterance]:
    """Reasoning beside the conversation: that of its last answer, or a list with one for each."""
    answers = [i for i, s in enumerate(utterances) if s.role == "assistant"]
    if not answers:
        return utterances
    words = value if isinstance(value, list) and len(value) == len(answers) > 1 else [value]
    made = list(utterances)
    for i, part in zip(answers[-len(words) :], words):
        if made[i].thought is None and not empty(part):
            made[i] = made[i]._replace(thought=thinking(part))
            record.used.add(key)
    return made


# Content in parts
