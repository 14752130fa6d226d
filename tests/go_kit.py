"""Enough of Go's text/template to read what `template_text.go` writes."""

from __future__ import annotations

import json
import re
from typing import Any

_ACTION = re.compile(r"\{\{-?\s*(.*?)\s*-?\}\}", re.S)


def render(text: str, messages: list[tuple[str, str]]) -> str:
    """A template over messages (role, content)."""
    # Every action here trims the space around it, or stands beside another one.
    nodes, _ = _parse([m[1] for m in _ACTION.finditer(text)], 0)
    out: list[str] = []
    _run(nodes, {"messages": messages}, out)
    return "".join(out)


def _parse(actions: list[str], at: int) -> tuple[list[Any], int]:
    nodes: list[Any] = []
    while at < len(actions):
        action = actions[at]
        at += 1
        if action == "end" or action.startswith("else"):
            return nodes, at - 1
        if action.startswith("range"):
            inner, at = _parse(actions, at)
            nodes.append(("range", inner))
            at += 1
        elif action.startswith("if "):
            branches = []
            condition = action[3:]
            while True:
                inner, at = _parse(actions, at)
                branches.append((condition, inner))
                word = actions[at]
                at += 1
                if word == "end":
                    break
                condition = word.removeprefix("else").strip().removeprefix("if ").strip()
            nodes.append(("if", branches))
        else:
            nodes.append(("do", action))
    return nodes, at


def _run(nodes: list[Any], scope: dict[str, Any], out: list[str]) -> None:
    for kind, body in nodes:
        if kind == "range":
            for i, message in enumerate(scope["messages"]):
                _run(body, {**scope, "$i": i, "$turn": message}, out)
        elif kind == "if":
            for condition, inner in body:
                if not condition or _value(condition, scope):
                    _run(inner, scope, out)
                    break
        elif ":=" in body:
            name, _, value = body.partition(":=")
            scope[name.strip()] = _value(value.strip(), scope)
        else:
            out.append(str(_value(body, scope)))


def _value(text: str, scope: dict[str, Any]) -> Any:
    words = re.findall(r'"(?:[^"\\]|\\.)*"|\(|\)[.\w]*|[^\s()]+', text)
    value, rest = _call(words, scope)
    assert not rest, rest
    return value


def _call(words: list[str], scope: dict[str, Any]) -> tuple[Any, list[str]]:
    values: list[Any] = []
    while words and not words[0].startswith(")"):
        word, words = words[0], words[1:]
        if word == "(":
            value, words = _call(words, scope)
            field, words = words[0][1:], words[1:]
            values.append(_field(value, field))
        else:
            values.append(_atom(word, scope))
    if callable(values[0]):
        return values[0](*values[1:]), words
    assert len(values) == 1, values
    return values[0], words


def _atom(word: str, scope: dict[str, Any]) -> Any:
    functions = {
        "eq": lambda a, b: a == b, "or": lambda a, b: a or b, "and": lambda a, b: a and b,
        "not": lambda a: not a, "len": len, "slice": lambda x, i: x[i:],
        "index": lambda x, i: x[i],
    }  # fmt: skip
    if word in functions:
        return functions[word]
    if word.startswith('"'):
        return json.loads(word)
    if word.isdigit():
        return int(word)
    if word in (".Messages", "$.Messages"):
        return scope["messages"]
    name, _, field = word.partition(".")
    return _field(scope[name], f".{field}" if field else "")


def _field(value: Any, field: str) -> Any:
    return value[{".Role": 0, ".Content": 1}[field]] if field else value
