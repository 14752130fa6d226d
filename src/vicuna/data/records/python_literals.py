"""Values as Python, numpy and pandas print them, where JSON belongs: {'a': None}, no commas."""

from __future__ import annotations

import ast
import re
import warnings
from typing import Any

from vicuna.data.conversation import Number

LIMIT = 1 << 20  # characters; a parser of Python needs much memory for each
_ARRAY = re.compile(r"\barray\(\s*|,?\s*dtype=[\w.<>']+\s*\)")
_NAN = re.compile(r"(?<=[:,\[]) *(?:nan|NaN|NaT|<NA>)(?= *[,}\]])")
# numpy puts no comma between the elements of an array.
_GAP = re.compile(r"(?<=[}\]])(\s+)(?=[{\[])")


def printed(text: str) -> Any:
    """The value of a text that Python printed; None where it is none."""
    if len(text) > LIMIT:
        return None
    for form in (
        text,
        _NAN.sub("None", text),
        _GAP.sub(",", _ARRAY.sub("", _NAN.sub("None", text))),
    ):
        try:
            with warnings.catch_warnings():  # of odd backslashes, which are the data's business
                warnings.simplefilter("ignore")
                value = ast.literal_eval(form.strip())
            return _plain(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
    return None


def _plain(value: Any) -> Any:
    """Only what JSON could hold, numbers as `Number`."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return Number(value)
    if value is None or isinstance(value, (bool, str)):
        return value
    raise ValueError(f"{type(value).__name__} is no JSON")
