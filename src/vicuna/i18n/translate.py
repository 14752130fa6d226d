"""Messages in other languages: a catalogue for each, keyed by the English template.

`zh.yaml` has `"{name} is {value}": "{name} 为 {value}"`; the places of both are the same, and
tests/test_messages.py holds that. What the catalogue lacks, or others said (a library, the
system), stays in its own words and stands between quotes: no sentence is half English.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from vicuna.messages import Message

_PLACE = re.compile(r"\{\w+\}")
_WORDS = re.compile(r"[^\W\d_]|[{}]")
# Two words in a row that are no options, settings, paths or numbers: somebody speaks English.
_ENGLISH = re.compile(r"(?<![-\w/.「])[A-Za-z][a-z']+,? [A-Za-z']{2,}(?![\w=/(]|\.\w)")
_CHINESE = re.compile("[\u4e00-\u9fff]")


@lru_cache
def catalogue(language: str) -> dict[str, str]:
    """The translations of a language by their English templates; none for English."""
    import yaml

    path = Path(__file__).parent / f"{language}.yaml"
    loaded = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    return loaded or {}


def translate(text: str, language: str) -> str:
    """A message in a language; a text that is no message is looked up as it is."""
    if language == "en":
        return str(text)
    message = text if isinstance(text, Message) else Message(text)
    translation = catalogue(language).get(message.template)
    if translation is None:
        if not message.fields or _WORDS.search(_PLACE.sub("", message.template)):
            return quoted(message)
        translation = message.template.replace(": ", "：")  # places and what is between them
    if not message.fields:
        return translation
    fields = {name: _field(value, language) for name, value in message.fields.items()}
    try:
        return translation.format(**fields)
    except (ValueError, LookupError, TypeError):  # fields of a file that somebody changed
        return quoted(message)


def _field(value: object, language: str) -> object:
    if isinstance(value, Message):
        return translate(value, language)
    return quoted(value) if isinstance(value, str) else value


def quoted(text: str) -> str:
    """A text of others: between quotes if it is English."""
    if _CHINESE.search(text) or not _ENGLISH.search(text):
        return str(text)
    return f"「{text}」"
