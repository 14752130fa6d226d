"""From what stands behind a command, and recipes, to settings."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from vicuna.config.base import BARE, DatasetEntry, Datasets, Settings
from vicuna.config.checkpointing import SWITCH
from vicuna.config.renamed import OLD_NAMES
from vicuna.errors import SettingsError, UserError
from vicuna.json_yaml import read_yaml
from vicuna.paths import exists

# What a run writes beside its settings into config.yaml; skipped when the file is used as a recipe.
RUN_KEYS = ("resolved", "environment")

T = TypeVar("T", bound=Settings)
M = TypeVar("M", bound=BaseModel)


def parse(
    cls: type[T], words: Sequence[str], free: list[str] | None = None
) -> tuple[T, dict[str, Any]]:
    """Settings from what stands behind a command, and what was given by name.

    Args:
        free: takes words that are neither settings nor recipes (an instruction, file names); None
            where a command has no use for them.

    Raises: SettingsError naming every mistake.
    """
    values, mistakes = _collect(cls, list(words), free)
    return build(cls, values, mistakes), values


def build(cls: type[M], values: dict[str, Any], mistakes: Sequence[str] = ()) -> M:
    """Validate values under today's names.

    Raises: SettingsError naming every mistake.
    """
    found = list(mistakes)
    try:
        settings = cls(**values)
    except ValidationError as e:
        found += [_in_words(cls, error) for error in e.errors()]
    if found:
        raise SettingsError(found)
    return settings


class _Sources(BaseModel):
    file: Datasets


def dataset_entries(words: Sequence[str]) -> list[DatasetEntry]:
    """Files, folders, globs and hub ids of a command line, with their options behind an @.

    Raises: SettingsError naming every mistake.
    """
    return build(_Sources, {"file": list(words)}).file


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings in a YAML file; what a run notes beside them is left out.

    Raises: UserError where there is no such file, or it is not a table of settings.
    """
    if not path.is_file():
        raise UserError("no such recipe", where=str(path), fix=_recipes_hint())
    return {str(k): v for k, v in read_yaml(path).items() if k not in RUN_KEYS}


def builtin_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(__file__).parents[1] / "recipes"
    return {p.stem: p for p in sorted(folder.glob("*.yaml"))}


def _recipes_hint() -> str:
    return f"Give a YAML file, or one that comes with the project: {', '.join(builtin_recipes())}."


def _collect(
    cls: type[Settings], words: list[str], free: list[str] | None
) -> tuple[dict[str, Any], list[str]]:
    values: dict[str, Any] = {}
    mistakes: list[str] = []
    i = 0
    while i < len(words):
        word = words[i]
        i += 1
        if word.startswith("--"):
            key, given, rest = word[2:].partition("=")
            key = {"json": "json_output"}.get(key, key.replace("-", "_"))
            taken: list[str] = [rest] if given else []
            while not given and i < len(words) and not words[i].startswith("--"):
                if (taken and not _is_list(cls, key)) or _is_flag(cls, key, words[i]):
                    break
                taken.append(words[i])
                i += 1
            _set(cls, values, mistakes, key, taken)
        elif _assigns(cls, word, free is not None) and not (free is not None and exists(word)):
            key, _, rest = word.partition("=")
            _set(cls, values, mistakes, key.replace("-", "_"), [rest])
        elif free is not None:
            free.append(word)
        elif word.endswith((".yaml", ".yml")) or word in builtin_recipes():
            recipe = read_recipe(builtin_recipes().get(word, Path(word)))
            mistakes += _unknown(cls, recipe)
            values.update({k: v for k, v in recipe.items() if k in cls.model_fields})
        else:
            close = difflib.get_close_matches(word, builtin_recipes(), n=1)
            near = f"; did you mean {close[0]}?" if close else ""
            mistakes.append(
                f"{word!r} is neither a setting (--key value) nor a recipe (.yaml){near}; "
                f"recipes here: {', '.join(builtin_recipes())}"
            )
    return values, mistakes


def _assigns(cls: type[Settings], word: str, strict: bool) -> bool:
    """Whether a word is key=value; where free text is allowed, only a known key makes it one."""
    key, equals, _ = word.partition("=")
    key = key.replace("-", "_")
    return bool(equals) and (key in cls.model_fields or (not strict and key.isidentifier()))


