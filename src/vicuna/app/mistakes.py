"""What `vicuna` itself says of mistakes, plans and ways out, in the language of the page.

The rest of the package speaks English, and knows nothing of pages. `texts/mistakes.yaml` has its
sentences with {fields} for what differs; a message is found there by its English, and what stands
in the fields goes into the Chinese. What the table lacks stays English.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

from vicuna.app.words import texts
from vicuna.errors import UserError

Say = Callable[..., str]
_TABLES = ("mistake.", "choice.", "cost.")
_FIELD = re.compile(r"\\\{(\w+)\\\}")


def in_words(text: str, say: Say) -> str:
    """A message in the language that `say` speaks, line by line.

    A line that is not in the table as it is may be a point of a list (`- ...`), or begin with the
    place it is about (`PLACE: ...`).
    """
    if say("page.code") == "en":
        return text
    return "\n".join(_line(line) for line in text.split("\n"))


def told(error: UserError, say: Say) -> tuple[str, str]:
    """(what happened, the way out)."""
    return in_words(error.what, say), in_words(error.fix, say)


def _line(line: str) -> str:
    if line.startswith("- "):
        return f"- {_line(line[2:])}"
    if (found := _found(line)) is not None:
        return found
    for colon in re.finditer(": ", line):
        if (found := _found(line[colon.end() :])) is not None:
            return f"{line[: colon.start()]}：{found}"
    return line


def _found(sentence: str) -> str | None:
    """The Chinese of a sentence of the table; fields that are sentences of it are put into Chinese,
    too."""
    key, given = match(sentence)
    fields = {name: _found(text) or text for name, text in given.items()}
    return texts()[key][1].format(**fields) if key else None


def match(sentence: str) -> tuple[str, dict[str, str]]:
    """(key of the table's entry that a sentence is, what stands in its fields); "" for none."""
    for key, pattern in _patterns():
        if found := pattern.fullmatch(sentence):
            return key, found.groupdict()
    return "", {}


@lru_cache
def _patterns() -> list[tuple[str, re.Pattern[str]]]:
    """(key, what its English matches), those with the most words of their own first."""
    found = [(key, both[0]) for key, both in texts().items() if key.startswith(_TABLES)]
    found.sort(key=lambda entry: -len(re.sub(r"\{\w+\}", "", entry[1])))
    return [(k, re.compile(_FIELD.sub(r"(?P<\1>.+?)", re.escape(text)))) for k, text in found]
