"""Lists of turns: {from, value}, {role, content}, {question, answer}, [question, answer]."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vicuna.data.conversation import Number, Role
from vicuna.data.records import loss_flags, preferences
from vicuna.data.records.content_parts import joined, thinking
from vicuna.data.records.field_names import (
    ALL_TURN_LISTS,
    ANSWERS,
    LEARNED,
    OTHER_TURN_LISTS,
    PAIRS,
    QUESTIONS,
    ROLES,
    SPEAKERS,
    THOUGHT_ROLES,
    THOUGHTS,
    TOOL_ROLES,
    TURN_LISTS,
    WORDS,
    empty,
    first,
    fold,
)
from vicuna.data.records.parse_values import kind, parse_list
from vicuna.data.records.reasons import (
    NOT_A_TURN,
    PRINTED_LIST,
    TOOL,
    UNKNOWN_ROLE,
    Unusable,
    shorten,
)
from vicuna.data.records.record import Record
from vicuna.data.records.turn_order import Utterance
from vicuna.messages import Message


def turns_key(values: dict[str, Any]) -> str | None:
    """The key of a list of turns."""
    for key in TURN_LISTS:
        if key in values and as_list(values[key]) is not None:
            return key
    for key in OTHER_TURN_LISTS:
        if key in values and looks_like_turns(as_list(values[key])):
            return key
    return None


def has_turns(values: dict[str, Any]) -> bool:
    return not ALL_TURN_LISTS.isdisjoint(values)


def looks_like_turns(found: Any) -> bool:
    """Whether this is a list whose first entry says who speaks, or who asks and answers."""
    if not isinstance(found, list) or not found or not isinstance(found[0], dict):
        return False
    lower = {str(k).strip().lower() for k in found[0]}
    if not lower.isdisjoint(SPEAKERS):
        return True
    return any(q in lower and a in lower for q, a in PAIRS)


def as_list(value: Any, record: Record | None = None, key: str = "") -> list[Any] | None:
    """A list, also where a table's cell holds one as JSON text or as Python prints it."""
    if isinstance(value, str) and value[:1] == "[":
        text, value = value, parse_list(value)
        if value is None and len(text) < 1 << 20:
            from vicuna.data.records.parse_values import printed

            value = printed(text)
            if value is not None and record is not None:
                record.note(key, PRINTED_LIST, "repaired")
    return value if isinstance(value, list) else None


def pair_keys(r: dict[str, Any]) -> tuple[str | None, str | None]:
    """The names of question and answer: a usual couple, or any question with any answer."""
    for question, answer in PAIRS:
        if question in r and answer in r:
            return question, answer
    question_, answer_ = first(r, QUESTIONS), first(r, ANSWERS)
    if question_ and answer_ == question_:
        answer_ = next((a for a in ANSWERS if a in r and a != question_), None)
    return (question_, answer_) if question_ and answer_ else (None, None)


def items(found: list[Any], key: str, record: Record) -> Iterator[Utterance]:
    """Turns as {from, value}, as {question, answer}, or as [question, answer]."""
    thought: Any = None
    for i, item in enumerate(found):
        where = f"{key}[{i}]"
        if type(item) is dict and len(item) == 2:  # nearly all of them
            speaker, words = ("from", "value") if "from" in item else ("role", "content")
            if words in item and speaker in item and type(item[words]) is str:
                name = item[speaker]
                role = ROLES.get(name) if type(name) is str else None
                if role and thought is None:
                    yield Utterance(role, item[words], f"{where}.{words}")
                    continue
        if isinstance(item, (list, tuple)) and len(item) == 2:
            yield Utterance("user", item[0], f"{where}[0]")
            yield Utterance("assistant", item[1], f"{where}[1]")
            continue
        if not isinstance(item, dict):
            raise Unusable(where, Message("{reason}: {type}", reason=NOT_A_TURN, type=kind(item)))
        item, _ = fold(item, record.note)
        speaker_ = first(item, SPEAKERS)
        if not speaker_:
            yield from _couple(item, where, record)
            continue
        utterance = _one(item, speaker_, where, record)
        if utterance.in_loss and utterance.field == "":  # a thought that stands by itself
            thought = utterance.thought if thought is None else f"{thought}\n{utterance.thought}"
            continue
        if thought is not None and utterance.role == "assistant":
            utterance = utterance._replace(thought=utterance.thought or thought)
            thought = None
        yield utterance


