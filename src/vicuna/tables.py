"""JSON and YAML files of others: read, or an error in words, whatever they hold.

Both nest as deep as somebody likes, their numbers have as many digits, and the readers' own errors
for these are of many kinds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vicuna.errors import UserError


def _parse_yaml(text: str) -> Any:
    """Raises: ValueError in words, also where it nests too deep."""
    import yaml

    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("it nests too deep") from None
    except yaml.YAMLError as e:
        raise ValueError(str(e)) from e


def read_json(path: Path) -> dict[str, Any]:
    """The table in a JSON file.

    Raises: UserError where there is none, or it cannot be read.
    """
    try:
        loaded = _parse_json(_text(path))
    except ValueError as e:
        raise UserError(f"not valid JSON: {_first(e)}", where=str(path)) from e
    return _table(loaded, path)


def read_yaml(path: Path) -> dict[str, Any]:
    """The table in a YAML file; {} for an empty one.

    Raises: UserError where there is none, or it cannot be read.
    """
    try:
        loaded = _parse_yaml(_text(path))
    except ValueError as e:
        raise UserError(f"not valid YAML: {_first(e)}", where=str(path)) from e
    return {} if loaded is None else _table(loaded, path)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError("this file is not text in UTF-8", where=str(path)) from None
    except OSError as e:
        raise UserError(f"cannot be read: {e.strerror or e}", where=str(path)) from e


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it nests too deep") from None


def _first(error: ValueError) -> str:
    return str(error)[:500] or type(error).__name__


def _table(loaded: Any, path: Path) -> dict[str, Any]:
    if not isinstance(loaded, dict):
        raise UserError("expected a table of names and values", where=str(path))
    return loaded
