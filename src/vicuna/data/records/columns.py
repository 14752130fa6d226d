"""A table's own headers for ours: `columns: {instruction: 问题, output: 答案}` of a data set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from vicuna.data.conversation import Raw
from vicuna.data.records import field_names, preferences
from vicuna.data.records.parse_values import parse_json
from vicuna.data.records.reasons import Unusable
from vicuna.errors import UserError
from vicuna.messages import Message

# (our name, the file's own), sorted; a tuple, because it is part of a cache's key.
Columns = tuple[tuple[str, str], ...]

# Under one of these, or a list of turns, a record has its answer.
_ANSWERING = {
    *field_names.ANSWERS,
    *field_names.CHOSEN,
    *field_names.ALL_TURN_LISTS,
    *field_names.OPTION_ANSWERS,
    "history",
}
_ANSWERING |= {*preferences.KEYS, *preferences.LISTS, "content"}
# A prompt may be a whole dialogue in one text.
_ASKING = [n for n in ("instruction", *field_names.QUESTIONS) if n != "prompt"]
LOOKED_AT = 200  # records that a column must show itself in


def rename(value: dict[str, Any], columns: Columns) -> dict[str, Any]:
    """The record with its own keys under our names; a key that ours replaces is kept apart."""
    stripped = {str(k).strip(): v for k, v in value.items()}
    ours = {name: stripped[own] for name, own in columns if own in stripped}
    owned = {own for _, own in columns}
    rest = {
        (Message("{key} (the file's own)", key=key) if key.lower() in ours else key): v
        for key, v in stripped.items()
        if key not in owned
    }
    return {**ours, **rest}


def settled(given: Mapping[str, str]) -> Columns:
    """What a recipe or the command line gave, checked.

    Raises: UserError where a name is none that records have here.
    """
    for name in given:
        if name.strip().lower() not in field_names.KNOWN:
            near = get_close_matches(name.lower(), sorted(field_names.KNOWN), n=1)
            raise UserError(
                "columns.{name}: no format has this name",
                name=name,
                hint=Message("Did you mean columns.{near}? ", near=near[0]) if near else "",
                where="dataset",
                fix="{hint}Usual ones: instruction, input, output, system, messages, text "
                "(docs/data.md).",
            )
    return tuple(sorted((n.strip().lower(), own.strip()) for n, own in given.items()))


def check(path: Path, columns: Columns, seen: Sequence[str]) -> None:
    """Look whether a file whose records have these keys has the columns that were named.

    Raises: UserError with the nearest header where one is missing.
    """
    for name, own in columns:
        if seen and own not in seen:
            near = get_close_matches(own, seen, n=1, cutoff=0.3)
            listed = ", ".join(seen[:12]) + (" ..." if len(seen) > 12 else "")
            raise UserError(
                "columns.{name}: there is no column {column!r} in it",
                name=name,
                column=own,
                hint=Message("Did you mean {near}? ", near=near[0]) if near else "",
                names=listed,
                where=str(path),
                fix="{hint}It has: {names}.",
            )
    _check_answer(path, columns, seen)


def _check_answer(path: Path, columns: Columns, seen: Sequence[str]) -> None:
    """Raises: UserError where a question was named and nothing in the file can be its answer."""
    named = dict(columns)
    asked = next((n for n in _ASKING if n in named), None)
    known = {*named, *(own.lower() for own in seen if own not in named.values())}
    if not seen or asked is None or not known.isdisjoint(_ANSWERING):
        return
    left = [own for own in seen if own not in named.values()]
    raise UserError(
        "columns.{asked} is named and columns.output is missing: there is no answer",
        asked=asked,
        path=path,
        name=named[asked],
        left=left[0] if left else "...",
        where=str(path),
        fix="Name the column of the answers too: "
        "{path}@columns.{asked}={name},columns.output={left}",
    )


def keys_of(records: Iterable[Raw]) -> list[str]:
    """The keys that the first records of a file have."""
    seen: dict[str, None] = {}
    for raw in islice(records, LOOKED_AT):
        value: Any = raw.value
        try:
            value = parse_json(value, lambda *_: None) if isinstance(value, str) else value
        except Unusable:
            continue
        if isinstance(value, dict):
            seen.update(dict.fromkeys(str(k).strip() for k in value))
    return list(seen)
