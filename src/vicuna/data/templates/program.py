"""A chat template as a program, with what transformers gives it; run by `sandbox.py`."""

from __future__ import annotations

import datetime
import re
from functools import lru_cache
from typing import Any

from vicuna.data.templates.sandbox import compile_template, render
from vicuna.data.templates.sandbox_worker import environment

OTHER = "Choose another one with --template (alpaca, chatml, llama3 ...)."


class Program:
    """A template that parses.

    date: the day that `strftime_now` tells (ISO), "" if the template does not ask.
    watched: a pattern of the texts that the template looks for in what is said (`</think>`), None
        if there are none; the same words in another place are rendered another way.
    """

    def __init__(self, source: str, words: dict[str, str], date: str = "") -> None:
        self.date = (date or datetime.date.today().isoformat()) if asks_date(source) else ""
        self._compiled = compile_template(source)
        self.watched = _watched_in(source)
        self._words = words

    def render(
        self, messages: list[dict[str, Any]], generate: bool, thinking: bool | None = None
    ) -> str:
        """The conversation as text.

        Args:
            generate: whether the beginning of an answer follows (`add_generation_prompt`).
            thinking: `enable_thinking`, None to leave it to the template.

        Raises: RenderError if the template refuses or fails, LimitError if it takes too much.
        """
        given: dict[str, Any] = {}
        if thinking is not None:
            given = {"enable_thinking": thinking, "thinking": thinking}
        return render(
            self._compiled,
            now=datetime.datetime.fromisoformat(self.date) if self.date else None,
            messages=messages,
            add_generation_prompt=generate,
            tools=None,
            documents=None,
            **self._words,
            **given,
        )


def asks_date(source: str) -> bool:
    """Whether a template asks what day it is."""
    return "strftime_now" in source


@lru_cache(maxsize=64)
def _watched_in(source: str) -> frozenset[str]:
    """The texts that a template looks for. It is parsed here, as it was before in its sandbox."""
    try:
        return frozenset(_watched(environment().parse(source)))
    except RecursionError:  # deeper than this process can look; the check of a base will tell
        return frozenset()


# String methods and filters that look for a text.
_LOOKING = {
    "split", "rsplit", "partition", "rpartition", "startswith", "endswith", "replace", "find",
    "rfind", "index", "count", "removeprefix", "removesuffix",
}  # fmt: skip


def _watched(tree: Any) -> set[str]:
    """Texts that a template looks for in other texts."""
    from jinja2 import nodes

    found: set[str] = set()

    def add(node: Any) -> None:
        constants = [node] if isinstance(node, nodes.Const) else list(node.find_all(nodes.Const))
        found.update(c.value for c in constants if isinstance(c.value, str) and c.value)

    for compare in tree.find_all(nodes.Compare):
        # `'content' in message` asks for a key, which is a plain word.
        if any(op.op in ("in", "notin") for op in compare.ops):
            before = set(found)
            add(compare.expr)
            found -= {w for w in found - before if re.fullmatch(r"\w+", w)}
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr in _LOOKING and call.args:
            add(call.args[0])
    for use in tree.find_all(nodes.Filter):
        if use.name in ("replace", "split") and use.args:
            add(use.args[0])
    return found
