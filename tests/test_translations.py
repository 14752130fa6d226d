"""Every message that the page can meet has Chinese, with the same fields. The code is walked over."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from string import Formatter

import pytest

from test_floors import imports, modules
from vicuna.i18n.translate import catalogue

# The page runs these commands in processes of their own, and shows what they say.
ROOTS = ("web", "commands.train", "commands.plan")
SAID_BY = {"Message", "UserError", "warn", "Problem", "note", "drop_used", "Unusable"}
KNOWN = catalogue("zh")


def literals(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.IfExp):
        yield from literals(node.body)
        yield from literals(node.orelse)
    elif isinstance(node, ast.List):
        for item in node.elts:
            yield from literals(item)


def said(path: Path) -> Iterator[tuple[str, set[str], int]]:
    """(template, fields of the call, line) of every message in a file."""
    source = path.read_text(encoding="utf-8")
    others = {"Message"} - set(
        re.findall(r"^from vicuna.messages import .*(Message)", source, re.M)
    )
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        fields = {k.arg for k in node.keywords if k.arg} - {"where", "fix"}
        if any(k.arg is None for k in node.keywords):  # **fields: nobody can tell here
            fields = set()
        if name in SAID_BY - others or (name == "SettingsError" and node.args):
            texts = node.args[:1] if name in ("Message", "UserError") else node.args
            for text in [*texts, *(k.value for k in node.keywords if k.arg == "fix")]:
                for template in literals(text):
                    words = re.sub(r"\{[^{}]*\}", "", template)
                    if " " in template or (name == "Message" and re.search("[a-z]{2}", words)):
                        yield template, fields, node.lineno


def met() -> set[str]:
    """The modules that the page imports, directly or not, and its commands."""
    known = modules()
    reached: set[str] = set()
    ahead = [m for m in known if m.startswith(ROOTS)]
    while ahead:
        module = ahead.pop()
        if module not in reached:
            reached.add(module)
            ahead += imports(known[module], known)
    return reached


def places(template: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(template) if name}


@pytest.mark.parametrize("module", sorted(met()))
def test_every_message_that_the_page_can_meet_has_chinese(module: str) -> None:
    missing = [
        template
        for template, fields, _ in said(modules()[module])
        if template not in KNOWN and re.search("[a-z]{2}", re.sub(r"\{\w+\}", "", template))
    ]
    assert missing == []


def test_a_message_and_its_chinese_have_the_same_fields() -> None:
    odd = {en: zh for en, zh in KNOWN.items() if places(en) != places(zh)}
    assert odd == {}


def test_no_english_is_left_in_chinese() -> None:
    assert [zh for zh in KNOWN.values() if "「" in zh] == []


def test_every_place_of_a_message_has_its_field() -> None:
    odd = [
        f"{name}:{line} {template}"
        for name, path in modules().items()
        for template, fields, line in said(path)
        if fields and not places(template) <= fields
    ]
    assert odd == []


def test_nothing_is_translated_that_nobody_says() -> None:
    every = {template for path in modules().values() for template, _, _ in said(path)}
    assert KNOWN.keys() - every == set()


def test_messages_are_templates_and_not_f_strings() -> None:
    odd = [
        f"{name}:{node.lineno}"
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") in ("UserError", "Message")
        and name != "messages"
        and any(isinstance(a, (ast.JoinedStr, ast.BinOp)) for a in node.args[:1])
    ]
    assert odd == []
