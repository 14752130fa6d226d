"""Preferences: of several answers to one question the better one is taught.

    chosen/rejected    texts, turns or lists of turns, beside a prompt, a conversation or nothing
    two answers        response_0/response_1 with better_response_id, response_a/response_b with
                       winner, and their like
    a list of answers  with ranks or scores in them or in a list beside it, with the place of the
                       best, or ordered from the best

Which answers were left out shows among the columns that were not used, or in a note.
"""

from __future__ import annotations

import re
from itertools import takewhile
from typing import Any

from vicuna.data.records import field_names
from vicuna.data.records.content_parts import joined, thinking
from vicuna.data.records.field_names import names
from vicuna.data.records.parse_values import kind, parse_list
from vicuna.data.records.reasons import BAD_ANSWER, BEST, FIRST, NO_WINNER, NOT_TEXT, Unusable
from vicuna.data.records.record import Record, number_of, says
from vicuna.data.records.turn_order import Utterance
from vicuna.messages import Message

_ENDS = (("_", "ab"), ("_", "01"), ("_", "12"), ("", "01"), ("", "12"))
_TWO = tuple(
    (f"{stem}{sep}{ends[0]}", f"{stem}{sep}{ends[1]}")
    for sep, ends in _ENDS
    for stem in names(
        "response answer completion output conversation human_ref reply generation 回答 答案 回复"
    )
)
_WINNERS = names(
    "better_response_id winner preference overall_preference preferred better choice best label "
    "labels chosen safer_response_id winner_id preferred_answer preferred_response best_response "
    "chosen_response better_response accepted selected winner_response 优选"
)
# Which answer of a list is the best, counted from 0.
_PLACES = names(
    "best best_index best_idx best_id best_response best_response_index best_answer winner "
    "winner_index winner_id preferred preferred_index chosen chosen_index chosen_idx choice "
    "preference better selected selected_index accepted label 优选"
)
_POINTER = re.compile(
    r"(?:(?:model|response|answer|output|completion|option|reply|回答|答案|回复)[_ -]?)?([a-i]|\d)"
)
_ORDINALS = {"first": 0, "left": 0, "second": 1, "right": 1, "third": 2, "fourth": 3}
_NEITHER = frozenset(names("tie tied draw both neither none equal same bothbad both_bad 平局 一样"))
# What the last word of a list's name says of its numbers: more is better, or less.
_SIGNS = {
    **dict.fromkeys(("rank", "ranking"), -1.0),
    **dict.fromkeys(names("score rating reward vote upvote like point quality"), 1.0),
}
KEYS = (*field_names.CHOSEN, *(key for two in _TWO for key in two))
# Lists that may be as long as that of the answers and have nothing to do with it.
_OTHER_LISTS = frozenset(
    (
        *field_names.ALL_TURN_LISTS,
        *field_names.MATERIAL,
        *field_names.SYSTEMS,
        *field_names.QUESTIONS,
        *field_names.HARMLESS,
    )
    + (*field_names.CHOSEN, *field_names.REJECTED, "history", "instruction")
) - {"source"}
LISTS = names("responses answers completions outputs generations replies candidates 回答列表")
_TEXTS = names("response text content answer completion output value message generated_text")


def chosen_key(values: dict[str, Any]) -> str | None:
    """The key of the better answer, where it is an answer and not a flag or a pointer."""
    for key in field_names.CHOSEN:
        value = values.get(key)
        if isinstance(value, (list, dict)) and value:
            return key
        if isinstance(value, str) and value.strip():
            if _points(value) and (two_keys(values) or list_key(values)):
                continue
            worse = any(k in values for k in field_names.REJECTED)
            if worse or value.strip().lower() not in ("true", "false", "yes", "no", "0", "1"):
                return key
    if "chosen" in values and "rejected" in values and values["chosen"] is None:
        return "chosen"
    return None


def _points(value: str) -> bool:
    """Whether a text can be the number, letter or name of an answer, or says that none is best."""
    word = value.strip().lower()
    if word in _ORDINALS or word in _NEITHER:
        return True
    return bool(_POINTER.fullmatch(word)) or number_of(word) is not None


