"""What the settings of all commands are made of."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from vicuna.paths import exists


class DatasetEntry(BaseModel):
    """One source of data: a file, folder, glob or hub id; how often, and how much of it.

    columns: what the source's own names stand for: {instruction: 问题, output: 答案}.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    path: str
    weight: float = Field(1.0, gt=0)
    max_samples: int = Field(0, ge=0)
    columns: dict[str, str] = Field(default_factory=dict)


def entry(value: Any) -> Any:
    """`path` or `path@weight=2,max_samples=100,columns.output=答案` from the command line: what
    follows the last @ are options if they look so and no path is meant."""
    if not isinstance(value, str):
        return value
    path, at, options = value.rpartition("@")
    if not at or not _are_options(options) or exists(value):
        return {"path": value}
    fields: dict[str, Any] = {"path": path}
    for option in options.split(","):
        key, _, given = option.partition("=")
        name, dot, column = key.strip().partition(".")
        if dot and name == "columns":
            fields.setdefault("columns", {})[column.strip()] = given.strip()
        else:
            fields[key.strip()] = given.strip()
    return fields


def _are_options(text: str) -> bool:
    """Whether all of it is `key=value,...` with keys that are options of data, or nearly so."""
    keys = [option.partition("=")[::2] for option in text.split(",")]
    known = [name for name in DatasetEntry.model_fields if name != "path"]
    return all(
        given and difflib.get_close_matches(key.strip().partition(".")[0], known, n=1, cutoff=0.5)
        for key, given in keys
    )


def _entries(value: Any) -> Any:
    if value is None:
        return []
    return [entry(v) for v in value] if isinstance(value, list) else [entry(value)]


def _words(value: Any) -> Any:
    """A list, or words separated by commas."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, (list, tuple)):
        return [w.strip() for v in value for w in str(v).split(",") if w.strip()]
    return value


def _places(value: Any) -> Any:
    """A list of folders, or several separated by commas. What exists is one, commas and all."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, (list, tuple)):
        return value
    found = []
    for text in map(str, value):
        parts, start = text.split(","), 0
        while start < len(parts):
            whole = (
                n for n in range(len(parts), start + 1, -1) if exists(",".join(parts[start:n]))
            )
            stop = next(whole, start + 1)
            found.append(",".join(parts[start:stop]).strip())
            start = stop
    return [place for place in found if place]


Datasets = Annotated[list[DatasetEntry], BeforeValidator(_entries)]
Words = Annotated[list[str], BeforeValidator(_words)]
Places = Annotated[list[str], BeforeValidator(_places)]
# What a setting that is named without a value means, where it is not a plain switch.
BARE = {"resume": "last", "gradient_checkpointing": "full"}
Texts = Annotated[list[str], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)]
EarlyStopping = Annotated[
    Literal["true", "false", "never"], BeforeValidator(lambda v: str(v).lower())
]


class Settings(BaseModel):
    """Common to all commands."""

    model_config = ConfigDict(
        extra="forbid", protected_namespaces=(), validate_default=True, allow_inf_nan=False
    )


def setting(default: Any, group: str, text: str, **limits: Any) -> Any:
    """A field with its place in the help."""
    return Field(default, description=text, json_schema_extra={"group": group}, **limits)
