"""The configuration of a base for a plan: a known shape by name, else its config.json."""

from __future__ import annotations

import difflib
import functools
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


def config_of(model: str) -> Any:
    """transformers' config of a base.

    Args:
        model: a known shape (`llama-2-13b`), a folder, a GGUF file or a hub id, of which only
            config.json is read.

    Raises: UserError where there is no such model.
    """
    shape = known().get(model.lower())
    if shape is not None and not Path(model).exists():
        return _of_shape(shape)
    from transformers import AutoConfig

    from vicuna.model.base import locate, quiet_transformers

    quiet_transformers()
    try:
        folder = locate(model, weights=False)
    except UserError as e:
        # A hub id's owner is no part of a shape's name.
        close = difflib.get_close_matches(model.lower().rpartition("/")[2], known(), n=3)
        hint = f" Known shapes near it: {', '.join(close)}." if close else ""
        raise UserError(e.what, where=e.where, fix=e.fix + hint) from e
    try:
        config = AutoConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as e:
        raise UserError(
            f"transformers cannot read this config: {str(e).strip().splitlines()[0]}",
            where=str(folder / "config.json"),
        ) from e
    return config.get_text_config()


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
