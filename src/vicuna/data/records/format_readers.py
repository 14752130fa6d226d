"""What was said in a record, format by format.

Each reader takes a `Reading`, marks what it uses, and gives `Said`s in order. What a record's other
keys mean is the business of `marks`; which reader it is, of `formats`.
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
from vicuna.data.records.record import Reading
from vicuna.data.records.transcripts import POSSIBLE, Spoken, open_dialogue, whole_dialogue
from vicuna.data.records.turn_lists import (
    answers_of,
    as_list,
    items,
    looks_like_turns,
    pair_keys,
    turns_key,
)
from vicuna.data.records.turn_order import Said

# The reasons a user reads, beside those of `said` and `marks`.

_PLAIN_ALPACA = frozenset(("instruction", "input", "output", "id"))


def alpaca(reading: Reading) -> list[Said]:
    """{instruction, input, output}."""
    values = reading.values
    question, material = values["instruction"], values.get("input")
    answer: Any = values.get("output")
    if not _PLAIN_ALPACA.issuperset(values):
        reading.used.update(("instruction", "input", "output"))
        question, material, answer = _choice(reading, question, material, answer, "output")
    if isinstance(answer, list):
        answer = preferences.best(answer, "output", reading)
    return _asked(question, material, "instruction", "input", answer, "output", reading)


def pair(reading: Reading) -> list[Said]:
    """{prompt, response} and whatever else questions and answers are called."""
    values = reading.values
    question_, answer_ = pair_keys(values)
    question = question_ or first(values, PLAIN_QUESTIONS) or ""
    material = next((m for m in MATERIAL if m in values and m != question), "")
    if material and material == answer_:
        material = ""
    if (question, answer_) == ("input", "output"):
        # Also the chat format without its lists; the report keeps this to itself unless the
        # file has records of that format.
        reading.note("input", ONE_TURN, "warned")
    asked, given = reading.take(question), reading.take(material)
    answer = reading.take(answer_)
    if isinstance(asked, (list, dict)):
        return [
            *_context(asked, question, reading),
            *answers_of(answer, answer_ or "answer", reading),
        ]
    asked, given, answer = _choice(reading, asked, given, answer, answer_)
    if isinstance(answer, (list, dict)):
        before = _asked(asked, given, question, material, "", "", reading)[:-1]
        return [*before, *answers_of(answer, answer_ or "answer", reading)]
    return _asked(asked, given, question, material, answer, answer_ or "answer", reading)


def _choice(
    reading: Reading, question: Any, material: Any, answer: Any, key: str | None
) -> tuple[Any, Any, Any]:
    """Question, material and answer with the options of a multiple choice among them."""
    if found := multiple_choice.take(reading):
        answer = multiple_choice.answer(reading, key, found)
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
    reading: Reading,
) -> list[Said]:
    """A question with its material and its answer; the question may hold a dialogue in one text."""
    given = Said("assistant", answer, answer_field)
    possible = type(question) is str and POSSIBLE.match(question)
    if possible and (said := _dialogue_before(question, material)):
        reading.note(field, DIALOGUE, "repaired")
        return [*_spoken(said, field), given]
    return [Said("user", question, field, material, input_field), given]


def _dialogue_before(question: str, material: Any) -> Spoken | None:
    if type(material) is str and material.strip():
        # BELLE's and others': the dialogue goes on in the input.
        return (
            open_dialogue(f"{question}\n{material}")
            if open_dialogue(f"{question}\nUser:x")
            else None
        )
    return open_dialogue(question)


def _spoken(said: Spoken, field: str, learned: bool = True) -> list[Said]:
    return [Said(role, words, field, learned=learned) for role, words in said]


def _context(value: Any, key: str, reading: Reading) -> Iterator[Said]:
    """What comes before an answer that was set apart; its own answers are not learned."""
    if isinstance(value, dict):
        value = [value]
    for said in items(value, key, reading):
        yield said._replace(learned=False) if said.role == "assistant" else said


def chat(reading: Reading) -> Iterator[Said]:
    """{input: [questions], output: [answers]}: the 2023 project's."""
    questions = _one_or_many(reading, "input")
    answers = _one_or_many(reading, "output")
    if len(answers) > len(questions):
        raise Unusable("output", f"{MORE_ANSWERS}: {len(answers)} and {len(questions)}")
    if not answers:
        raise Unusable("output", NO_ANSWER if questions else EMPTY_CONVERSATION)
    for i, (question, answer) in enumerate(zip(questions, answers)):
        yield Said("user", question, f"input[{i}]")
        yield Said("assistant", answer, f"output[{i}]")
    if left := len(questions) - len(answers):
        reading.note("input", f"{OPEN_QUESTION}: {left} of {len(questions)}", "repaired")