def two_keys(values: dict[str, Any]) -> tuple[str, ...] | None:
    """The keys of two answers, or of more, that are compared."""
    for two in _TWO:
        if two[0] in values and two[1] in values:
            if not field_names.first(values, _WINNERS) and any(
                not field_names.empty(values.get(a)) for a in field_names.ANSWERS
            ):
                return None  # the record says itself which is its answer
            last = ord(two[1][-1])
            more = (f"{two[1][:-1]}{chr(code)}" for code in range(last + 1, last + 8))
            return (*two, *takewhile(values.__contains__, more))
    return None


def better(record: Record, several: tuple[str, ...]) -> str:
    """Which of the answers under these keys is the best one.

    Raises: Unusable where nothing says so, or none is.
    """
    key = field_names.first(record.values, _WINNERS)
    value = record.take(key)
    word = str(value).strip().lower()
    if (name := re.sub("[ -]", "_", word)) in several:
        return name
    number = number_of(value)
    place = None
    if number is not None and key == "overall_preference":  # a scale around 0, the first below it
        place = None if number == 0 else 0 if number < 0 else 1
    elif number is not None and key == "labels":  # 1 says that the first was preferred
        place = 0 if number == 1 else 1
    elif number is not None:
        place = int(number) - (several[0][-1] == "1") if number.is_integer() else None
    elif word in _ORDINALS:
        place = _ORDINALS[word]
    elif (found := _POINTER.fullmatch(word)) and found[1].isalpha():
        place = ord(found[1]) - ord("a")
    elif found and several[0][-1].isdigit():
        place = int(found[1]) - int(several[0][-1])
    else:
        own = [k for k in several if str(record.values[k]).strip().lower() == word]
        place = several.index(own[0]) if len(own) == 1 and word else None
    if place is None or not 0 <= place < len(several):
        raise Unusable(key or several[0], NO_WINNER)
    return several[place]


def list_key(values: dict[str, Any]) -> str | None:
    """The key of a list of answers to one question."""
    for key in LISTS:
        items = _items(values.get(key))
        if items and all(isinstance(i, (str, dict, list)) for i in items):
            if isinstance(items[0], dict) and not field_names.first(items[0], _TEXTS):
                continue
            return key
    return None


def _items(value: Any) -> list[Any] | None:
    if isinstance(value, str) and value[:1] == "[":
        value = parse_list(value)
    return value if isinstance(value, list) else None


def best(value: list[Any], field: str, record: Record, beside: dict[str, Any] | None = None) -> Any:
    """The answer of a list that is taught: of the best rank or score, else the first.

    Args:
        beside: what stands beside the list, where that is not the whole record.

    Raises: Unusable where the list is empty, or where what stands beside it does not tell which
        answer is the best.
    """
    if not value:
        return None
    if len(value) == 1:
        return _text(value[0], field)
    merits = [_merit(item) for item in value]
    if all(isinstance(v, list) for v in value) and not any(merits):
        raise Unusable(field, Message("{reason}: {type}", reason=NOT_TEXT, type=kind(value)))
    if all(m is None for m in merits):
        merits = _judged(value, field.rsplit(".", 1)[-1], record, beside) or merits
    if any(m is not None for m in merits):
        place = max(range(len(value)), key=lambda i: (merits[i] is not None, merits[i] or 0.0, -i))
        record.note(
            field,
            Message("{reason}: {place} of {count}", reason=BEST, place=place + 1, count=len(value)),
            "repaired",
        )
    else:
        place = 0
        record.note(field, Message("{reason}: {count}", reason=FIRST, count=len(value)), "repaired")
    return _text(value[place], f"{field}[{place}]")


def _judged(
    answers: list[Any], own: str, record: Record, beside: dict[str, Any] | None
) -> list[float | None] | None:
    """How good each answer is by what stands beside the list; None where nothing judges.

    Raises: Unusable where something does and it cannot be told what it says.
    """
    values = record.values if beside is None else beside
    used = record.used if beside is None else set[str]()
    rest = [k for k in values if k not in used and k != own and not field_names.empty(values[k])]
    unclear = ""
    for key in rest:
        found = _items(values[key])
        if found is None or key in _OTHER_LISTS or key.removesuffix("s") in field_names.HARMLESS:
            continue
        merits = _merits(key, found)
        if merits and len(merits) == len(answers):
            record.used.add(key)
            if max(merits) < 0 and all(_flag(key) for _ in merits):
                raise Unusable(key, Message("{reason}: {key}", reason=BAD_ANSWER, key=key))
            if key.startswith("ranking") and _may_be_order(merits):
                raise Unusable(key, NO_WINNER)
            return [*merits]
        if merits is not None or len(found) == len(answers):
            unclear = unclear or key
    if unclear:
        raise Unusable(unclear, NO_WINNER)
    for key in _PLACES:
        if key in rest and not isinstance(values[key], (bool, list, dict)):
            place = _place(values[key], answers)
            if place is None:
                raise Unusable(key, NO_WINNER)
            record.used.add(key)
            return [1.0 if i == place else None for i in range(len(answers))]
    return None


