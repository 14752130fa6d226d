"""What the settings of all commands are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class DatasetEntry(BaseModel):
    """One source of data: a file, folder, glob or hub id; how often, and how much of it."""

    model_config = ConfigDict(extra="forbid")
    path: str
    weight: float = Field(1.0, gt=0)
    max_samples: int = Field(0, ge=0)


def _entry(value: Any) -> Any:
    """`path` or `path@weight=2,max_samples=100` from the command line."""
    if not isinstance(value, str):
        return value
    if "@" in value and _exists(value):
        return {"path": value}
    path, _, options = value.partition("@")
    fields: dict[str, Any] = {"path": path}
    for option in filter(None, options.split(",")):
        key, _, given = option.partition("=")
        fields[key.strip()] = given.strip()
    return fields


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # a name that is too long
        return False


def _entries(value: Any) -> Any:
    if value is None:
        return []
    return [_entry(v) for v in value] if isinstance(value, list) else [_entry(value)]


def _words(value: Any) -> Any:
    """A list, or words separated by commas."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, (list, tuple)):
        return [w.strip() for v in value for w in str(v).split(",") if w.strip()]
    return value


Datasets = Annotated[list[DatasetEntry], BeforeValidator(_entries)]
Words = Annotated[list[str], BeforeValidator(_words)]
Checkpointing = Annotated[
    Literal["none", "selective", "full", "offload"],
    BeforeValidator(lambda v: SWITCH.get(str(v).lower(), v)),
]
# It was a switch once, and still is one where nothing else is said.
SWITCH = dict.fromkeys(("true", "yes", "on", "1"), "full")
SWITCH |= dict.fromkeys(("false", "no", "off", "0", "none"), "none")
# What a setting that is named without a value means, where it is not a plain switch.
BARE = {"resume": "last", "gradient_checkpointing": "full"}
Texts = Annotated[list[str], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)]
EarlyStopping = Annotated[
    Literal["true", "false", "never"], BeforeValidator(lambda v: str(v).lower())
]


class Settings(BaseModel):
    """Common to all commands."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), validate_default=True)


def setting(default: Any, group: str, text: str, **limits: Any) -> Any:
    """A field with its place in the help."""
    return Field(default, description=text, json_schema_extra={"group": group}, **limits)
