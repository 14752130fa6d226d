"""Objects that hold the records of a file instead of being one.

    {"data": [{…}, …]}                    a list under any name; also two levels deep
    {"train": [{…}], "test": [{…}]}       train is read, the others are named
    {"q1": {…}, "q2": {…}}                records by their ids
    {"question": {"0": …}, "answer": …}   pandas: columns, as objects or lists
    {"columns": […], "data": [[…]]}       pandas: split; {"schema": …, "data": [{…}]}: table

One rule: where an object is not a record, the first thing in it that holds records is opened. Lists
and rows of split are streamed; columns and records by id are read whole, up to LIMIT.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from vicuna.data.conversation import Number, Problem, Raw
from vicuna.data.records import formats
from vicuna.data.records.field_names import ALL_TURN_LISTS
from vicuna.data.records.json_stream import DECODER, LIMIT, Window
from vicuna.data.records.reasons import BY_ID, COLUMNS, LIST_INSIDE, OTHER_LIST, SPLIT, shorten
from vicuna.data.records.text_stream import BLANK
from vicuna.data.records.turn_lists import looks_like_turns
from vicuna.messages import Message

_TRAIN = ("train", "training", "train_data", "training_data", "train_set", "data")
_TEST = ("test", "validation", "valid", "val", "dev", "eval", "test_data", "val_data", "test_set")
_MORE = 1 << 16  # elements looked at to see whether a list holds records


@dataclass
class Shape:
    """See `json_stream.Shape`. columns: names for the rows of a list of lists."""

    records: list[Raw] = field(default_factory=list)
    listed: bool = False
    columns: tuple[str, ...] = ()

    def row(self, value: str) -> str | dict[str, Any]:
        if not self.columns:
            return value
        row = json.loads(value, parse_int=Number, parse_float=Number)
        return dict(zip(self.columns, row)) if isinstance(row, list) else value

    def close(self, window: Window, problems: list[Problem]) -> None:
        """Pass the rest of the object; lists in it that are not read are named."""
        depth = 1
        while depth and (char := window.next()):
            if char == "}":
                depth -= 1
            elif char == "{":
                depth += 1
            elif char == '"':
                key = _decoded(window)
                if key is None:
                    return
                if window.next() == ":":
                    window.to(window.pos + 1)
                    if window.next() == "[":
                        words = f"{OTHER_LIST}: {shorten(str(key), 40)}"
                        problems.append(Problem(window.line, "", words, "warned"))
                        if not _pass(window):
                            return
                continue
            window.to(window.pos + 1)


def _decoded(window: Window) -> Any:
    """The small value that begins here, passed; None where it is broken."""
    found = _peek(window, window.pos)
    if found is None:
        return None
    window.to(window.pos + found[1] - window.pos)
    return found[0]


def _pass(window: Window) -> bool:
    """Pass the list that begins here, an element at a time."""
    window.to(window.pos + 1)
    while char := window.next():
        if char == "]":
            window.to(window.pos + 1)
            return True
        if char == ",":
            window.to(window.pos + 1)
        elif _decoded(window) is None and char != "n":
            return False
    return False


def _peek(window: Window, at: int) -> tuple[Any, int] | None:
    """The value at a place of the buffer and where it ends, more of the file read if needed.

    `at` counts from the window's position as it is now: `window.fill` moves the buffer.
    """
    offset = at - window.pos
    while True:
        try:
            value, end = DECODER.raw_decode(window.buf, window.pos + offset)
            if end < len(window.buf) or not window.more():
                return value, end
        except (json.JSONDecodeError, RecursionError):
            if not window.more():
                return None


def _blank(window: Window, offset: int) -> int:
    """The offset of the next character that is not blank; that of the end where there is none."""
    while True:
        at = window.pos + offset
        while at < len(window.buf) and window.buf[at] in BLANK:
            at += 1
        offset = at - window.pos
        if at < len(window.buf) or not window.more():
            return offset


def _char(window: Window, offset: int) -> str:
    at = window.pos + offset
    return window.buf[at] if at < len(window.buf) else ""


def open_shape(window: Window, problems: list[Problem]) -> Shape | None:
    """The records inside the object at the window's position.

    Returns: None where it is a record itself, or nothing that is known here; the window stays then.
    """
    line = window.line
    held: dict[str, Any] = {}
    offset = 1
    while True:
        offset = _blank(window, offset)
        char = _char(window, offset)
        if char == ",":
            offset += 1
            continue
        if char != '"':
            break  # the end of the object, or broken
        found = _peek(window, window.pos + offset)
        if found is None:
            return None
        key = str(found[0])
        offset = _blank(window, found[1] - window.pos)
        if _char(window, offset) != ":":
            return None
        offset = _blank(window, offset + 1)
        char = _char(window, offset)
        if not held and char == "{" and (shape := _by_id(window, offset, problems)):
            return shape
        if char == "[" and (shape := _list(window, offset, key, held, problems)):
            return shape
        found = _peek(window, window.pos + offset)
        if found is None:
            _say_too_large(window, line, problems)
            return None
        held[key] = found[0]
        offset = found[1] - window.pos
    if char != "}" or (formats.recognised(held) and not _columnar(held)):
        return None
    return _whole(window, offset, line, problems)


def _say_too_large(window: Window, line: int, problems: list[Problem]) -> None:
    if len(window.buf) - window.pos >= LIMIT:
        reason = Message("one object of more than 32 million characters (write one record a line)")
        problems.append(Problem(line, "", reason, "dropped"))


def _list(
    window: Window, offset: int, key: str, held: dict[str, Any], problems: list[Problem]
) -> Shape | None:
    """The list at `offset` opened, where its first element is a record or a row of split."""
    inside = _blank(window, offset + 1)
    char = _char(window, inside)
    columns: tuple[str, ...] = ()
    if char == "[":
        names = held.get("columns") or held.get("header") or held.get("fields")
        if _char(window, _blank(window, inside + 1)) == "{":  # conversations without names
            first = _peek(window, window.pos + inside)
            if first is not None and looks_like_turns(first[0]):
                return _opened(window, offset, key, held, problems)
        if key not in ("data", "rows", "values") or not isinstance(names, list):
            return None
        first = _peek(window, window.pos + inside)
        if first is None or not isinstance(first[0], list) or len(first[0]) != len(names):
            return None
        columns = tuple(map(str, names))
    elif char == "{":
        first = _peek(window, window.pos + inside)
        lower = key.strip().lower()
        if first is None or not formats.recognised(first[0]):
            return None
        if lower in ALL_TURN_LISTS and looks_like_turns([first[0]]):
            return None
        if lower not in ALL_TURN_LISTS and formats.recognised({**held, key: [first[0]]}):
            return None  # the object is a record, and this is a part of it
        if lower in _TEST:
            return None  # train may follow; if it does not, this is found when all is read
    else:
        return None
    return _opened(window, offset, key, held, problems, columns)


def _opened(
    window: Window,
    offset: int,
    key: str,
    held: dict[str, Any],
    problems: list[Problem],
    columns: tuple[str, ...] = (),
) -> Shape:
    words = SPLIT if columns else f"{LIST_INSIDE}: {shorten(key, 40)}"
    problems.append(Problem(window.line, "", words, "warned"))
    for other, value in held.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            words = f"{OTHER_LIST}: {shorten(other, 40)}"
            problems.append(Problem(window.line, "", words, "warned"))
    window.to(window.pos + offset + 1)
    return Shape(listed=True, columns=columns)


def _by_id(window: Window, offset: int, problems: list[Problem]) -> Shape | None:
    """Records under their ids: the values are records, and the whole is none."""
    start = window.pos + offset
    first = _peek(window, start)
    if first is None or not isinstance(first[0], dict) or not formats.recognised(first[0]):
        return None
    # A record may hold a record-like object; by id, all values are.
    whole = _peek(window, window.pos)
    if whole is None or not isinstance(whole[0], dict):
        return None
    values = list(whole[0].values())
    alike = sum(isinstance(v, dict) and formats.recognised(v) for v in values[:_MORE])
    if len(values) < 2 or alike < 0.5 * len(values[:_MORE]) or formats.recognised(whole[0]):
        return None
    records = []
    line = window.line
    at, end = window.pos + 1, whole[1]
    for key in whole[0]:
        # Each value's own text, so that its numbers stay as they were written.
        opening = window.buf.index(":", DECODER.raw_decode(window.buf, _skip(window.buf, at))[1])
        begin = _skip(window.buf, opening + 1)
        _, stop = DECODER.raw_decode(window.buf, begin)
        number = line + window.buf.count("\n", window.pos, begin)
        records.append(Raw(number, window.buf[begin:stop]))
        at = stop
        del key
    problems.append(Problem(line, "", BY_ID, "warned"))
    window.to(end)
    return Shape(records)


def _skip(buf: str, at: int) -> int:
    while at < len(buf) and (buf[at] in BLANK or buf[at] == ","):
        at += 1
    return at


def _whole(window: Window, offset: int, line: int, problems: list[Problem]) -> Shape | None:
    """An object read whole: columns, or a list deeper inside."""
    text = window.buf[window.pos : window.pos + offset + 1]
    value = json.loads(text, parse_int=Number, parse_float=Number, strict=False)
    words: str = COLUMNS
    records = _from_columns(value) or _from_split(value)
    if not records:
        name, records = _inside(value, 3)
        words = f"{LIST_INSIDE}: {shorten(name, 40)}"
    if not records:
        return None
    problems.append(Problem(line, "", words, "warned"))
    window.to(window.pos + offset + 1)
    return Shape([Raw(line, record) for record in records])


def _columnar(value: dict[str, Any]) -> bool:
    """Whether each value is a column: an object from row to cell, or a list of cells.

    A record of the chat format has lists, too: questions and answers.
    """
    columns = list(value.values())
    if len(columns) < 2:
        return False
    if all(isinstance(c, dict) and c for c in columns):
        rows = list(columns[0])
        return all(list(c) == rows for c in columns) and all(r.isdigit() for r in rows)
    lower = {key.strip().lower() for key in value}
    if "input" in lower and "output" in lower and "instruction" not in lower:
        return False
    if not all(isinstance(c, list) and len(c) == len(columns[0]) > 0 for c in columns):
        return False
    return formats.recognised({name: c[0] for name, c in value.items()})


def _from_columns(value: dict[str, Any]) -> list[dict[str, Any]]:
    columns = list(value.values())
    if columns and all(isinstance(c, dict) and c for c in columns):
        rows = list(dict.fromkeys(row for c in columns for row in c))
        made = [{name: c.get(row) for name, c in value.items()} for row in rows]
    elif len(columns) > 1 and all(isinstance(c, list) for c in columns):
        if len({len(c) for c in columns}) != 1 or not columns[0]:
            return []
        made = [dict(zip(value, cells)) for cells in zip(*columns)]
    else:
        return []
    return made if formats.recognised(made[0]) else []


def _from_split(value: dict[str, Any]) -> list[dict[str, Any]]:
    """pandas' split whose rows stand before the names of their columns."""
    names, rows = value.get("columns"), value.get("data") or value.get("rows")
    if not isinstance(names, list) or not isinstance(rows, list):
        return []
    return [dict(zip(map(str, names), row)) for row in rows if isinstance(row, list)]


def _inside(value: Any, depth: int) -> tuple[str, list[dict[str, Any]]]:
    """The first list of records deeper inside, train before others, and where it stands."""
    if not isinstance(value, dict) or not depth:
        return "", []
    for key in sorted(value, key=lambda k: (k.lower() not in _TRAIN, k.lower() in _TEST)):
        inner = value[key]
        objects = isinstance(inner, list) and inner and isinstance(inner[0], dict)
        if objects and formats.recognised(inner[0]):
            return key, inner
        name, found = _inside(inner, depth - 1)
        if not found and isinstance(inner, dict):
            name, found = "", _from_columns(inner) or _from_split(inner)
        if found:
            return f"{key}.{name}".rstrip("."), found
    return "", []