def _set(
    cls: type[Settings], values: dict[str, Any], mistakes: list[str], key: str, taken: list[str]
) -> None:
    if key not in cls.model_fields and key.startswith("no_") and key[3:] in cls.model_fields:
        key, taken = key[3:], ["false"]
    unknown = _unknown(cls, [key])
    if unknown:
        mistakes += unknown
        return
    if not taken:
        if key in BARE:
            taken = [BARE[key]]
        elif _is_bool(cls, key):
            taken = ["true"]
        else:
            mistakes.append(f"{key}: a value is missing")
            return
    if _is_list(cls, key):
        # The option may be repeated; what a recipe said is replaced by the first.
        values[key] = taken if not isinstance(values.get(key), _Given) else [*values[key], *taken]
        values[key] = _Given(values[key])
    else:
        values[key] = None if taken[0].lower() == "none" else taken[0]


class _Given(list[Any]):
    """A list that came from the command line."""


def _is_list(cls: type[Settings], key: str) -> bool:
    field = cls.model_fields.get(key)
    return field is not None and typing.get_origin(field.annotation) in (list, tuple)


def _is_flag(cls: type[Settings], key: str, following: str) -> bool:
    """Whether a switch stands alone: what follows it is not one of its values."""
    if key not in cls.model_fields:
        return False
    if key in BARE and key != "resume":
        recipe = following.endswith((".yaml", ".yml")) or following in builtin_recipes()
        return recipe or "=" in following
    return _is_bool(cls, key) and following.lower() not in SWITCH


def _is_bool(cls: type[Settings], key: str) -> bool:
    annotation = cls.model_fields[key].annotation
    return annotation is bool or bool in typing.get_args(annotation)


def _unknown(cls: type[Settings], keys: Any) -> list[str]:
    found = []
    for key in keys:
        if key in cls.model_fields:
            continue
        if key in OLD_NAMES:
            found.append(f"{key} is now {OLD_NAMES[key]}")
            continue
        close = difflib.get_close_matches(key, cls.model_fields, n=1)
        hint = f"; did you mean {close[0]}?" if close else "; vicuna COMMAND --help lists them"
        found.append(f"{key}: no such setting{hint}")
    return found


def _nearest_value(given: Any, allowed: str) -> str:
    """`; did you mean q4_k_m?` of a value that is written nearly as one of those allowed."""
    plain = {re.sub(r"\W|_", "", v.lower()): v for v in re.findall(r"'([^']*)'", allowed)}
    if not isinstance(given, str):
        return ""
    close = difflib.get_close_matches(re.sub(r"\W|_", "", given.lower()), plain, n=1)
    return f"; did you mean {plain[close[0]]}?" if close else ""


def _in_words(cls: type[BaseModel], error: Any) -> str:
    """One of pydantic's errors as a sentence with the setting, the value and what is allowed."""
    place = [str(p) for p in error["loc"]]
    name = ".".join(place)
    field = cls.model_fields.get(place[0]) if len(place) > 2 else None
    if field is not None and field.annotation == list[DatasetEntry]:
        cls, name = DatasetEntry, f"{'.'.join(place[2:])} of a data set"
    given = error.get("input")
    context = error.get("ctx", {})
    kind = error["type"]
    bounds = {
        "greater_than": "above {gt}",
        "greater_than_equal": "at least {ge}",
        "less_than": "below {lt}",
        "less_than_equal": "at most {le}",
        "literal_error": "{expected}",
    }
    if kind in bounds:
        near = _nearest_value(given, str(context.get("expected", "")))
        return f"{name} is {given}, but must be {bounds[kind].format(**context)}{near}"
    if kind == "missing":
        return f"{name} is missing"
    if kind == "extra_forbidden":
        stem, dot, column = place[-1].partition(".")
        close = [n for n in difflib.get_close_matches(stem, cls.model_fields, n=2) if n != "path"]
        near = f"; did you mean {close[0]}{dot}{column}?" if close else ""
        if cls is DatasetEntry:  # written as path@name=value
            known = ", ".join(n for n in cls.model_fields if n != "path")
            return f"{place[-1]}: no such option of a data set{near or f'; there are {known}'}"
        return f"{name}: no such setting{near}"
    expected = {"int": "a whole number", "float": "a number", "bool": "true or false"}
    expected |= {"string": "text", "tuple": "a list", "list": "a list", "mapping": "a table"}
    expected |= {"finite": "a number"}  # neither nan nor inf
    word = expected.get(kind.split("_")[0], error["msg"])
    return f"{name} is {given!r}, but must be {word}"
