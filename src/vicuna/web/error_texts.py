"""What `vicuna` itself says of mistakes, plans and ways out, in the language of the page.

The rest of the package speaks English, and knows nothing of pages. `texts/mistakes.yaml` has its
sentences with {fields} for what differs; a message is found there by its English, and what stands
in the fields goes into the Chinese. What the table lacks, or others said (a library, the system),
stays in its own words, and stands between quotes: no sentence is half English.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

from vicuna.errors import UserError
from vicuna.web.i18n import catalog

Translate = Callable[..., str]
_TABLES = ("mistake.", "choice.", "cost.", "said.")
_FIELD = re.compile(r"\\\{(\w+)\\\}")
_NUMBERS = ("count", "some", "all", "line", "number", "cutoff")
# Two words in a row that are no options, settings, paths or numbers: somebody speaks English.
_ENGLISH = re.compile(r"(?<![-\w/.「])[A-Za-z][a-z']+,? [A-Za-z']{2,}(?![\w=/(]|\.\w)")
_CHINESE = re.compile("[\u4e00-\u9fff]")


def localize_error(text: str, tr: Translate) -> str:
    """A message in the language of `tr`, line by line.

    A line that is not in the table as it is may be a point of a list (`- ...`), or begin with the
    place it is about (`PLACE: ...`).
    """
    if tr("page.code") == "en":
        return text
    return "\n".join(_line(line) for line in text.split("\n"))


def localized_parts(error: UserError, tr: Translate) -> tuple[str, str]:
    """(what happened, the way out)."""
    return localize_error(error.what, tr), localize_error(error.fix, tr)


def _line(line: str) -> str:
    if line.startswith("- "):
        return f"- {_line(line[2:])}"
    if (found := _found(line)) is not None:
        return found
    for colon in re.finditer(": ", line):
        if (found := _found(line[colon.end() :])) is not None:
            place = line[: colon.start()]
            return f"{_found(place) or quoted(place)}：{found}"
    return quoted(line)


def quoted(text: str) -> str:
    """A text of others: between quotes where it is English."""
    if _CHINESE.search(text) or not _ENGLISH.search(text):
        return text
    return f"「{text}」"


def _found(sentence: str) -> str | None:
    """The Chinese of a sentence of the table; fields that are sentences of it are put into Chinese,
    too."""
    return chinese(sentence, _TABLES)


def chinese(sentence: str, tables: tuple[str, ...]) -> str | None:
    """The Chinese of a sentence of some tables, and of what stands in its fields; None where they
    have none."""
    key, given = match(sentence, tables)
    fields = {name: chinese(text, tables) or _listed(text) for name, text in given.items()}
    return catalog()[key][1].format(**fields) if key else None


def _listed(text: str) -> str:
    """A text that the tables lack; a list of values has its last word in Chinese."""
    return quoted(text.replace("' or '", "' 或 '"))


def match(sentence: str, tables: tuple[str, ...] = _TABLES) -> tuple[str, dict[str, str]]:
    """(key of the entry that a sentence is, what stands in its fields); "" for none.

    Args:
        tables: what the keys of the entries begin with.
    """
    for key, pattern in _patterns(tables):
        if found := pattern.fullmatch(sentence):
            return key, found.groupdict()
    return "", {}


@lru_cache
def _patterns(tables: tuple[str, ...]) -> list[tuple[str, re.Pattern[str]]]:
    """(key, what its English matches), those with the most words of their own first."""
    found = [(key, both[0]) for key, both in catalog().items() if key.startswith(tables)]
    found.sort(key=lambda entry: -len(re.sub(r"\{\w+\}", "", entry[1])))
    return [(k, re.compile(_FIELD.sub(_any_of, re.escape(text)))) for k, text in found]


def _any_of(field: re.Match[str]) -> str:
    """What may stand in a field: a number, where its name is that of one."""
    return f"(?P<{field[1]}>{r'[0-9][0-9,.]*' if field[1] in _NUMBERS else '.+?'})"
