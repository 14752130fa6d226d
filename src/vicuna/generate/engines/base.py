"""What an engine is: it turns token ids into scores of the next token, and remembers what it read.

Strategies (`decode`, `beams`) know only this interface, so the same strategy runs over PyTorch,
llama.cpp or vLLM. What an engine holds is a tree of tokens: the prompt is its trunk and exists
once; every live row (a beam, or the one row of greedy decoding) is a path from the trunk's end to a
leaf. A step names for each new row the row it grows from; nothing is copied or reordered for that.

    scores = engine.prefill(prompt)                 # (V,): row 0 is the prompt itself
    scores = engine.step([5, 9, 7], [0, 0, 0])      # (3, V): three beams fork from it
    scores = engine.step([1, 2, 3], [0, 0, 2])      # beam 0 forks, beam 1 is dropped, 2 goes on
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
    """A tree of tokens, and the scores of what may come next at its leaves."""

    @property
    def context_length(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        ...

    @property
    def max_rows(self) -> int:
        """Rows that `step` takes at most."""
        ...

    def prefill(self, prompt_ids: Sequence[int], cancel: Callable[[], bool] = never) -> Tensor:
        """Make `prompt_ids` the trunk, computing only what no path of the held tree begins with.

        All rows of before are dropped; the one live row is the trunk's end.

        Args:
            prompt_ids: at least one token, at most `context_length`.
            cancel: asked before each of the pieces that a long prompt is computed in.

        Returns: scores of the next token (V,), float32, before softmax, on the engine's device.

        Raises: Cancelled; OutOfMemory.
        """
        ...

    def step(self, token_ids: Sequence[int], parents: Sequence[int]) -> Tensor:
        """Grow the tree by one token for each new row.

        Args:
            token_ids: the token of each new row, n of them, 1 <= n <= `max_rows`.
            parents: for each new row the index of the row it grows from, among the rows of the
                last call (after `prefill` only 0). Rows that nothing grows from are dropped.

        Returns: scores of the next token after each new row (n, V), as `prefill`'s. They are the
            caller's until the next call, which may overwrite them.

        Raises: OutOfMemory.
        """
        ...

    def forget(self) -> None:
        """Drop everything and free its memory."""
        ...
