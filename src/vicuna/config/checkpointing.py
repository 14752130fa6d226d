"""Gradient checkpointing: one table of its levels, from what keeps most to what keeps least.

A frozen base is passed through twice, forward and backward, with about equal work; computing a
layer twice adds a third pass, computing gate and up twice not quite half of one.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import BeforeValidator

from vicuna.messages import Message


class Level(NamedTuple):
    """in_words: what is computed twice. cost: what the level costs a run."""

    in_words: str
    cost: str


CheckpointingLevel = Literal["none", "selective", "full", "offload"]
# What a forward pass keeps for backward: all that it needs; all but the outputs of gate and up;
# each layer's input; each layer's input, in the host's memory.
LEVELS: dict[CheckpointingLevel, Level] = {
    "none": Level(Message("nothing computed twice"), ""),
    "selective": Level(
        Message("the MLP's inside computed twice"),
        Message("about a fifth more computing; the result is the same"),
    ),
    "full": Level(
        Message("each layer computed twice"),
        Message("about half more computing; the result is the same"),
    ),
    "offload": Level(
        Message("each layer computed twice, its input kept in the host's memory"),
        Message("about half more computing and copies to the host; the result is the same"),
    ),
}
# It was a switch once, and still is one if nothing else is said.
SWITCH = dict.fromkeys(("true", "yes", "on", "1"), "full")
SWITCH |= dict.fromkeys(("false", "no", "off", "0", "none"), "none")
Checkpointing = Annotated[
    CheckpointingLevel, BeforeValidator(lambda v: SWITCH.get(str(v).lower(), v))
]


def costlier(level: CheckpointingLevel) -> tuple[CheckpointingLevel, ...]:
    """The levels that keep less than this one, and cost more."""
    levels = tuple(LEVELS)
    return levels[levels.index(level) + 1 :]
