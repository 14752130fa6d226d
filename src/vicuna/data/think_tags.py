"""Thoughts inside the text of an answer: the block that is read as one, and marks that are not."""

from __future__ import annotations

import re

_BLOCK = re.compile(r"\s*<think>(.*?)</think>\s*(.*)", re.S)
# Marks of thoughts, wherever they stand; behind a block that was read all of them are text.
MARK = re.compile(
    r"</?(?:think|thinking|thoughts?|reasoning|reflection|scratchpad|analysis|inner_monologue"
    r"|chain_of_thought|seed:think)>|<\|(?:begin|end)_of_thought\|>|<\|/?think(?:ing)?\|>"
    r"|◁/?think▷|\[/?THINK\]|<\|channel\|>analysis|<(?:思考|推理|思考过程)>"
    r"|\A\s*【(?:思考|推理|思考过程)】",
    re.IGNORECASE,
)


def split_thought(text: str) -> tuple[str, str]:
    """(thought, answer) of a text that begins with a `<think>` block; no thought if it does not."""
    found = _BLOCK.match(text)
    return (found[1].strip("\n"), found[2]) if found else ("", text)
