"""What an engine is: it turns token ids into logits of the next token, and remembers what it read.

Strategies (`decode`, `strategies`) know only this interface, so the same strategy runs over
PyTorch, llama.cpp or vLLM. An engine holds a tree of tokens: the prompt is its root and exists
once; every live row (a beam, or the one row of greedy decoding) is a path from the prompt's end to
a leaf. A step names for each new row the row it grows from; nothing is copied or reordered.

    logits = engine.prefill(prompt)                 # (V,): row 0 is the prompt itself
    logits = engine.step([5, 9, 7], [0, 0, 0])      # (3, V): three beams fork from it
    logits = engine.step([1, 2, 3], [0, 0, 2])      # beam 0 forks, beam 1 is dropped, 2 continues

To add an engine, write one module here with a class that has these methods and a function

    load_engine(base: str, settings: AnswerSettings, files: AdapterFiles | None) -> (Engine, Path)

and add its name to `engine` in `config.decoding`: the module is found by that name without dots.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from vicuna.config import AnswerSettings
from vicuna.errors import UserError
from vicuna.messages import Message
from vicuna.model import adapter as adapters
from vicuna.model.adapter import AdapterFiles
from vicuna.model.config_files import read_config
from vicuna.model.out_of_memory import is_memory

# Tokens of a prompt computed at a time: bounds the memory of activations and the wait for a cancel.
CHUNK = 512


class Cancelled(Exception):
    """The caller no longer wants the logits. What was read until then stays known."""


class OutOfMemory(Exception):
    """The engine has no memory for more tokens. It was reset and can be used again."""


def never() -> bool:
    """The `cancel` of a caller that never cancels."""
    return False


class Engine(Protocol):
    """A tree of tokens, the logits at its leaves, and the adapters that change them."""

    about: str  # what computes, for the user; "" if there is nothing to tell

    @property
    def context_length(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        ...

    @property
    def max_rows(self) -> int:
        """Rows that `step` takes at most."""
        ...

    def prefill(self, prompt_ids: Sequence[int], cancel: Callable[[], bool] = never) -> Tensor:
        """Make `prompt_ids` the prompt, computing only what no path of the held tree begins with.

        All earlier rows are dropped; the one live row is the prompt's end.

        Args:
            prompt_ids: at least one token, at most `context_length`.
            cancel: asked before each of the chunks that a long prompt is computed in.

        Returns: logits of the next token (V,), float32, on the engine's device.

        Raises: Cancelled; OutOfMemory.
        """
        ...

    def step(self, token_ids: Sequence[int], parents: Sequence[int]) -> Tensor:
        """Grow the tree by one token for each new row.

        Args:
            token_ids: the token of each new row, n of them, 1 <= n <= `max_rows`.
            parents: for each new row the index of the row it grows from, among the rows of the
                last call (after `prefill` only 0). Rows that nothing grows from are dropped.

        Returns: logits of the next token after each new row (n, V), float32. They are the caller's
            until the next call, which may overwrite them.

        Raises: OutOfMemory.
        """
        ...

    def reset(self) -> None:
        """Drop the prompt and all rows, and free their memory."""
        ...

    def load_adapter(self, name: str, files: AdapterFiles) -> None:
        """Load an adapter beside the base. It changes nothing until `use_adapters` names it; until
        then no adapter may be in use.

        Raises: UserError if it does not fit the base.
        """
        ...

    def use_adapters(self, mix: Mapping[str, float]) -> None:
        """Add these adapters to the base from now on. If that is a change, the engine is reset.

        Args:
            mix: strength by name; empty: the base alone.

        Raises: UserError if no adapter of a name is loaded, or the engine cannot scale or mix so.
        """
        ...

    def drop_adapter(self, name: str) -> None:
        """Free an adapter; none is in use afterwards."""
        ...

    def close(self) -> None:
        """Free everything. The engine is of no use afterwards. May be called twice."""
        ...


def load_engine(
    base: str, settings: AnswerSettings, files: AdapterFiles | None
) -> tuple[Engine, Path]:
    """The engine that the settings name, over a base alone.

    Args:
        base: as `model.base.locate` takes it.
        files: the adapter that will be loaded first. If it belongs to another base, it is refused
            before any weights are loaded.

    Returns: the engine; and the folder of its base for `check_adapter`: tokenizer, config.json and,
        unless a GGUF file is used as it is, the weights.

    Raises: UserError if base and adapter do not belong together, or something is missing.
    """
    module = importlib.import_module(f"{__package__}.{settings.engine.replace('.', '')}")
    engine, folder = module.load_engine(base, settings, files)
    return engine, folder


def check_adapter(
    files: AdapterFiles | None, base: str, folder: Path, settings: AnswerSettings
) -> list[str]:
    """Refuse an adapter that belongs to another base; what the user should know about it.

    Args:
        folder: as from `load_engine`. Without weights in it (a GGUF file whose weights are
            quantised is used as it is) only the shape is compared.

    Raises: UserError if shape or weights differ.
    """
    if files is None:
        return []
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
        notes = adapters.check_belongs(files, folder, settings.allow_other_base)
        return [*files.notes, *notes]
    shape, origin = read_config(folder), files.meta.get("base", {})
    compared = {k: v for k, v in shape.items() if k in origin and k != "model_type"}
    warning = adapters.check_base(files, compared, settings.allow_other_base)
    notes = [*files.notes, *([warning] if warning else [])]
    if files.copies:
        notes.append("weights of the base beside the adapter were not compared with its own")
    if origin.get("name", base) != base:
        notes.append(
            Message(
                "only the shape of {base} was compared with {name}'s",
                base=base,
                name=origin["name"],
            )
        )
    return notes


def refuse_setting(settings: AnswerSettings, name: str, why: str) -> None:
    """Refuse a setting that an engine ignores, unless it is "auto".

    Raises: UserError.
    """
    if getattr(settings, name) != "auto":
        raise UserError(
            "{name} has no effect with {engine}: {why}",
            name=name,
            engine=settings.engine,
            why=why,
            where=name,
            fix="Leave it out, or use --engine torch.",
        )


# -- what engines share ----


def check_rows(token_ids: Sequence[int], parents: Sequence[int], live: int, max_rows: int) -> None:
    """Refuse rows that `Engine.step` does not take.

    Args:
        live: rows there are to grow from.

    Raises: ValueError if there are too few or too many, or one grows from none.
    """
    if not 1 <= len(token_ids) <= max_rows or len(token_ids) != len(parents):
        raise ValueError(
            f"{len(token_ids)} tokens for {len(parents)} parents; 1 to {max_rows} rows"
        )
    if not all(0 <= p < live for p in parents):
        raise ValueError(f"parents {list(parents)} among {live} rows")


def check_loaded(names: Mapping[str, float], loaded: Mapping[str, Any]) -> None:
    """Raises: UserError if a name is not that of a loaded adapter."""
    for name in names:
        if name not in loaded:
            known = ", ".join(loaded) or "none"
            raise UserError(
                "no adapter {name!r} is loaded", name=name, known=known, fix="Loaded: {known}."
            )


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest prefix that both have."""
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return min(len(a), len(b))


@contextmanager
def reset_on_failure(engine: Engine) -> Iterator[None]:
    """Reset the engine if what happens inside fails or is interrupted half-way, but not if it is
    cancelled. Errors of memory become `OutOfMemory`."""
    try:
        yield
    except Cancelled:
        raise
    except BaseException as e:
        engine.reset()
        if is_memory(e):
            raise OutOfMemory(str(e)) from e
        raise