def _one(item: dict[str, Any], speaker: str, where: str, record: Record) -> Utterance:
    """One turn; a `Said` without a field where it only holds the thought of what follows."""
    name = item[speaker]
    if isinstance(name, dict):  # ChatGPT's author
        name = name.get("role")
    words = first(item, WORDS) or "content"
    field = f"{where}.{words}"
    value, part_thought = joined(item.get(words), field, record)
    taken = {speaker, words}
    if words == "content" and "text" in item:  # Claude's exports have both
        taken.add("text")
    channel = item.get("channel")
    if isinstance(channel, str) and channel in ("analysis", "final"):
        taken.add("channel")
    elif channel == "commentary" or item.get("recipient") not in (None, "", "all"):
        raise Unusable(where, TOOL)
    if item.get("recipient") == "all":
        taken.add("recipient")
    thinks = isinstance(name, str) and name.strip().lower() in THOUGHT_ROLES
    if thinks or channel == "analysis":
        return Utterance("assistant", None, "", thought=thinking(value))
    beside = None if len(item) == len(taken) else loss_flags.turn_flags(item, taken, where, record)
    role = role_of(name, f"{where}.{speaker}")
    if role != "assistant":
        for key in item:  # questions are never learned, and nobody thinks them up
            flag = key in LEARNED and item[key] is True
            if flag or (key in THOUGHTS and not empty(item[key])):
                record.leave(f"{where.split('[')[0]}[].{key}")
        return Utterance(role, value, field)
    if beside is None:
        return Utterance(role, value, field, thought=part_thought)
    return Utterance(
        role, value, field, thought=beside.thought or part_thought, in_loss=beside.in_loss
    )


def _couple(item: dict[str, Any], where: str, record: Record) -> Iterator[Utterance]:
    """A question and its answer in one object."""
    question, answer = pair_keys(item)
    if not question or not answer:
        raise Unusable(where, NOT_A_TURN)
    taken = {question, answer}
    material = "input" if "input" in item and question == "instruction" else ""
    system = first(item, ("system", "system_prompt"))
    taken.update(k for k in (material, system) if k)
    beside = None if len(item) == len(taken) else loss_flags.turn_flags(item, taken, where, record)
    if system and not empty(item[system]):
        yield Utterance("system", item[system], f"{where}.{system}")
    yield Utterance("user", item[question], f"{where}.{question}", item.get(material), material)
    (utterance,) = answers_of(item[answer], f"{where}.{answer}", record, item)
    if beside is not None:
        utterance = utterance._replace(
            thought=beside.thought or utterance.thought, in_loss=beside.in_loss
        )
    yield utterance


def role_of(name: Any, field: str) -> Role:
    """Raises: Unusable where nobody is called so, or a tool is."""
    if not isinstance(name, str) or isinstance(name, Number):
        raise Unusable(field, Message("{reason}: {type}", reason=UNKNOWN_ROLE, type=kind(name)))
    role = ROLES.get(name) or ROLES.get(lower := name.strip().lower())
    if role:
        return role
    reason = TOOL if lower in TOOL_ROLES else UNKNOWN_ROLE
    raise Unusable(field, Message("{reason}: {name}", reason=reason, name=shorten(name, 40)))


def answers_of(
    value: Any, key: str, record: Record, beside: dict[str, Any] | None = None
) -> list[Utterance]:
    """An answer as text, as a turn, as a list of turns, or as the best of several."""
    if looks_like_turns(value):
        return list(items(value, key, record))
    if isinstance(value, list):
        value = preferences.best(value, key, record, beside)
    return [preferences.answer(value, key, record)]
