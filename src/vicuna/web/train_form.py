"""The settings of a training as fields of a form, and back: all from the one table in `config/`.

What somebody leaves as it was is not given: `vicuna train` then chooses it, as on the command line.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vicuna import config
from vicuna.config import TrainSettings
from vicuna.errors import SettingsError, UserError
from vicuna.web import files
from vicuna.web.state import App

Kind = Literal["choice", "switch", "number", "whole", "lines", "paths", "text"]

# Not offered: the page chooses the folder, goes on with runs by buttons, and reports to itself.
LEFT_OUT = (
    "output_dir",
    "resume",
    "continue_from",
    "from_data_beginning",
    "allow_changes",
    "adapter",
    "report_to",
    "strict",
)
# What everybody looks at, in this order; all others are folded away, by group.
MAIN = (
    *("dataset", "val_size", "cutoff_len"),
    *("model", "template", "precision", "learning_rate"),
    *("batch_size", "num_train_epochs", "max_steps", "lora_rank"),
    *("sample_prompts", "lora_alpha", "seed"),
)


@dataclass(frozen=True)
class Field:
    """A setting in the form. choices: of a `choice`."""

    name: str
    kind: Kind
    default: Any
    group: str
    choices: tuple[str, ...] = ()

    def shown(self, value: Any) -> Any:
        """A setting's value as the form has it."""
        if self.kind == "lines":
            return "\n".join(map(str, [value] if isinstance(value, str) else value or []))
        if self.kind == "paths":
            entries = value if isinstance(value, list) else [value] if value else []
            return [_entry(e) for e in entries]
        if self.kind in ("number", "whole") and isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                return self.default
        return value

    def given(self, value: Any) -> Any:
        """What the form has as a setting's value; None where it says nothing."""
        if self.kind == "lines":
            return [line.strip() for line in str(value or "").splitlines() if line.strip()]
        if self.kind == "paths":
            return [str(v).strip() for v in value or [] if str(v).strip()]
        if self.kind == "text":
            return str(value or "").strip()
        if self.kind == "whole" and isinstance(value, float) and value.is_integer():
            return int(value)
        return value


def _entry(entry: Any) -> str:
    """A data set as one would write it on the command line."""
    if not isinstance(entry, Mapping):
        return str(entry)
    options = [
        f"{k}={entry[k]:g}"
        for k, usual in (("weight", 1), ("max_samples", 0))
        if entry.get(k, usual) != usual
    ]
    options += [f"columns.{name}={own}" for name, own in (entry.get("columns") or {}).items()]
    return str(entry["path"]) + (f"@{','.join(options)}" if options else "")


def fields() -> dict[str, Field]:
    """All fields of the form by name, in the order of the table."""
    found = {}
    for name, about in TrainSettings.model_fields.items():
        if name in LEFT_OUT:
            continue
        extra = about.json_schema_extra
        group = str(extra.get("group", "Other")) if isinstance(extra, dict) else "Other"
        kind, choices = _kind(name, about.annotation)
        found[name] = Field(name, kind, about.default, group, choices)
    return found


def _kind(name: str, annotation: Any) -> tuple[Kind, tuple[str, ...]]:
    if typing.get_origin(annotation) is Literal:
        return "choice", typing.get_args(annotation)
    if typing.get_origin(annotation) is list:
        return ("paths" if name.endswith("dataset") else "lines"), ()
    kinds: dict[Any, Kind] = {bool: "switch", int: "whole", float: "number"}
    return kinds.get(annotation, "text"), ()


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that differ from what they are by themselves."""
    found = {}
    for name, field in fields().items():
        value = field.given(values.get(name))
        # What was emptied is left to itself, too.
        if value not in (None, "", []) and value != field.default:
            found[name] = value
    return found


def shown(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as values of all fields."""
    return {name: f.shown(recipe.get(name, f.default)) for name, f in fields().items()}


def check(app: App, chosen: Mapping[str, Any]) -> TrainSettings:
    """Settings that a training can be started with.

    Raises: SettingsError naming every mistake: values, combinations, paths that are not there or
        outside of the page's folders.
    """
    from vicuna.train import setup

    settings = config.build(TrainSettings, dict(chosen))
    found = setup.mistakes(settings) + _outside(app, settings)
    if found:
        raise SettingsError(found)
    return settings


def _outside(app: App, settings: TrainSettings) -> list[str]:
    """What is wrong with the paths among the settings."""
    asked: list[tuple[str, Any, str]] = [
        ("model", files.allowed_model, settings.model),
        ("template", files.allowed_template, settings.template),
    ]
    for name in ("dataset", "val_dataset"):
        asked += [(name, files.allowed, entry.path) for entry in getattr(settings, name)]
    if settings.init_adapter:
        asked.append(("init_adapter", files.allowed_model, settings.init_adapter))
    for prompt in settings.sample_prompts:
        if Path(prompt).suffix == ".txt" and len(prompt) < 240:
            asked.append(("sample_prompts", lambda app, p: app.inside(p), prompt))
    found = []
    for name, allowed, value in asked:
        try:
            allowed(app, value)
        except UserError as e:
            found.append(f"{name}: {e}")
    return found


def recipes() -> Sequence[str]:
    """The recipes that come with the package."""
    return list(config.builtin_recipes())
