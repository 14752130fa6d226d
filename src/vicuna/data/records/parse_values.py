"""The value of a JSON text, or of one that Python, numpy or pandas printed: {'a': None}."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable
from typing import Any

from vicuna.data.conversation import Number
from vicuna.data.records.reasons import BROKEN_JSON, DUPLICATE_KEY, PYTHON, Note, Unusable, shorten
from vicuna.messages import Message


class _DuplicateKey(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise _DuplicateKey
    return made


def _constant(name: str) -> Number | None:
    return None if name == "NaN" else Number(name)


def _decoder(hook: Callable[[list[tuple[str, Any]]], Any]) -> json.JSONDecoder:
    return json.JSONDecoder(
        object_pairs_hook=hook, parse_int=Number, parse_float=Number, parse_constant=_constant
    )


_FAST = _decoder(_unique)
# The value that begins at a place, without looking for blanks around it.
_SCAN = _FAST.scan_once  # type: ignore[attr-defined]


def parse_json(text: str, note: Note) -> Any:
    """The value of JSON text, its numbers as they were written.

    Of a key that stands twice in an object the last value is kept, and that is noted. Such a record
    is rare, so only then is the text read again, to name the key.

    Raises: Unusable where it is not JSON.
    """
    try:
        value, end = _SCAN(text, 0)
        if end == len(text):
            return value
    except (StopIteration, ValueError, RecursionError, _DuplicateKey):
        pass  # said below
    try:
        try:
            return _FAST.decode(text)
        except _DuplicateKey:
            return _decoder(lambda pairs: _keep_last(pairs, note)).decode(text)
    except json.JSONDecodeError as e:
        if _PRINTED.match(text) and (value := printed(text)) is not None:
            note("", PYTHON, "repaired")
            return value
        words = e.msg.removesuffix(": ")
        raise Unusable(
            "",
            Message(
                "{reason}: {details} (character {pos})",
                reason=BROKEN_JSON,
                details=words,
                pos=e.pos + 1,
            ),
        ) from None
    except RecursionError:
        raise Unusable("", Message("{reason}: nested too deeply", reason=BROKEN_JSON)) from None


_PRINTED = re.compile(r"[\[{\s]+'")


def _keep_last(pairs: list[tuple[str, Any]], note: Note) -> dict[str, Any]:
    made: dict[str, Any] = {}
    twice: dict[str, None] = {}
    for key, value in pairs:
        if key in made:
            twice[key] = None
        made[key] = value
    for key in twice:
        note(shorten(key), DUPLICATE_KEY, "repaired")
    return made


def parse_list(text: str) -> Any:
    """The value of a table's cell that holds a list as JSON text; None where it is not JSON."""
    try:
        return _FAST.decode(text)
    except (ValueError, RecursionError, _DuplicateKey):
        return None


def kind(value: Any) -> str:
    """What JSON calls a value."""
    known = {
        bool: Message("true or false"),
        list: Message("a list"),
        tuple: Message("a list"),
        dict: Message("an object"),
    }
    known |= {
        str: Message("a text"),
        Number: Message("a number"),
        int: Message("a number"),
        float: Message("a number"),
    }
    return "null" if value is None else known.get(type(value), type(value).__name__)


LIMIT = 1 << 20  # characters; a parser of Python needs much memory for each
_ARRAY = re.compile(r"\barray\(\s*|,?\s*dtype=[\w.<>']+\s*\)")
_NAN = re.compile(r"(?<=[:,\[]) *(?:nan|NaN|NaT|<NA>)(?= *[,}\]])")
# numpy puts no comma between the elements of an array.
_GAP = re.compile(r"(?<=[}\]])(\s+)(?=[{\[])")


def printed(text: str) -> Any:
    """The value of a text that Python printed; None where it is none."""
    if len(text) > LIMIT:
        return None
    for form in (
        text,
        _NAN.sub("None", text),
        _GAP.sub(",", _ARRAY.sub("", _NAN.sub("None", text))),
    ):
        try:
            with warnings.catch_warnings():  # of odd backslashes, which are the data's business
                warnings.simplefilter("ignore")
                value = ast.literal_eval(form.strip())
            return _plain(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
    return None


def _plain(value: Any) -> Any:
    """Only what JSON could hold, numbers as `Number`."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return Number(value)
    if value is None or isinstance(value, (bool, str)):
        return value
    raise ValueError(f"{type(value).__name__} is no JSON")
