"""Multiple choice: the options belong to the question.

They stand under it, one a line, as `A. …`; where the question has them already nothing is added.
An answer that is a number becomes the option's letter, counted from 0; a letter or a text stays.
"""

from __future__ import annotations

import re
from typing import Any

from vicuna.data.records import field_names
from vicuna.data.records.parse_values import parse_list
from vicuna.data.records.reasons import NO_SUCH_OPTION, OPTION_NUMBER, Unusable
from vicuna.data.records.record import Record, number_of
from vicuna.messages import Message

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_KEY = re.compile(r"(?:option|choice|opt|op|选项|选择)?[_ ]?([a-h1-8])(?:选项)?")
_MARKED = re.compile(r"\s*[(（\[]?([A-Za-z]|\d{1,2})\s*[.．、:：)）\]]")

Options = list[tuple[str, str]]  # (letter, text)


def take(record: Record) -> Options:
    """The options of a record, marked as used; [] where it has none."""
    values = record.values
    for key in field_names.OPTIONS:
        if key in values and (found := _options(values[key])):
            record.used.add(key)
            return found
    return _spread(record)


def _options(value: Any) -> Options:
    if isinstance(value, str) and value[:1] in "[{":
        value = parse_list(value)
    if isinstance(value, dict):
        labels, texts = value.get("label"), value.get("text")
        if isinstance(labels, list) and isinstance(texts, list):
            return _texts(list(zip(map(str, labels), texts)))
        return _texts([(str(k).strip(), v) for k, v in value.items()])
    if not isinstance(value, list) or not 2 <= len(value) <= len(LETTERS):
        return []
    found: list[tuple[str, Any]] = []
    for letter, item in zip(LETTERS, value):
        if isinstance(item, dict):
            label = next((item[k] for k in ("label", "key", "id", "option") if k in item), letter)
            text = next((item[k] for k in ("text", "content", "value") if k in item), None)
            found.append((str(label), text))
        else:
            found.append((letter, item))
    return _texts(found)


def _texts(found: list[tuple[str, Any]]) -> Options:
    """Options whose text is one; [] where something else stands among them."""
    filled = [(label, text) for label, text in found if not field_names.empty(text)]
    if len(filled) < 2 or not all(isinstance(t, (str, int, float)) for _, t in filled):
        return []
    if any(len(label) > 2 for label, _ in filled):
        return []
    return [(label, str(text).strip()) for label, text in filled]


def _spread(record: Record) -> Options:
    """Options under keys of their own: A, B …, option_a …, opa …, choice1 …."""
    found: dict[str, tuple[str, Any]] = {}
    for key, value in record.values.items():
        match = _KEY.fullmatch(key) if key not in record.used else None
        if match and not field_names.empty(value) and isinstance(value, (str, int, float)):
            label = match[1].upper()
            found.setdefault(LETTERS[int(label) - 1] if label.isdigit() else label, (key, value))
    if not {"A", "B"} <= found.keys():
        return []
    record.used.update(key for key, _ in found.values())
    return [(label, str(found[label][1]).strip()) for label in sorted(found)]


def asked(question: Any, options: Options) -> Any:
    """The question with its options below it, unless it has them already."""
    words = question if isinstance(question, str) else "" if question is None else str(question)
    if all(text in words for _, text in options):
        return question
    lines = [text if _MARKED.match(text) else f"{label}. {text}" for label, text in options]
    return "\n".join([words.rstrip(), *lines]).strip()


def answer(record: Record, key: str | None, options: Options) -> Any:
    """The answer as it is taught: a letter or a text as it stands, a number as its letter.

    Raises: Unusable where no option has that number.
    """
    value = record.take(key)
    other = field_names.first(record.values, field_names.OPTION_ANSWERS)
    if field_names.empty(value):
        value, key = record.take(other), other or key
    elif other:
        record.used.add(other)  # it names the same option
    if isinstance(value, (list, tuple)) and value:
        parts = [_letter(v, key, options, record) for v in value]
        joiner = "" if all(isinstance(p, str) and len(p) == 1 for p in parts) else "\n"
        return joiner.join(map(str, parts))
    return _letter(value, key, options, record)


def _letter(value: Any, key: str | None, options: Options, record: Record) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return value
    if type(value) is str and not value.strip().isdecimal():
        return value
    labels = [label for label, _ in options]
    texts = [text for _, text in options]
    if str(value) in texts or str(value) in labels:
        return str(value)
    found = number_of(value)
    number = int(found) if found is not None and found.is_integer() else -1
    if not 0 <= number < len(options):
        raise Unusable(
            key or "answer",
            Message(
                "{reason}: {value} of {count}",
                reason=NO_SUCH_OPTION,
                value=value,
                count=len(options),
            ),
        )
    record.note(
        key or "answer",
        Message(
            "{reason}: {value} is {label}", reason=OPTION_NUMBER, value=value, label=labels[number]
        ),
        "repaired",
    )
    return labels[number]
