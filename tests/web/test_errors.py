"""A walk over the code: every mistake that the page can meet has Chinese words.

The code is read, not run: the texts of `UserError` and of warnings, with a 7 for what differs.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from app_kit import english_half

import vicuna
from vicuna.web import error_texts
from vicuna.web.i18n import catalog, translate

CHINESE = partial(translate, "zh")
SOURCE = Path(vicuna.__file__).parent
# What a page meets: it answers, reads data, plans, and shows what a training says.
MET = (
    "app/*.py", "generate/load.py", "generate/engines/base.py", "generate/strategies.py",
    "generate/together.py", "generate/chat.py", "generate/decode.py", "data/records/find_files.py",
    "data/templates/*.py", "data/dataset.py", "data/records/columns.py", "data/records/text_stream.py", "model/base.py",
    "model/adapter*.py", "model/config_files.py", "model/vocabulary.py", "train/*.py",
    "memory/*.py", "faults.py", "tables.py",
)  # fmt: skip
# What is said before a page is open, or in a terminal alone.
NOT_MET = {"web/command.py", "web/login.py", "web/server.py"}


def spelled(node: ast.expr) -> Iterator[str]:
    """The texts that an expression may be, as far as it is spelled out."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(str(p.value) if isinstance(p, ast.Constant) else "7" for p in node.values)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        yield from (a + b for a in spelled(node.left) for b in spelled(node.right))
    elif isinstance(node, ast.IfExp):
        yield from spelled(node.body)
        yield from spelled(node.orelse)


def said(path: Path) -> Iterator[str]:
    """The lines of what a module says of mistakes and ways out."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        if getattr(node.func, "id", getattr(node.func, "attr", "")) in ("UserError", "warn"):
            parts = [*node.args[:1], *(k.value for k in node.keywords if k.arg in ("what", "fix"))]
            for part in parts:
                for text in spelled(part):
                    yield from filter(str.strip, text.split("\n"))


def modules(patterns: tuple[str, ...]) -> list[Path]:
    found = {path for pattern in patterns for path in SOURCE.glob(pattern)}
    return sorted(p for p in found if str(p.relative_to(SOURCE)) not in NOT_MET)


@pytest.mark.parametrize("path", modules(MET), ids=lambda p: str(p.relative_to(SOURCE)))
def test_every_mistake_that_the_page_meets_has_chinese_words(path: Path) -> None:
    # A text whose end is put together elsewhere, or that is only fields, cannot be told here.
    lines = [line for line in said(path) if re.search("[a-z]{2}", line)]
    lines = [line for line in lines if not re.search("[a-z]7$", line)]
    words = {line: error_texts.localize_error(line, CHINESE) for line in lines}
    assert [line for line, chinese in words.items() if not re.search("[一-鿿]", chinese)] == []
    assert {line: half for line, c in words.items() if (half := english_half(c))} == {}


def test_no_words_are_kept_for_what_nobody_says() -> None:
    every = [line for path in SOURCE.rglob("*.py") for line in said(path)]
    met = {error_texts.match(line)[0] for line in every}
    assert {key for key in catalog() if key.startswith("said.")} - met == set()
