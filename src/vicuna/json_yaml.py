"""Read JSON and YAML tables with errors that say what is wrong and where; write JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vicuna.errors import UserError
from vicuna.system_errors import cannot_read

_SHOWN = 200  # characters of a parser's own words


def read_json(path: Path) -> dict[str, Any]:
    """A JSON table.

    Raises: UserError where the file cannot be read, is no JSON, or holds something else.
    """
    return _read(path, "JSON", json.loads)


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write a value as readable JSON; half characters (lone surrogates) become "?"."""
    text = json.dumps(content, ensure_ascii=False, indent=indent)
    path.write_text(text + "\n", encoding="utf-8", errors="replace")


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML table; an empty file is an empty one.

    Raises: UserError where the file cannot be read, is no YAML, names a key twice, or holds
        something else.
    """

    def load(text: str) -> Any:
        import yaml

        class Loader(yaml.SafeLoader):
            """Refuses a key that stands twice: only the last would count."""

            def construct_mapping(self, node: Any, deep: bool = False) -> Any:
                seen = set()
                for key, _ in node.value:
                    name = getattr(key, "value", None)
                    if isinstance(name, str) and name in seen and name != "<<":
                        line = key.start_mark.line + 1
                        raise ValueError(f"{name} stands there twice, again in line {line}")
                    if isinstance(name, str):
                        seen.add(name)
                return super().construct_mapping(node, deep)

        try:
            found = yaml.load(text, Loader)
        except yaml.YAMLError as e:
            raise ValueError(_yaml_words(e)) from e
        return {} if found is None else found

    return _read(path, "YAML", load)


def _yaml_words(error: Any) -> str:
    """What is wrong and in which line: the library draws a picture of it."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})" if mark else str(problem)


def _read(path: Path, kind: str, load: Callable[[str], Any]) -> dict[str, Any]:
    try:
        loaded = load(path.read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise cannot_read(e, path) from e
    except RecursionError as e:
        raise UserError(f"not valid {kind}: it is nested too deeply", where=str(path)) from e
    except UnicodeDecodeError as e:
        raise UserError(
            f"not valid {kind}: byte {e.start} is not UTF-8",
            where=str(path),
            fix="Save it as UTF-8, or name the right file.",
        ) from e
    except (ValueError, OverflowError, TypeError, AttributeError) as e:
        raise UserError(f"not valid {kind}: {str(e)[:_SHOWN]}", where=str(path)) from e
    if not isinstance(loaded, dict):
        raise UserError(
            f"expected a table of names and values, found {_kind(loaded)}", where=str(path)
        )
    return loaded


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", int: "a number"}
    names |= {float: "a number", type(None): "nothing"}
    return names.get(type(value), "something else")
