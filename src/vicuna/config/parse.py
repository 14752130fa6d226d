"""Settings from the arguments of a command, and from recipes."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from vicuna.config.base import BARE, DatasetEntry, Datasets, Settings
from vicuna.config.checkpointing import SWITCH
from vicuna.config.renamed import OLD_NAMES
from vicuna.errors import SettingsError, UserError
from vicuna.json_yaml import read_yaml
from vicuna.messages import Message
from vicuna.paths import exists

# What a run writes beside its settings into config.yaml; skipped when the file is used as a recipe.
RUN_KEYS = ("resolved", "environment")

T = TypeVar("T", bound=Settings)
M = TypeVar("M", bound=BaseModel)


def parse(
    cls: type[T], argv: Sequence[str], free: list[str] | None = None
) -> tuple[T, dict[str, Any]]:
    """Settings from the arguments of a command, and the values that were given by name.

    Args:
        free: receives arguments that are neither settings nor recipes (an instruction, file
            names); None if the command has no use for them.

    Raises: SettingsError with every mistake.
    """
    values, mistakes = _collect(cls, list(argv), free)
    return build(cls, values, mistakes), values


def build(cls: type[M], values: dict[str, Any], mistakes: Sequence[str] = ()) -> M:
    """Validated settings from values by their current names.

    Args:
        mistakes: that were found before; reported together with those of the values.

    Raises: SettingsError with every mistake.
    """
    mistakes = list(mistakes)
    try:
        settings = cls(**values)
    except ValidationError as e:
        mistakes += [_explain(cls, error) for error in e.errors()]
    if mistakes:
        raise SettingsError(mistakes)
    return settings


class _Sources(BaseModel):
    file: Datasets


def dataset_entries(argv: Sequence[str]) -> list[DatasetEntry]:
    """Files, folders, globs and hub ids of a command line, with their options after an @.

    Raises: SettingsError with every mistake.
    """
    return build(_Sources, {"file": list(argv)}).file


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, without what a run adds to them.

    Raises: UserError if there is no such file, or it is not a table of settings.
    """
    if not path.is_file():
        raise UserError(
            "no such recipe",
            recipes=", ".join(builtin_recipes()),
            where=str(path),
            fix="Give a YAML file, or a recipe that comes with the project: {recipes}.",
        )
    return {str(k): v for k, v in read_yaml(path).items() if k not in RUN_KEYS}


def builtin_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(__file__).parents[1] / "recipes"
    return {p.stem: p for p in sorted(folder.glob("*.yaml"))}


def _collect(
    cls: type[Settings], argv: list[str], free: list[str] | None
) -> tuple[dict[str, Any], list[str]]:
    values: dict[str, Any] = {}
    mistakes: list[str] = []
    i = 0
    while i < len(argv):
        argument = argv[i]
        i += 1
        if argument.startswith("--"):
            key, given, rest = argument[2:].partition("=")
            key = {"json": "json_output"}.get(key, key.replace("-", "_"))
            taken: list[str] = [rest] if given else []
            while not given and i < len(argv) and not argv[i].startswith("--"):
                if (taken and not _is_list(cls, key)) or _is_flag(cls, key, argv[i]):
                    break
                taken.append(argv[i])
                i += 1
            _set(cls, values, mistakes, key, taken)
        elif _assigns(cls, argument, free is not None) and not (
            free is not None and exists(argument)
        ):
            key, _, rest = argument.partition("=")
            _set(cls, values, mistakes, key.replace("-", "_"), [rest])
        elif free is not None:
            free.append(argument)
        elif argument.endswith((".yaml", ".yml")) or argument in builtin_recipes():
            recipe = read_recipe(builtin_recipes().get(argument, Path(argument)))
            mistakes += _unknown(cls, recipe)
            values.update({k: v for k, v in recipe.items() if k in cls.model_fields})
        elif "dataset" in cls.model_fields and exists(argument):
            _set(cls, values, mistakes, "dataset", [argument])
        else:
            close = difflib.get_close_matches(argument, builtin_recipes(), n=1)
            mistakes.append(
                Message(
                    "{argument!r} is neither a setting (--key value) nor a recipe (.yaml) nor a "
                    "file{near}; recipes of the project: {recipes}",
                    argument=argument,
                    near=Message("; did you mean {name}?", name=close[0]) if close else "",
                    recipes=", ".join(builtin_recipes()),
                )
            )
    return values, mistakes


def _assigns(cls: type[Settings], argument: str, strict: bool) -> bool:
    """Whether an argument is key=value; in free text, only a known key makes it one."""
    key, equals, _ = argument.partition("=")
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
            mistakes.append(Message("{key} needs a value", key=key))
            return
    if _is_list(cls, key):
        # The option may be repeated; the first replaces the value of a recipe.
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
    """Whether a switch has no value: the argument after it is not one of its values."""
    if key not in cls.model_fields:
        return False
    if key in BARE and key != "resume":
        recipe = following.endswith((".yaml", ".yml")) or following in builtin_recipes()
        return recipe or "=" in following
    return _is_bool(cls, key) and following.lower() not in SWITCH


