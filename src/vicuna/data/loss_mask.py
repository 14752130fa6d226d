"""Which tokens are in the loss: an example's labels, and what cutting an example does to them.

Three things decide: which answers of a conversation count (`train_turns`, and flags of the record:
`records/loss_flags.py`), which parts of a rendered answer belong to it (`templates/`), and
where an overlong example is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vicuna.data.conversation import Turn

TrainTurns = Literal["all", "last"]

# Labels of a position: what it must predict.
NO_TARGET, NEXT_TOKEN, END_TOKEN = 0, 1, 2


@dataclass(slots=True)
class Example:
    """Token ids and labels of one conversation.

    ids: int32 (T,). labels: uint8 (T,), what position t must predict: nothing, the next id, or the
    end token.
    """

    ids: np.ndarray
    labels: np.ndarray


@dataclass(slots=True)
class Trimmed:
    """An example without the tokens behind its last target, and how long it was."""

    ids: np.ndarray
    labels: np.ndarray
    length: int


def trim(example: Example) -> Trimmed:
    """Cut an example after the last position that has a target."""
    targets = np.flatnonzero(example.labels != NO_TARGET)
    stop = int(targets[-1]) + 1 if len(targets) else 0
    # The last target's own id is kept in `labels` by the caller's example; only inputs are cut.
    return Trimmed(example.ids[:stop], example.labels[:stop], len(example.ids))


def targets_of(example: Example, end_id: int) -> tuple[np.ndarray, np.ndarray]:
    """(positions, ids) int64 (N,) of what an example must predict."""
    where = np.flatnonzero(example.labels != NO_TARGET)
    following = np.append(example.ids, end_id)[where + 1].astype(np.int64)
    following[example.labels[where] == END_TOKEN] = end_id
    return where, following


def windows(example: Example, limit: int) -> list[Example]:
    """An overlong text as examples of at most `limit` tokens, those without a target left out.

    The last token of a window predicts nothing: what follows it is in the next one.
    """
    parts = []
    for start in range(0, len(example.ids), limit):
        labels = example.labels[start : start + limit].copy()
        if start + limit < len(example.ids) and labels[-1] == NEXT_TOKEN:
            labels[-1] = NO_TARGET
        if (labels != NO_TARGET).any():
            parts.append(Example(example.ids[start : start + limit], labels))
    return parts


def answers_in_loss_of(turns: Sequence[Turn], train_turns: TrainTurns) -> tuple[int, ...]:
    """Which answers of a conversation are in the loss, counted from 0."""
    answers = [t for t in turns if t.role == "assistant"]
    first = 0 if train_turns == "all" else len(answers) - 1
    return tuple(k for k in range(first, len(answers)) if answers[k].in_loss)