def _may_be_order(merits: list[float]) -> bool:
    """Whether a ranking may also list the answers from the best on, and another would be best."""
    ranks = [-m for m in merits]
    if sorted(ranks) != [min(ranks) + i for i in range(len(ranks))]:
        return False
    return ranks.index(min(ranks)) != ranks[0] - min(ranks)


def _place(value: Any, answers: list[Any]) -> int | None:
    """The place of the answer that a number from 0, a letter or its own words point at."""
    number = number_of(value)
    if number is not None:
        place = int(number) if number.is_integer() else -1
        return place if 0 <= place < len(answers) else None
    same = [i for i, answer in enumerate(answers) if answer == value]
    if same:
        return same[0]
    word = str(value).strip().lower()
    found = _POINTER.fullmatch(word)
    place = ord(found[1]) - ord("a") if found and found[1].isalpha() else _ORDINALS.get(word, -1)
    return place if 0 <= place < len(answers) else None


def _flag(key: str) -> float:
    """1 where a list of this name says yes to good answers, -1 to bad ones, 0 if it is none."""
    for name in (key, key.removesuffix("s")):
        if name in field_names.GOOD or name in (*field_names.CHOSEN, "selected", "is_best", "best"):
            return 1.0
        if name in field_names.BAD or name in field_names.REJECTED:
            return -1.0
    return 0.0


def _merits(key: str, found: list[Any]) -> list[float] | None:
    """The merits that a list of this name gives; [] where they cannot be read, None where its
    name says nothing of merit."""
    plain = key.replace("-", "_").replace(" ", "_")
    sign = _SIGNS.get(plain.rsplit("_", 1)[-1].removesuffix("s"))
    if sign is None:
        sign = -1.0 if key in field_names.RANKS else 1.0 if key in field_names.SCORES else None
    if sign is not None:
        numbers = [number_of(v) for v in found]
        return [] if None in numbers else [sign * n for n in numbers if n is not None]
    if flag := _flag(plain):
        utterances = [says(v) for v in found]
        return [] if None in utterances else [flag if v else -flag for v in utterances]
    return None


def _merit(item: Any) -> float | None:
    """How good an answer is said to be; more is better."""
    if not isinstance(item, dict):
        return None
    lower = {str(k).lower(): v for k, v in item.items()}
    for key in field_names.RANKS:
        if (number := number_of(lower.get(key))) is not None:
            return -number
    for key in (*field_names.SCORES, "votes", "pm_score", "upvotes"):
        if (number := number_of(lower.get(key))) is not None:
            return number
    for names_, sign in (
        (field_names.GOOD, 1.0),
        (field_names.BAD, -1.0),
        (("selected", "is_best"), 1.0),
    ):
        for key in names_:
            if (utterances := says(lower.get(key))) is not None:
                return sign if utterances else -sign
    return None


def _text(item: Any, field: str) -> Any:
    """The words of one answer."""
    while isinstance(item, list) and len(item) == 1:  # [["answer"]], as some platforms have it
        item = item[0]
    if not isinstance(item, dict):
        return item
    lower = {str(k).lower(): v for k, v in item.items()}
    key = field_names.first(lower, _TEXTS)
    if key is None:
        raise Unusable(field, Message("{reason}: an object", reason=NOT_TEXT))
    return _text(lower[key], f"{field}.{key}")


def answer(value: Any, field: str, record: Record) -> Utterance:
    """The better answer, given as text, as a turn, or as a turn in a list."""
    if isinstance(value, dict):
        folded, _ = field_names.fold(value, record.note)
        words = field_names.first(folded, field_names.WORDS)
        if words is None:
            raise Unusable(field, Message("{reason}: an object", reason=NOT_TEXT))
        text, thought = joined(folded[words], f"{field}.{words}", record)
        own = field_names.first(folded, field_names.THOUGHTS)
        thought = thought if own is None else thinking(folded[own])
        return Utterance("assistant", text, f"{field}.{words}", thought=thought)
    return Utterance("assistant", value, field)