def _is_bool(cls: type[Settings], key: str) -> bool:
    annotation = cls.model_fields[key].annotation
    return annotation is bool or bool in typing.get_args(annotation)


def _unknown(cls: type[Settings], keys: Iterable[str]) -> list[str]:
    mistakes: list[str] = []
    for key in keys:
        if key in cls.model_fields:
            continue
        if key in OLD_NAMES:
            mistakes.append(Message("{key} is now {new}", key=key, new=OLD_NAMES[key]))
            continue
        close = difflib.get_close_matches(key, cls.model_fields, n=1)
        hint = _did_you_mean(close[0]) if close else Message("vicuna COMMAND --help lists them")
        mistakes.append(Message("{key}: no such setting; {hint}", key=key, hint=hint))
    return mistakes


def _did_you_mean(name: str) -> Message:
    return Message("did you mean {name}?", name=name)


def _nearest(value: Any, allowed: Sequence[str]) -> str:
    """The allowed value that is written almost like this one; "" if none is."""
    if not isinstance(value, str):
        return ""
    plain = {re.sub(r"\W|_", "", v.lower()): v for v in allowed}
    close = difflib.get_close_matches(re.sub(r"\W|_", "", value.lower()), plain, n=1)
    return plain[close[0]] if close else ""


# pydantic's types of errors, and where their context has the bound.
_BOUNDS = {
    "greater_than": ("gt", Message("{name} is {value}, but must be above {bound}")),
    "greater_than_equal": ("ge", Message("{name} is {value}, but must be at least {bound}")),
    "less_than": ("lt", Message("{name} is {value}, but must be below {bound}")),
    "less_than_equal": ("le", Message("{name} is {value}, but must be at most {bound}")),
}
_EXPECTED = {
    "int": Message("a whole number"),
    "float": Message("a number"),
    "finite": Message("a number"),  # neither nan nor inf
    "bool": Message("true or false"),
    "string": Message("text"),
    "tuple": Message("a list"),
    "list": Message("a list"),
    "mapping": Message("a table"),
}


def _explain(cls: type[BaseModel], error: Any) -> Message:
    """One of pydantic's errors as a sentence with the setting, its value and what is allowed."""
    place = [str(p) for p in error["loc"]]
    name = ".".join(place)
    field = cls.model_fields.get(place[0]) if len(place) > 2 else None
    if field is not None and field.annotation == list[DatasetEntry]:
        cls = DatasetEntry
        name = Message("{option} of a data set", option=".".join(place[2:]))
    value, context, error_type = error.get("input"), error.get("ctx", {}), error["type"]
    if error_type in _BOUNDS:
        bound, template = _BOUNDS[error_type]
        return Message(template, name=name, value=value, bound=context[bound])
    if error_type == "literal_error":
        return _not_allowed(name, value, str(context["expected"]))
    if error_type == "missing":
        return Message("{name} is missing", name=name)
    if error_type == "extra_forbidden":
        return _no_such_field(cls, name, place[-1])
    expected = _EXPECTED.get(error_type.split("_")[0], error["msg"])
    return Message(
        "{name} is {value!r}, but must be {expected}", name=name, value=value, expected=expected
    )


def _not_allowed(name: str, value: Any, expected: str) -> Message:
    """Args: expected: the allowed values as pydantic lists them, `'a', 'b' or 'c'`."""
    allowed = re.findall(r"'([^']*)'", expected)
    listed: str = expected
    if len(allowed) > 1:
        first = ", ".join(f"'{v}'" for v in allowed[:-1])
        listed = Message("{values} or '{last}'", values=first, last=allowed[-1])
    fields = {"name": name, "value": value, "expected": listed}
    if near := _nearest(value, allowed):
        return Message(
            "{name} is {value}, but must be {expected}; did you mean {near}?", **fields, near=near
        )
    return Message("{name} is {value}, but must be {expected}", **fields)


def _no_such_field(cls: type[BaseModel], name: str, last: str) -> Message:
    stem, dot, column = last.partition(".")
    close = [n for n in difflib.get_close_matches(stem, cls.model_fields, n=2) if n != "path"]
    hint = _did_you_mean(f"{close[0]}{dot}{column}") if close else Message("")
    if cls is DatasetEntry:  # written as path@name=value
        known = ", ".join(n for n in cls.model_fields if n != "path")
        return Message(
            "{option}: no such option of a data set; {hint}",
            option=last,
            hint=hint or Message("there are {names}", names=known),
        )
    if hint:
        return Message("{key}: no such setting; {hint}", key=name, hint=hint)
    return Message("{key}: no such setting", key=name)
