"""The questions of a file: its records up to where an answer belongs, whether one stands there or
not. Formats are those of training data, because the same code reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vicuna.data.conversation import Problem, Raw, Turn
from vicuna.data.records.formats import parse
from vicuna.data.records.read_file import read
from vicuna.data.records.reasons import OPEN_QUESTION
from vicuna.messages import Message

# Put where an answer is missing, so that the record parses as training data; never seen by a model.
_STAND_IN = "the answer"
_TURN_LISTS = ("messages", "conversations", "conversation")
_ANSWERS = (
    "output",
    "response",
    "completion",
    "answer",
    "target",
    "chosen",
    "答案",
    "回答",
    "输出",
)


class Question(NamedTuple):
    """A record and what it asks.

    given: the record as an object, a plain line as {"instruction": line}.
    turns: up to and with the last question; empty where the record asks nothing.
    reason: why it asks nothing.
    """

    line: int
    given: dict[str, Any]
    turns: list[Turn]
    reason: str = ""


def questions(path: Path, problems: list[Problem]) -> Iterator[Question]:
    """Every record of a file that can be read; `problems` takes the others."""
    plain = path.name.lower().removesuffix(".gz").endswith(".txt")
    for raw in read(path, problems):
        if plain and isinstance(raw.value, dict):  # a paragraph: its lines are the questions
            for i, line in enumerate(raw.value["text"].split("\n")):
                yield question(Raw(raw.line + i, {"instruction": line.strip()}))
        else:
            yield question(raw)


def question(raw: Raw) -> Question:
    """What one record asks."""
    given = raw.value
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as e:
            if given.startswith(("{", "[")):
                return Question(
                    raw.line, {"record": given}, [], Message("not valid JSON: {error}", error=e)
                )
    if isinstance(given, list):
        given = {"messages": given}
    if not isinstance(given, dict):
        given = {"instruction": str(given)}
    parsed = parse(Raw(raw.line, _answered(given)))
    turns = parsed.conversation.turns if parsed.conversation else []
    if parsed.conversation and parsed.conversation.kind == "text":
        return Question(raw.line, given, [Turn("user", turns[0].text)])
    # Where something before the end was left out, the last question is not the one asked.
    gap = any(p.reason.startswith(OPEN_QUESTION) for p in parsed.problems)
    if gap or not turns or not turns[-1].text.endswith(_STAND_IN):
        reason = "; ".join(f"{p.field}: {p.reason}".removeprefix(": ") for p in parsed.problems)
        return Question(raw.line, given, [], reason)
    return Question(raw.line, given, turns[:-1])


def _answered(given: dict[str, Any]) -> dict[str, Any]:
    """The record with an answer to its last question, in place of the one it may have."""
    for key in _TURN_LISTS:
        if isinstance(given.get(key), list) and given[key]:
            # Behind an answer that is there, the two merge into one.
            return {**given, key: [*given[key], _turn_like(given[key][-1])]}
    if isinstance(given.get("input"), list):
        answers = given.get("output")
        before = answers[: len(given["input"]) - 1] if isinstance(answers, list) else []
        return {**given, "output": [*before, _STAND_IN]}
    present = [key for key in _ANSWERS if key in given]
    return {**given, **dict.fromkeys(present or ["output"], _STAND_IN)}


def _turn_like(item: Any) -> dict[str, str]:
    if isinstance(item, dict) and "from" in item:
        return {"from": "assistant", "value": _STAND_IN}
    return {"role": "assistant", "content": _STAND_IN}
