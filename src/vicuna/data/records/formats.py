"""One raw record to one conversation, whatever format it is in.

The record's own keys decide, record by record, so a file may mix them:

    alpaca      {instruction, input, output}
    chat        {input: [questions], output: [answers]}: the 2023 project's
    history     {history: [{input, output} | [question, answer] ...], input, output}; saved chats
    sharegpt    {conversations: [{from, value} ...]} and its many relatives
    messages    {messages: [{role, content} ...]}: OpenAI's
    pair        {prompt, response}, {question, answer} ... under their usual names
    preference  {prompt, chosen, rejected} and its relatives: the better answer is taught
    dialogue    a dialogue in one text: "Human: … Assistant: …"
    moss, chatgpt, oasst: what these projects publish (`chat_exports.py`)
    text        {text}: continued pre-training
    unknown     anything else; dropped

Nothing is dropped or changed without a `Problem`, and no key is ignored silently: a reader marks
the keys it uses (`record.py`), `loss_flags.py` honours those that change what a record means, and
the rest is in `Parsed.unused`. Names are in `field_names.py`, rules for single strings in
`clean.py`, rules for the order of turns in `turn_order.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from vicuna.data.conversation import Action, Conversation, Parsed, Problem, Raw, Turn
from vicuna.data.records import chat_exports, format_readers, loss_flags, preferences, turn_lists
from vicuna.data.records import columns as own_columns
from vicuna.data.records.clean import clean
from vicuna.data.records.columns import Columns
from vicuna.data.records.field_names import (
    ALL_TURN_LISTS,
    ANSWERS,
    HARMLESS,
    PLAIN_QUESTIONS,
    first,
    fold,
)
from vicuna.data.records.parse_values import kind, parse_json, parse_list, printed
from vicuna.data.records.reasons import (
    EMPTY_TEXT,
    INSIDE,
    NO_TEXT,
    UNKNOWN_FORMAT,
    WRAPPED,
    Note,
    Unusable,
    shorten,
)
from vicuna.data.records.record import Record
from vicuna.data.records.turn_lists import as_list, looks_like_turns, pair_keys
from vicuna.data.records.turn_order import (
    Utterance,
    ordered_turns,
)
from vicuna.messages import Message

__all__ = ["parse", "recognised"]

_READERS: dict[str, Callable[[Record], Iterable[Utterance]]] = {
    "alpaca": format_readers.alpaca,
    "chat": format_readers.chat,
    "history": format_readers.history,
    "sharegpt": format_readers.turn_list,
    "messages": format_readers.turn_list,
    "pair": format_readers.pair,
    "preference": format_readers.preference,
    "dialogue": format_readers.dialogue,
    "moss": chat_exports.moss,
    "chatgpt": chat_exports.tree,
    "oasst": chat_exports.assistant_tree,
}
# A record of these keys alone has no flags.
_PLAIN = frozenset(("instruction", "input", "output", "conversations", "messages", "id"))
_ALPACA = frozenset(("instruction", "input", "output", "id"))
# Without any of these a record is of no format that needs a second look.
_SPECIAL = frozenset(
    (
        *chat_exports.KEYS,
        *preferences.KEYS,
        *ALL_TURN_LISTS - {"conversations", "messages"},
        "prompt",
    )
)


def parse(raw: Raw, columns: Columns = ()) -> Parsed:
    """What a record becomes; a bad one is dropped with a reason, nothing is ever raised.

    Args:
        columns: which of the record's own keys stand for which of ours (`columns.py`).
    """
    problems: list[Problem] = []

    def note(field: str, reason: str, action: Action) -> None:
        problems.append(_problem(raw.line, field, reason, action))

    name = "unknown"
    try:
        record = _object(raw.value, note, columns)
        name = _detect(record.values)
        if name == "unknown":
            record = _inside(record)
            name = _detect(record.values)
        if name == "unknown":
            raise _unknown(record.values)
        if name == "text":
            turns = _text(record)
            loss_flags.apply_record_flags(record, [])
            conversation = Conversation(turns, raw.line, "text")
        else:
            utterances = list(_READERS[name](record))
            merit = None
            if not _PLAIN.issuperset(record.values):
                utterances = loss_flags.apply_record_flags(record, utterances)
                merit = loss_flags.merit(record.values)
            conversation = Conversation(ordered_turns(utterances, note), raw.line, "chat", merit)
    except Unusable as e:
        return Parsed(None, name, [_problem(raw.line, e.field, e.reason, "dropped")])
    unused = () if name == "alpaca" and _ALPACA.issuperset(record.values) else record.unused()
    return Parsed(conversation, name, problems, tuple(map(_printable, unused)) if unused else ())


def recognised(value: Any) -> bool:
    """Whether this is a record of a format that is known here."""
    try:
        record = _object(value, _silent, ())
        name = _detect(record.values)
        return name != "unknown" or _detect(_inside(record).values) != "unknown"
    except Unusable:
        return False


def _silent(field: str, reason: str, action: Action) -> None:
    pass


def _problem(line: int, field: str, reason: str, action: Action) -> Problem:
    return Problem(line, _printable(field), _printable(reason), action)


def _printable(words: str) -> str:
    """Keys and role names come from the data: they must not break a log or a table."""
    if words.isascii() and words.isprintable():
        return words
    if isinstance(words, Message):
        return words.cleaned(_printable)
    return " ".join(words.encode("utf-8", "backslashreplace").decode().split())


# From JSON to an object with known names


def _object(value: Any, note: Note, columns: Columns) -> Record:
    """The record as an object whose keys are spelt as we know them."""
    if isinstance(value, str):
        value = parse_json(value, note)
    wrapped = 0
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
        wrapped += 1
    if isinstance(value, list) and looks_like_turns(value):
        return Record({"messages": value}, note, {})
    if not isinstance(value, dict):
        raise Unusable(
            "",
            Message(
                "{reason}: {type} where an object belongs", reason=UNKNOWN_FORMAT, type=kind(value)
            ),
        )
    if wrapped:
        note("[0]", WRAPPED, "repaired")
    if columns:
        value = own_columns.rename(value, columns)
    values, spelt = fold(value, note)
    return Record(values, note, spelt)


def _inside(record: Record) -> Record:
    """The record that stands in one field: {"id": 1, "data": {…}}, or a table's cell."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in record.values.items():
        if isinstance(value, str) and value[:1] == "{":
            parsed = parse_list(value)
            value = parsed if parsed is not None else printed(value)
        elif isinstance(value, str) and value[:1] == "[":
            turns = as_list(value)
            value = {"messages": turns} if looks_like_turns(turns) else None
        elif looks_like_turns(value):
            value = {"messages": value}
        if isinstance(value, dict) and len(value) < 1000:
            folded, _ = fold(value, _silent)
            if _detect(folded) not in ("unknown", "text"):
                found[key] = folded
    if len(found) != 1:
        return record
    ((key, inner),) = found.items()
    record.note(record.spelt.get(key, key), INSIDE, "repaired")
    outer = {k: v for k, v in record.values.items() if k != key and k not in inner}
    return Record({**outer, **inner}, record.note, record.spelt)


