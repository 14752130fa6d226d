"""A chat template as a program: compiled in a sandbox, with what transformers gives it.

The rules are those of `apply_chat_template`: its extensions (`{% generation %}` marks what an
assistant says and changes nothing, `break` and `continue`), `raise_exception`, `strftime_now`, and
`tojson` without HTML escapes.
"""

from __future__ import annotations

import datetime
import json
import re
from functools import lru_cache
from typing import Any

from vicuna.errors import UserError

OTHER = "Choose another one with --template (alpaca, chatml, llama3 ...)."


class Program:
    """A compiled template.

    date: the day that `strftime_now` tells (ISO), "" if the template does not ask.
    watched: a pattern of the texts that the template looks for in what is said (`</think>`), None
        if there are none; the same words in another place are rendered another way.
    """

    def __init__(self, source: str, words: dict[str, str], date: str = "") -> None:
        self.date = (date or datetime.date.today().isoformat()) if asks_date(source) else ""
        self._compiled, self.watched = _compile(source)
        self._words = words

    def render(
        self, messages: list[dict[str, Any]], generate: bool, thinking: bool | None = None
    ) -> str:
        """The conversation as text.

        Args:
            generate: whether the beginning of an answer follows (`add_generation_prompt`).
            thinking: `enable_thinking`, None to leave it to the template.

        Raises: whatever the template raises.
        """
        given: dict[str, Any] = {}
        if thinking is not None:
            given = {"enable_thinking": thinking, "thinking": thinking}
        if self.date:
            day = datetime.datetime.fromisoformat(self.date)
            given["strftime_now"] = day.strftime
        text: str = self._compiled.render(
            messages=messages,
            add_generation_prompt=generate,
            tools=None,
            documents=None,
            **self._words,
            **given,
        )
        return text


def asks_date(source: str) -> bool:
    """Whether a template asks what day it is."""
    return "strftime_now" in source


@lru_cache(maxsize=8)
def _compile(source: str) -> tuple[Any, frozenset[str]]:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` ... `{% endgeneration %}`: the text between them."""

        tags = {"generation"}  # noqa: RUF012  as the library declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_inside")
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _inside(self, caller: Any) -> Any:
            return caller()

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    env.globals["raise_exception"] = raise_exception
    env.filters["tojson"] = tojson
    try:
        return env.from_string(source), frozenset(_watched(env.parse(source)))
    except TemplateError as e:
        raise UserError(
            f"the tokenizer's chat template does not parse: {e}", where="template auto", fix=OTHER
        ) from e


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
