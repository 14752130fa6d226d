"""A base's config.json and what lies beside it: read, and refused before a library trips over it.

transformers raises errors of many kinds for a config that makes no sense, some of them only in the
first forward, and takes some for sense. What every command needs is checked here, once.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from vicuna.errors import UserError
from vicuna.json_yaml import read_json
from vicuna.silence_libraries import silence_libraries
from vicuna.system_errors import explain
from vicuna.weights.size_limits import check_counts

CONFIG = "config.json"
# Tables that libraries read from a base's folder beside it, each of them optional.
_TABLES = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)  # fmt: skip
# What each kind of RoPE cannot do without, beside its base frequency.
_ROPE: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    ),
}  # fmt: skip


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises: UserError where it is no table."""
    return read_json(folder / CONFIG)


def check_folder(folder: Path) -> dict[str, Any]:
    """Check the tables of a base's folder; returns config.json.

    Raises: UserError naming the file and what is wrong in it.
    """
    config = read_config(folder)
    for name in _TABLES:
        if (folder / name).is_file():
            read_json(folder / name)
    check_counts(folder)
    parts = [config, config.get("text_config")]
    for part in parts:
        if isinstance(part, dict):
            check_rope(part, folder / CONFIG)
    return config


def check_rope(config: dict[str, Any], where: Path) -> None:
    """Raises: UserError where a RoPE setting is half there or none."""
    for name in ("rope_scaling", "rope_parameters"):
        given = config.get(name)
        if given is None:
            continue
        if not isinstance(given, dict):
            raise UserError(
                "{name} is {value}, but must be a table",
                name=name,
                value=_shown(given),
                where=str(where),
            )
        # Some families have a table for each kind of layer.
        nested = {k: v for k, v in given.items() if isinstance(v, dict)}
        for place, table in nested.items() if nested else [("", given)]:
            _check_rope(f"{name}.{place}" if place else name, table, config, where)
    _number("rope_theta", config.get("rope_theta"), where)
    if (
        "rope_theta" in config
        and config["rope_theta"] is None
        and not config.get("rope_parameters")
    ):
        raise UserError("rope_theta is null, but must be a number above 0", where=str(where))


def _check_rope(name: str, rope: dict[str, Any], config: dict[str, Any], where: Path) -> None:
    if not rope:
        return
    kind = rope.get("rope_type", rope.get("type"))
    if kind is None:
        if set(rope) <= {"rope_theta", "partial_rotary_factor"}:
            kind = "default"
        else:
            raise UserError(
                "{name} is half there: it says {rope}, but not its rope_type",
                name=name,
                rope=", ".join(map(str, rope)),
                where=str(where),
                fix="Complete it as the model's makers published it, or remove {name}.",
            )
    if not isinstance(kind, str):
        raise UserError(
            "{name}.rope_type is {value}, but must be text",
            name=name,
            value=_shown(kind),
            where=str(where),
        )
    needed = _ROPE.get(kind, ())
    there = {**{k: v for k, v in config.items() if k.startswith("original_max_")}, **rope}
    lacking = [k for k in needed if there.get(k) is None]
    if lacking:
        raise UserError(
            "{name} is half there: {type} needs {names}",
            name=name,
            type=kind,
            names=", ".join(lacking),
            where=str(where),
            fix="Complete it as the model's makers published it, or remove {name}.",
        )
    for key in needed:
        values = there[key] if isinstance(there[key], list) else [there[key]]
        for value in values:
            _number(f"{name}.{key}", value, where)
    _number(f"{name}.rope_theta", rope.get("rope_theta"), where)


def _number(name: str, value: Any, where: Path) -> None:
    if value is None:
        return
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or value <= 0:
        raise UserError(
            "{name} is {value}, but must be a number above 0",
            name=name,
            value=_shown(value),
            where=str(where),
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def load_config(folder: Path) -> Any:
    """transformers' config of a base.

    Raises: UserError where it cannot read it.
    """
    from transformers import AutoConfig

    silence_libraries()
    check_folder(folder)
    try:
        return AutoConfig.from_pretrained(str(folder))
    except Exception as e:  # the library raises many kinds for a config it cannot read
        raise library_error(e, "transformers cannot read this config", folder / CONFIG) from e


def library_error(error: Exception, what: str, where: Path, fix: str = "") -> UserError:
    """The user's version of what a library says of a file: the system's errors and those of memory
    are told as what they are."""
    if isinstance(error, UserError):
        return error
    if not isinstance(error, OSError) or error.errno is not None:
        known = explain(error)
        if known is not None and not isinstance(error, (RecursionError, UnicodeError)):
            known.where = known.where or str(where)
            return UserError(known.what, where=known.where, fix=known.fix)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    said = lines[0] if len(lines[0]) > 8 else f"{type(error).__name__}: {' '.join(lines)}"
    return UserError("{what}: {error}", what=what, error=said, where=str(where), fix=fix)
