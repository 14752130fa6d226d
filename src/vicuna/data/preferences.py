"""Preferences: of several answers to one question the better one is taught.

    chosen/rejected    texts, turns or lists of turns, beside a prompt, a conversation or nothing
    two answers        response_0/response_1 with better_response_id, response_a/response_b with
                       winner, and their like
    a list of answers  with ranks or scores, or ordered from the best

Which answers were left out shows among the columns that were not used, or in a note.
"""

from __future__ import annotations

from typing import Any

from vicuna.data import keys
from vicuna.data.marks import Reading, joined, number_of, says, thinking
from vicuna.data.reasons import BEST, FIRST, NO_WINNER
from vicuna.data.said import Said
from vicuna.data.textrules import NOT_TEXT, Unusable, kind, names, parse_list

_TWO = (
    *(("response_0", "response_1"), ("response_a", "response_b"), ("answer_a", "answer_b")),
    *(("response1", "response2"), ("response_1", "response_2"), ("answer_0", "answer_1")),
    *(("completion_a", "completion_b"), ("output_1", "output_2"), ("output_a", "output_b")),
    *(("conversation_a", "conversation_b"), ("human_ref_a", "human_ref_b"), ("answer1", "answer2")),
)
_WINNERS = names(
    "better_response_id winner preference overall_preference preferred better choice best label "
    "labels chosen safer_response_id winner_id preferred_answer"
)
_FIRST_WORDS = frozenset(("a", "model_a", "response_a", "first", "answer_a", "left"))
_SECOND_WORDS = frozenset(("b", "model_b", "response_b", "second", "answer_b", "right"))
KEYS = (*keys.CHOSEN, *(key for two in _TWO for key in two))
_LISTS = names("responses answers completions outputs generations replies candidates 回答列表")
_TEXTS = names("response text content answer completion output value message generated_text")


def chosen_key(values: dict[str, Any]) -> str | None:
    """The key of the better answer, where it is an answer and not a flag."""
    for key in keys.CHOSEN:
        value = values.get(key)
        if isinstance(value, (list, dict)) and value:
            return key
        if isinstance(value, str) and value.strip():
            worse = any(k in values for k in keys.REJECTED)
            if worse or value.strip().lower() not in ("true", "false", "yes", "no", "0", "1"):
                return key
    if "chosen" in values and "rejected" in values and values["chosen"] is None:
        return "chosen"
    return None


def two_keys(values: dict[str, Any]) -> tuple[str, str] | None:
    """The keys of two answers that are compared."""
    return next((two for two in _TWO if two[0] in values and two[1] in values), None)


def better(reading: Reading, two: tuple[str, str]) -> str:
    """Which of two answers is the better one.

    Raises: Unusable where nothing says so, or neither is.
    """
    key = keys.first(reading.values, _WINNERS)
    value = reading.take(key)
    if value in two:
        return str(value)
    word = str(value).strip().lower()
    number = number_of(value)
    if word in _FIRST_WORDS:
        return two[0]
    if word in _SECOND_WORDS:
        return two[1]
    if number is not None and key == "overall_preference":  # a scale around 0, the first below it
        if number != 0:
            return two[0] if number < 0 else two[1]
    elif number is not None and key == "labels":  # 1 says that the first was preferred
        return two[0] if number == 1 else two[1]
    elif number is not None:
        zero_based = two[0].endswith("0") or two[0].endswith("a")
        if number in (0, 1) and zero_based:
            return two[int(number)]
        if number in (1, 2) and not zero_based:
            return two[int(number) - 1]
    raise Unusable(key or two[0], NO_WINNER)


def list_key(values: dict[str, Any]) -> str | None:
    """The key of a list of answers to one question."""
    for key in _LISTS:
        items = _items(values.get(key))
        if items and all(isinstance(i, (str, dict, list)) for i in items):
            if isinstance(items[0], dict) and not keys.first(items[0], _TEXTS):
                continue
            return key
    return None


def _items(value: Any) -> list[Any] | None:
    if isinstance(value, str) and value[:1] == "[":
        value = parse_list(value)
    return value if isinstance(value, list) else None


def best(value: list[Any], field: str, reading: Reading) -> Any:
    """The answer of a list that is taught: of the best rank or score, else the first.

    Raises: Unusable where the list is empty.
    """
    if not value:
        return None
    if len(value) == 1:
        return _text(value[0], field)
    merits = [_merit(item) for item in value]
    if all(isinstance(v, list) for v in value) and not any(merits):
        raise Unusable(field, f"{NOT_TEXT}: {kind(value)}")
    if any(m is not None for m in merits):
        place = max(range(len(value)), key=lambda i: (merits[i] is not None, merits[i] or 0.0, -i))
        reading.note(field, f"{BEST}: {place + 1} of {len(value)}", "repaired")
    else:
        place = 0
        reading.note(field, f"{FIRST}: {len(value)}", "repaired")
    return _text(value[place], f"{field}[{place}]")


def _merit(item: Any) -> float | None:
    """How good an answer is said to be; more is better."""
    if not isinstance(item, dict):
        return None
    lower = {str(k).lower(): v for k, v in item.items()}
    for key in keys.RANKS:
        if (number := number_of(lower.get(key))) is not None:
            return -number
    for key in (*keys.SCORES, "votes", "pm_score", "upvotes"):
        if (number := number_of(lower.get(key))) is not None:
            return number
    for names_, sign in ((keys.GOOD, 1.0), (keys.BAD, -1.0), (("selected", "is_best"), 1.0)):
        for key in names_:
            if (said := says(lower.get(key))) is not None:
                return sign if said else -sign
    return None


def _text(item: Any, field: str) -> Any:
    """The words of one answer."""
    while isinstance(item, list) and len(item) == 1:  # [["answer"]], as some platforms have it
        item = item[0]
    if not isinstance(item, dict):
        return item
    lower = {str(k).lower(): v for k, v in item.items()}
    key = keys.first(lower, _TEXTS)
    if key is None:
        raise Unusable(field, f"{NOT_TEXT}: an object")
    return _text(lower[key], f"{field}.{key}")


def answer(value: Any, field: str, reading: Reading) -> Said:
    """The better answer, given as text, as a turn, or as a turn in a list."""
    if isinstance(value, dict):
        folded, _ = keys.fold(value, reading.note)
        words = keys.first(folded, keys.WORDS)
        if words is None:
            raise Unusable(field, f"{NOT_TEXT}: an object")
        text, thought = joined(folded[words], f"{field}.{words}", reading)
        own = keys.first(folded, keys.THOUGHTS)
        thought = thought if own is None else thinking(folded[own])
        return Said("assistant", text, f"{field}.{words}", thought=thought)
    return Said("assistant", value, field)
