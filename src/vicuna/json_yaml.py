"""Read JSON and YAML tables with errors that say what is wrong and where; write JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vicuna.errors import UserError
from vicuna.messages import Message
from vicuna.system_errors import cannot_read

_SHOWN = 200  # characters of a parser's own words


def read_json(path: Path) -> dict[str, Any]:
    """A JSON table.

    Raises: UserError if the file cannot be read, is not JSON, or is not a table.
    """
    return _read(path, "JSON", json.loads)


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write a value as readable JSON; half characters (lone surrogates) become "?"."""
    text = json.dumps(content, ensure_ascii=False, indent=indent)
    path.write_text(text + "\n", encoding="utf-8", errors="replace")


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML table; an empty file is an empty one.

    Raises: UserError if the file cannot be read, is not YAML, has a key twice, or is not a table.
    """

    def load(text: str) -> Any:
        import yaml

        class Loader(yaml.SafeLoader):
            """Refuses a key that is given twice: only the last one would count."""

            def construct_mapping(self, node: Any, deep: bool = False) -> Any:
                seen = set()
                for key, _ in node.value:
                    name = getattr(key, "value", None)
                    if isinstance(name, str) and name in seen and name != "<<":
                        line = key.start_mark.line + 1
                        raise ValueError(f"{name} is given twice, again in line {line}")
                    if isinstance(name, str):
                        seen.add(name)
                return super().construct_mapping(node, deep)

        try:
            table = yaml.load(text, Loader)
        except yaml.YAMLError as e:
            raise ValueError(_yaml_problem(e)) from e
        return {} if table is None else table

    return _read(path, "YAML", load)


def _yaml_problem(error: Any) -> str:
    """What is wrong and in which line, without the lines of the file that PyYAML prints."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})" if mark else str(problem)


def _read(path: Path, syntax: str, load: Callable[[str], Any]) -> dict[str, Any]:
    try:
        loaded = load(path.read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise cannot_read(e, path) from e
    except RecursionError as e:
        raise UserError(
            "this is not valid {syntax}: it is nested too deeply", syntax=syntax, where=str(path)
        ) from e
    except UnicodeDecodeError as e:
        raise UserError(
            "this is not valid {syntax}: byte {byte} is not UTF-8",
            syntax=syntax,
            byte=e.start,
            where=str(path),
            fix="Save it as UTF-8, or name the right file.",
        ) from e
    except (ValueError, OverflowError, TypeError, AttributeError) as e:
        raise UserError(
            "this is not valid {syntax}: {error}",
            syntax=syntax,
            error=str(e)[:_SHOWN],
            where=str(path),
        ) from e
    if not isinstance(loaded, dict):
        raise UserError(
            "expected a table of names and values, not {type}",
            type=_type_name(loaded),
            where=str(path),
        )
    return loaded


_NUMBER = Message("a number")
_TYPE_NAMES = {
    list: Message("a list"),
    str: Message("a text"),
    bool: Message("true or false"),
    int: _NUMBER,
    float: _NUMBER,
    type(None): Message("nothing"),
}


def _type_name(value: Any) -> Message:
    return _TYPE_NAMES.get(type(value), Message("another value"))
