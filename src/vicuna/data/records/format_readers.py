"""The turns of a record, format by format.

Each reader takes a `Reading`, marks what it uses, and gives `Said`s in order. What a record's other
keys mean is decided in `loss_flags.py`; which reader reads it, in `formats.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vicuna.data.records import multiple_choice, preferences
from vicuna.data.records.field_names import (
    ANSWERS,
    MATERIAL,
    OTHER_TURN_LISTS,
    PLAIN_QUESTIONS,
    QUESTIONS,
    TURN_LISTS,
    empty,
    first,
)
from vicuna.data.records.parse_values import kind
from vicuna.data.records.reasons import (
    DIALOGUE,
    EMPTY_CONVERSATION,
    MORE_ANSWERS,
    NO_ANSWER,
    NOT_TEXT,
    ONE_TURN,
    OPEN_QUESTION,
    REPLACED,
    Unusable,
)
from vicuna.data.records.record import Record
from vicuna.data.records.transcripts import POSSIBLE, Transcript, open_dialogue, whole_dialogue
from vicuna.data.records.turn_lists import (
    answers_of,
    as_list,
    items,
    looks_like_turns,
    pair_keys,
    turns_key,
)
from vicuna.data.records.turn_order import Utterance
from vicuna.messages import Message

_PLAIN_ALPACA = frozenset(("instruction", "input", "output", "id"))


def alpaca(record: Record) -> list[Utterance]:
    """{instruction, input, output}."""
    values = record.values
    question, material = values["instruction"], values.get("input")
    answer: Any = values.get("output")
    if not _PLAIN_ALPACA.issuperset(values):
        record.used.update(("instruction", "input", "output"))
        question, material, answer = _choice(record, question, material, answer, "output")
    if isinstance(answer, list):
        answer = preferences.best(answer, "output", record)
    return _asked(question, material, "instruction", "input", answer, "output", record)


def pair(record: Record) -> list[Utterance]:
    """{prompt, response} and whatever else questions and answers are called."""
    values = record.values
    question_, answer_ = pair_keys(values)
    question = question_ or first(values, PLAIN_QUESTIONS) or ""
    material = next((m for m in MATERIAL if m in values and m != question), "")
    if material and material == answer_:
        material = ""
    if (question, answer_) == ("input", "output"):
        # Also the chat format without its lists; the report keeps this to itself unless the
        # file has records of that format.
        record.note("input", ONE_TURN, "warned")
    asked, given = record.take(question), record.take(material)
    answer = record.take(answer_)
    if isinstance(asked, (list, dict)):
        return [
            *_context(asked, question, record),
            *answers_of(answer, answer_ or "answer", record),
        ]
    asked, given, answer = _choice(record, asked, given, answer, answer_)
    if isinstance(answer, (list, dict)):
        before = _asked(asked, given, question, material, "", "", record)[:-1]
        return [*before, *answers_of(answer, answer_ or "answer", record)]
    return _asked(asked, given, question, material, answer, answer_ or "answer", record)


def _choice(
    record: Record, question: Any, material: Any, answer: Any, key: str | None
) -> tuple[Any, Any, Any]:
    """Question, material and answer with the options of a multiple choice among them."""
    if found := multiple_choice.take(record):
        answer = multiple_choice.answer(record, key, found)
        if empty(material):
            question = multiple_choice.asked(question, found)
        elif not (isinstance(question, str) and all(text in question for _, text in found)):
            material = multiple_choice.asked(material, found)
    return question, material, answer


def _asked(
    question: Any,
    material: Any,
    field: str,
    input_field: str,
    answer: Any,
    answer_field: str,
    record: Record,
) -> list[Utterance]:
    """A question with its material and its answer; the question may hold a dialogue in one text."""
    given = Utterance("assistant", answer, answer_field)
    possible = type(question) is str and POSSIBLE.match(question)
    if possible and (utterances := _dialogue_before(question, material)):
        record.note(field, DIALOGUE, "repaired")
        return [*_utterances(utterances, field), given]
    return [Utterance("user", question, field, material, input_field), given]


def _dialogue_before(question: str, material: Any) -> Transcript | None:
    if type(material) is str and material.strip():
        # BELLE's and others': the dialogue goes on in the input.
        return (
            open_dialogue(f"{question}\n{material}")
            if open_dialogue(f"{question}\nUser:x")
            else None
        )
    return open_dialogue(question)


def _utterances(utterances: Transcript, field: str, in_loss: bool = True) -> list[Utterance]:
    return [Utterance(role, words, field, in_loss=in_loss) for role, words in utterances]


def _context(value: Any, key: str, record: Record) -> Iterator[Utterance]:
    """What comes before an answer that was set apart; its own answers are not learned."""
    if isinstance(value, dict):
        value = [value]
    for utterances in items(value, key, record):
        yield utterances._replace(in_loss=False) if utterances.role == "assistant" else utterances


def chat(record: Record) -> Iterator[Utterance]:
    """{input: [questions], output: [answers]}: the 2023 project's."""
    questions = _one_or_many(record, "input")
    answers = _one_or_many(record, "output")
    if len(answers) > len(questions):
        raise Unusable(
            "output",
            Message(
                "{reason}: {answers} and {questions}",
                reason=MORE_ANSWERS,
                answers=len(answers),
                questions=len(questions),
            ),
        )
    if not answers:
        raise Unusable("output", NO_ANSWER if questions else EMPTY_CONVERSATION)
    for i, (question, answer) in enumerate(zip(questions, answers)):
        yield Utterance("user", question, f"input[{i}]")
        yield Utterance("assistant", answer, f"output[{i}]")
    if left := len(questions) - len(answers):
        record.note(
            "input",
            Message(
                "{reason}: {left} of {questions}",
                reason=OPEN_QUESTION,
                left=left,
                questions=len(questions),
            ),
            "repaired",
        )