# Which format


def _detect(r: dict[str, Any]) -> str:
    """The format's name, by the keys."""
    if "instruction" in r and "output" in r and _ALPACA.issuperset(r) and r["instruction"]:
        return "alpaca"  # the plainest, and most of them
    if not _SPECIAL.isdisjoint(r) and (name := _special(r)):
        return name
    turns = turn_lists.turns_key(r) if turn_lists.has_turns(r) else None
    if turns:
        return "messages" if turns == "messages" else "sharegpt"
    if "history" in r and as_list(r["history"]):
        return "history"
    lists = isinstance(r.get("input"), list) or isinstance(r.get("output"), list)
    if "input" in r and lists and not r.get("instruction"):
        return "chat"
    if "instruction" in r and ("output" in r or not first(r, ANSWERS)):
        if "output" not in r and preferences.list_key(r):
            return "preference"
        return "alpaca"
    if pair_keys(r) != (None, None):
        return "pair"
    if format_readers.dialogue_key(r):
        return "dialogue"
    if first(r, PLAIN_QUESTIONS) and preferences.list_key(r):
        return "preference"
    if "text" in r:
        return "text"
    if first(r, PLAIN_QUESTIONS):
        return "pair"
    return "history" if "history" in r else "unknown"


def _special(r: dict[str, Any]) -> str | None:
    if chat_exports.refusal(r):
        return "unknown"
    if chat_exports.is_tree(r):
        return "chatgpt"
    if chat_exports.is_moss(r):
        return "moss"
    if chat_exports.is_assistant_tree(r):
        return "oasst"
    if preferences.chosen_key(r) or preferences.two_keys(r):
        return "preference"
    return None


def _unknown(r: dict[str, Any]) -> Unusable:
    names = shorten(", ".join(k for k in map(str, r) if k not in HARMLESS or len(r) < 3), 60)
    return Unusable(names, chat_exports.refusal(r) or UNKNOWN_FORMAT)


def _text(record: Record) -> list[Turn]:
    text = clean(record.take("text"), "text", record.note)
    if not text:
        raise Unusable("text", NO_TEXT if text is None else EMPTY_TEXT)
    return [Turn("assistant", text)]
