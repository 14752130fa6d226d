"""A prompt without its texts: literal marks, control tokens, and slots for what was said."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from vicuna.data.conversation import Turn

FIELD = re.compile(r"\{(bos|end|system|text|input)\}")


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in a skeleton: a literal mark, a control token, or what was said in a turn.

    turn: which question or answer (0-based) a `user`, `input` or `assistant` slot belongs to.
    """

    kind: Literal["mark", "bos", "end", "silent_end", "system", "user", "input", "assistant"]
    text: str = ""
    turn: int = -1


@dataclass(frozen=True)
class Shape:
    """What decides a prompt's literals: system prompt or not, and which questions have an input."""

    system: bool
    inputs: tuple[bool, ...]


def shape_of(turns: Sequence[Turn]) -> Shape:
    return Shape(turns[0].role == "system", tuple(bool(t.input) for t in turns if t.role == "user"))


def number_ends(slots: Sequence[Slot]) -> list[Slot]:
    """Give every answer an end and let what stands between answer and end belong to the turn.

    An answer in the past that the template leaves without an end gets a silent one.
    """
    numbered: list[Slot] = []
    for i, slot in enumerate(slots):
        numbered.append(slot)
        if slot.kind != "assistant":
            continue
        ahead = i + 1
        if ahead < len(slots) and slots[ahead].kind == "mark" and _ends_at(slots, ahead + 1):
            ahead += 1
        if not _ends_at(slots, ahead):
            numbered.append(Slot("silent_end", turn=slot.turn))
    turn = -1
    for i, slot in enumerate(numbered):
        if slot.kind == "assistant":
            turn = slot.turn
        elif slot.kind in ("end", "silent_end"):
            numbered[i] = replace(slot, turn=turn)
            if i and numbered[i - 1].kind == "mark":
                numbered[i - 1] = replace(numbered[i - 1], turn=turn)
            turn = -1
    return numbered


def _ends_at(slots: Sequence[Slot], i: int) -> bool:
    return i < len(slots) and slots[i].kind in ("end", "silent_end")