def _one_or_many(reading: Reading, key: str) -> list[Any]:
    value = reading.take(key)
    if isinstance(value, str) and (many := as_list(value)) is not None:
        value = many
    if value is None or isinstance(value, list):
        return value or []
    if isinstance(value, (bool, dict)):
        raise Unusable(key, f"{NOT_TEXT}: {kind(value)}")
    reading.note(key, ONE_TURN, "repaired")
    return [value]


def turn_list(reading: Reading) -> Iterator[Said]:
    """{conversations: [{from, value} ...]}, {messages: [{role, content} ...]}, their relatives."""
    values = reading.values
    key = turns_key(values) or ""
    found = as_list(reading.take(key), reading, key)
    if not found:
        raise Unusable(key, EMPTY_CONVERSATION)
    if "instruction" in values and not empty(values["instruction"]):
        # Beside a list of turns an instruction is what holds for all of them.
        yield Said("system", reading.take("instruction"), "instruction")
    yield from items(found, key, reading)


def history(reading: Reading) -> Iterator[Said]:
    """{history: [{input, output} | [question, answer] ...], input, output}; saved chats."""
    values = reading.values
    yield from items(as_list(reading.take("history")) or [], "history", reading)
    question, answer = pair_keys(values)
    if "instruction" in values:
        question = "instruction"
        answer = answer or first(values, ANSWERS)
    question = question or first(values, QUESTIONS)
    if not question or (values[question] is None and values.get(answer or "") is None):
        return
    material = "input" if question != "input" else ""
    asked, given = reading.take(question), reading.take(material)
    yield Said("user", asked, question, given, material)
    if answer:
        value = reading.take(answer)
        yield from answers_of(value, answer, reading)


def preference(reading: Reading) -> list[Said]:
    """A question and the better of its answers; what comes before that answer is context."""
    values = reading.values
    key = preferences.chosen_key(values)
    two = None if key else preferences.two_keys(values)
    if two:
        key = preferences.better(reading, two)
    elif not key:
        key = preferences.list_key(values)
    assert key is not None
    value = reading.take(key)
    as_turns = as_list(value)
    if looks_like_turns(as_turns):
        answers = list(items(as_turns or [], key, reading))
    elif as_turns is not None:
        answers = [preferences.answer(preferences.best(as_turns, key, reading), key, reading)]
    else:
        answers = [preferences.answer(value, key, reading)]
        said = whole_dialogue(value, expected=True) if type(value) is str else None
        if said:
            answers = _spoken(said, key)
    before = list(_before(reading, key))
    if any(s.role == "user" for s in answers):  # the question is in it, too
        before = [s for s in before if s.role == "system"]
    while before and before[-1].role == "assistant":  # one of the two, or neither
        reading.note(before.pop().field, REPLACED, "repaired")
    last = len(answers) - 1
    while last > 0 and answers[last].role != "assistant":
        last -= 1
    answers = [
        s._replace(learned=s.learned and i == last) if s.role == "assistant" else s
        for i, s in enumerate(answers)
    ]
    return [*before, *answers]


def _before(reading: Reading, answer: str) -> Iterator[Said]:
    """The question of a preference, and what came before it."""
    values = reading.values
    if turns := turns_key({k: v for k, v in values.items() if k != answer}):
        yield from _context(as_list(reading.take(turns)) or [], turns, reading)
        return
    if "history" in values and (earlier := as_list(values["history"])):
        reading.used.add("history")
        yield from _context(earlier, "history", reading)
    names = [q for q in ("instruction", *QUESTIONS, "history") if q in values and q != answer]
    if not names:
        return
    question = names[0]
    value = reading.take(question)
    asked = as_list(value) if not isinstance(value, dict) else [value]
    if looks_like_turns(asked):
        yield from _context(asked, question, reading)
        return
    material = next((m for m in MATERIAL if m in values and m not in (question, answer)), "")
    given = reading.take(material)
    if type(value) is str and (said := _dialogue_before(value, given)):
        yield from _spoken(said, question, learned=False)
        return
    yield Said("user", value, question, given, material)


def dialogue(reading: Reading) -> list[Said]:
    """A dialogue in one text: `Human: … Assistant: …`, or what a template wrote."""
    found = dialogue_key(reading.values)
    assert found is not None
    key, said = found
    reading.used.add(key)
    system = reading.take("prefix")
    return [*([Said("system", system, "prefix")] if system else []), *_spoken(said, key)]


_DIALOGUES = ("plain_text", "text", *TURN_LISTS, *OTHER_TURN_LISTS, "content", "prompt")


def dialogue_key(values: dict[str, Any]) -> tuple[str, Spoken] | None:
    """The key of a text that is a dialogue, and who says what in it."""
    for key in _DIALOGUES:
        value = values.get(key)
        if type(value) is not str or len(value) <= 8:
            continue
        if said := whole_dialogue(value, expected=key not in ("text", "content", "prompt")):
            return key, said
    return None


# Turns
