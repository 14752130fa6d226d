"""The configuration of a base for a plan: a known shape by name, else its config.json."""

from __future__ import annotations

import difflib
import functools
import re
from pathlib import Path
from typing import Any

from vicuna.errors import UserError


@functools.cache
def known() -> dict[str, dict[str, Any]]:
    """The shapes that need no weights and no hub, by name."""
    import yaml

    text = (Path(__file__).parent / "shapes.yaml").read_text(encoding="utf-8")
    loaded: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return loaded


def is_known(model: str) -> bool:
    """Whether a model is a shape known by name, and no folder of that name is there."""
    return model.lower() in known() and not Path(model).exists()


def stand_in(model: str) -> str:
    """The known shape that a hub id's name says it has; "" where none fits.

    `Qwen/Qwen2.5-7B-Instruct` is of the shape `qwen2.5-7b`: what follows a shape's name only says
    how the weights were trained.
    """
    _, slash, name = model.lower().partition("/")
    if not slash or Path(model).exists():
        return ""
    plain = _plain(name)
    # Publishers write `Llama-2-7b-hf`, `Meta-Llama-3-8B-Instruct`, `Qwen2.5-7B-Instruct-1M`.
    for prefix in ("", "meta"):
        fits = [
            shape
            for shape in known()
            if re.fullmatch(f"{re.escape(prefix + _plain(shape))}({_TRAINED})*", plain)
        ]
        if fits:
            return max(fits, key=len)
    return ""


# How weights of a shape were trained or packed, in the names that they are published under.
_TRAINED = "hf|instruct|chat|base|it|v[0-9.]+|[0-9]+m|[0-9]{4}"


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", name.lower())


def config_and_notes(model: str) -> tuple[Any, list[str]]:
    """(transformers' config of a base, what the user should know of where it comes from).

    Args:
        model: a known shape (`llama-2-13b`), a folder, a GGUF file or a hub id, of which only
            config.json is read. A hub id that cannot be reached is planned by the shape that its
            name says.

    Raises: UserError where there is no such model.
    """
    if is_known(model):
        return _of_shape(known()[model.lower()]), []
    from vicuna.model.base import locate
    from vicuna.model.config_files import load_config

    try:
        folder = locate(model, weights=False)
    except UserError as e:
        name = stand_in(model)
        if name:
            note = f"{e.what}; planned by the known shape {name}"
            return _of_shape(known()[name]), [note]
        # A hub id's owner is no part of a shape's name.
        close = difflib.get_close_matches(model.lower().rpartition("/")[2], known(), n=3)
        hint = f" Known shapes near it: {', '.join(close)}." if close else ""
        raise UserError(e.what, advice=e.fix, hint=hint, where=e.where, fix="{advice}{hint}") from e
    return load_config(folder).get_text_config(), []


def config_of(model: str) -> Any:
    """transformers' config of a base; as `config_and_notes`."""
    return config_and_notes(model)[0]


def _of_shape(shape: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    optional = {"head_dim": shape.get("head"), "sliding_window": shape.get("window")}
    return AutoConfig.for_model(
        shape["type"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["inter"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv"],
        vocab_size=shape["vocab"],
        max_position_embeddings=shape["positions"],
        rope_parameters={"rope_type": "default", "rope_theta": shape.get("theta", 10000.0)},
        tie_word_embeddings=shape.get("tied", False),
        **{k: v for k, v in optional.items() if v is not None},
    )
