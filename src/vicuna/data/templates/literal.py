"""Literal templates (`templates.yaml`, or a user's own file), and finding a template by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vicuna.data.conversation import Turn
from vicuna.data.templates.base import Template
from vicuna.data.templates.skeleton import FIELD, Shape, Slot, number_ends, shape_of
from vicuna.data.tokenizer import Piece
from vicuna.errors import UserError


@dataclass
class _Spec:
    user: str
    assistant: str
    about: str = ""
    start: str = ""
    system: str = ""
    default_system: str = ""
    default_system_input: str = ""
    user_input: str = ""
    first_user: str = ""
    first_user_input: str = ""
    past_user: str = ""
    past_first_user: str = ""
    past_assistant: str = ""
    end: str = "eos"


class LiteralTemplate(Template):
    """A template of literal strings (see `templates.yaml` for the keys)."""

    def __init__(self, name: str, spec: dict[str, Any]) -> None:
        known = set(_Spec.__dataclass_fields__)
        unknown = sorted(set(spec) - known)
        if unknown or not {"user", "assistant"} <= set(spec):
            what = (
                f"unknown key {unknown[0]!r}" if unknown else "keys user and assistant are needed"
            )
            raise UserError(
                what, known=sorted(known), where=f"template {name}", fix="Known keys: {known}"
            )
        self.name = name
        self.spec = _Spec(**spec)
        for key in ("user", "assistant"):
            if "{text}" not in getattr(self.spec, key):
                raise UserError("{key} needs {{text}}", key=key, where=f"template {name}")
        self.end_token = self.spec.end
        self.default_system = self.spec.default_system
        self.default_system_input = self.spec.default_system_input
        self.separate_input = bool(self.spec.user_input or self.spec.first_user_input)
        super().__init__()

    def to_dict(self) -> dict[str, Any]:
        given = {k: v for k, v in self.spec.__dict__.items() if v and k != "about"}
        return {"kind": "literal", "name": self.name, **given, **self._thinking_dict()}

    def _literals(self) -> list[str]:
        spec = self.spec
        texts = [spec.start, spec.user, spec.user_input, spec.first_user, spec.first_user_input]
        texts += [spec.past_user, spec.past_first_user, spec.past_assistant, spec.assistant]
        texts += [spec.system]
        return [part for text in texts for part in FIELD.split(text)]

    def _prompt(self, shape: Shape) -> list[Slot]:
        spec = self.spec
        slots = _slots(spec.start)
        merged = (
            shape.system and not spec.system
        )  # no place for a system prompt: before the question
        if shape.system and spec.system:
            slots += _slots(spec.system)
        last = len(shape.inputs) - 1
        for n, has_input in enumerate(shape.inputs):
            question = _slots(self._question(n, n < last, has_input), n)
            if n == 0 and merged:
                at = next(i for i, s in enumerate(question) if s.kind == "user")
                question[at:at] = [Slot("system"), Slot("mark", "\n\n")]
            slots += question
            if n < last:
                slots += _slots(spec.past_assistant or spec.assistant, n, answer=True)
        return slots

    def _question(self, n: int, past: bool, has_input: bool) -> str:
        spec = self.spec
        if past and spec.past_user:
            return (spec.past_first_user if n == 0 else "") or spec.past_user
        if has_input and self.separate_input:
            return (spec.first_user_input if n == 0 else "") or spec.user_input or spec.user
        return (spec.first_user if n == 0 else "") or spec.user

    def _closing(self) -> list[Slot]:
        slots = _slots(self.spec.assistant, 0, answer=True)
        at = next(i for i, s in enumerate(slots) if s.kind == "assistant")
        return slots[at + 1 :]

    def _example(self, turns: Sequence[Turn], answers_in_loss: frozenset[int]) -> list[Piece]:
        # The white space before an answer's text belongs to the answer (see templates.yaml).
        shape = shape_of(turns)
        last = len(shape.inputs) - 1
        answer = _slots(self.spec.assistant, last, answer=True)
        return self._fill(number_ends([*self._skeleton(shape), *answer]), turns, answers_in_loss)


def _slots(text: str, turn: int = -1, answer: bool = False) -> list[Slot]:
    """Parse one template string into slots."""
    slots: list[Slot] = []
    for i, part in enumerate(FIELD.split(text)):
        if i % 2 == 0:
            if part:
                slots.append(Slot("mark", part))
        elif part == "text" and answer:
            lead = ""
            if slots and slots[-1].kind == "mark" and not slots[-1].text.strip():
                lead = slots.pop().text
            slots.append(Slot("assistant", lead, turn))
        elif part == "text":
            slots.append(Slot("user", turn=turn))
        elif part == "input":
            slots.append(Slot("input", turn=turn))
        else:
            slots.append(Slot(part))  # type: ignore[arg-type]
    return slots


# -- finding templates --------------------------------------------------------------------------
