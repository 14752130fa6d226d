"""What an engine is: it turns token ids into scores of the next token, and remembers what it read.

Strategies (`decode`) know only this interface, so the same strategy runs over PyTorch, llama.cpp or
vLLM. It holds one sequence now, which greedy decoding and sampling need. Beams will add a tree to
it: a `fork` of the sequence into rows, a `step` of several rows at once, and `drop` of rows that
lost; a prompt will still exist once, and `prefill` and the single-row `step` stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor


class Cancelled(Exception):
    """The caller no longer wants the scores. What was read until then stays known."""


class OutOfMemory(Exception):
    """The engine has no memory for more tokens. It forgot its sequence and can be used again."""


def never() -> bool:
    """The `cancel` of a caller that never cancels."""
    return False


class Engine(Protocol):
    """One sequence of tokens and the scores of what may come next."""

    @property
    def context_length(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        ...

    def prefill(self, prompt_ids: Sequence[int], cancel: Callable[[], bool] = never) -> Tensor:
        """Make `prompt_ids` the sequence, computing only what follows the prefix already known.

        Args:
            prompt_ids: at least one token, at most `context_length`.
            cancel: asked before each of the pieces that a long prompt is computed in.

        Returns: scores of the next token (V,), float32, before softmax, on the engine's device.

        Raises: Cancelled; OutOfMemory.
        """
        ...

    def step(self, token_id: int) -> Tensor:
        """Append one token to the sequence.

        Returns: scores of the next token (V,), as `prefill`.

        Raises: OutOfMemory.
        """
        ...