def _one_or_many(record: Record, key: str) -> list[Any]:
    value = record.take(key)
    if isinstance(value, str) and (many := as_list(value)) is not None:
        value = many
    if value is None or isinstance(value, list):
        return value or []
    if isinstance(value, (bool, dict)):
        raise Unusable(key, Message("{reason}: {type}", reason=NOT_TEXT, type=kind(value)))
    record.note(key, ONE_TURN, "repaired")
    return [value]


def turn_list(record: Record) -> Iterator[Utterance]:
    """{conversations: [{from, value} ...]}, {messages: [{role, content} ...]}, their relatives."""
    values = record.values
    key = turns_key(values) or ""
    found = as_list(record.take(key), record, key)
    if not found:
        raise Unusable(key, EMPTY_CONVERSATION)
    if "instruction" in values and not empty(values["instruction"]):
        # Beside a list of turns an instruction is what holds for all of them.
        yield Utterance("system", record.take("instruction"), "instruction")
    yield from items(found, key, record)


def history(record: Record) -> Iterator[Utterance]:
    """{history: [{input, output} | [question, answer] ...], input, output}; saved chats."""
    values = record.values
    yield from items(as_list(record.take("history")) or [], "history", record)
    question, answer = pair_keys(values)
    if "instruction" in values:
        question = "instruction"
        answer = answer or first(values, ANSWERS)
    question = question or first(values, QUESTIONS)
    if not question or (values[question] is None and values.get(answer or "") is None):
        return
    material = "input" if question != "input" else ""
    asked, given = record.take(question), record.take(material)
    yield Utterance("user", asked, question, given, material)
    if answer:
        value = record.take(answer)
        yield from answers_of(value, answer, record)


def preference(record: Record) -> list[Utterance]:
    """A question and the better of its answers; what comes before that answer is context."""
    values = record.values
    key = preferences.chosen_key(values)
    two = None if key else preferences.two_keys(values)
    if two:
        key = preferences.better(record, two)
    elif not key:
        key = preferences.list_key(values)
    assert key is not None
    value = record.take(key)
    as_turns = as_list(value)
    if looks_like_turns(as_turns):
        answers = list(items(as_turns or [], key, record))
    elif as_turns is not None:
        answers = [preferences.answer(preferences.best(as_turns, key, record), key, record)]
    else:
        answers = [preferences.answer(value, key, record)]
        utterances = whole_dialogue(value, expected=True) if type(value) is str else None
        if utterances:
            answers = _utterances(utterances, key)
    before = list(_before(record, key))
    if any(s.role == "user" for s in answers):  # the question is in it, too
        before = [s for s in before if s.role == "system"]
    while before and before[-1].role == "assistant":  # one of the two, or neither
        record.note(before.pop().field, REPLACED, "repaired")
    last = len(answers) - 1
    while last > 0 and answers[last].role != "assistant":
        last -= 1
    answers = [
        s._replace(in_loss=s.in_loss and i == last) if s.role == "assistant" else s
        for i, s in enumerate(answers)
    ]
    return [*before, *answers]


def _before(record: Record, answer: str) -> Iterator[Utterance]:
    """The question of a preference, and what came before it."""
    values = record.values
    if turns := turns_key({k: v for k, v in values.items() if k != answer}):
        yield from _context(as_list(record.take(turns)) or [], turns, record)
        return
    if "history" in values and (earlier := as_list(values["history"])):
        record.used.add("history")
        yield from _context(earlier, "history", record)
    names = [q for q in ("instruction", *QUESTIONS, "history") if q in values and q != answer]
    if not names:
        return
    question = names[0]
    value = record.take(question)
    asked = as_list(value) if not isinstance(value, dict) else [value]
    if looks_like_turns(asked):
        yield from _context(asked, question, record)
        return
    material = next((m for m in MATERIAL if m in values and m not in (question, answer)), "")
    given = record.take(material)
    if type(value) is str and (utterances := _dialogue_before(value, given)):
        yield from _utterances(utterances, question, in_loss=False)
        return
    yield Utterance("user", value, question, given, material)


def dialogue(record: Record) -> list[Utterance]:
    """A dialogue in one text: `Human: … Assistant: …`, or what a template wrote."""
    found = dialogue_key(record.values)
    assert found is not None
    key, utterances = found
    record.used.add(key)
    system = record.take("prefix")
    return [
        *([Utterance("system", system, "prefix")] if system else []),
        *_utterances(utterances, key),
    ]


_DIALOGUES = ("plain_text", "text", *TURN_LISTS, *OTHER_TURN_LISTS, "content", "prompt")


def dialogue_key(values: dict[str, Any]) -> tuple[str, Transcript] | None:
    """The key of a text that is a dialogue, and who says what in it."""
    for key in _DIALOGUES:
        value = values.get(key)
        if type(value) is not str or len(value) <= 8:
            continue
        if utterances := whole_dialogue(value, expected=key not in ("text", "content", "prompt")):
            return key, utterances
    return None
