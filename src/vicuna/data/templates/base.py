"""Templates: the one rule that turns a conversation into pieces, for training and for inference.

A template knows two things: how the prompt of turn n looks (`_prompt`), and what closes an answer
(`_closing`). Training is built from the very same prompt, so what the model sees when it answers is
what it saw when it learned. Two kinds: literal strings (`literal.py`) and the tokenizer's own chat
template (`chat_template.py`).

Where a template renders past turns just as it rendered them when they were current, one example
teaches all turns. Where it does not (history inside an instruction, thinking removed from past
turns), every turn in the loss becomes an example of its own.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vicuna.data.conversation import Conversation, Turn
from vicuna.data.loss_mask import TrainTurns, answers_in_loss_of
from vicuna.data.templates.skeleton import Shape, Slot, number_ends, shape_of
from vicuna.data.think_tags import split_thought
from vicuna.data.tokenizer import Piece

Thinking = Literal["auto", "on", "off"]
# What `to_dict` holds beside the template itself: what a run chose.
_CHOICES = ("thinking", "thinking_loss", "date", "words")


@dataclass(frozen=True)
class ThoughtMarks:
    """What stands before and behind a thought in an answer; opened: the prompt ends in the first.

    Both are "" where the marks cannot be told in an answer's text.
    """

    open: str = "<think>"
    close: str = "</think>"
    opened: bool = False


class Template:
    """Common to both kinds: from skeletons to pieces."""

    name: str
    end_token: str  # the control token that ends an answer, "eos" for the tokenizer's own
    default_system: str = ""
    default_system_input: str = ""
    separate_input: bool = False
    # Whether answers begin with a thought: in training `auto` goes by the record, in a prompt by
    # the template's own habit.
    thinking: Thinking = "auto"
    thinking_loss: bool = True  # whether thoughts are learned
    date: str = ""  # the day that the template tells, if it tells one
    oddity: str = ""  # what was odd about the last examples
    # In what training differs from the rendering of the template's makers, as far as it was met.
    notes: dict[str, None]

    def __init__(self) -> None:
        self.notes = {}
        self._skeletons: dict[Shape, list[Slot]] = {}
        self._guard = _guard(self._literals(), self._role_marks())

    # What a kind of template must say.

    def _prompt(self, shape: Shape) -> list[Slot]:
        raise NotImplementedError

    def _closing(self) -> list[Slot]:
        raise NotImplementedError

    def _literals(self) -> list[str]:
        raise NotImplementedError

    def _role_marks(self) -> list[str]:
        """Marks such as `<|user|>` that open a turn but are no special tokens of the tokenizer."""
        return []

    def to_dict(self) -> dict[str, Any]:
        """The template as plain data, to be written into an adapter."""
        raise NotImplementedError

    # What both can do.

    @property
    def digest(self) -> str:
        """A hash of the template itself, without the choices of a run (thinking, the day)."""
        parts = {k: v for k, v in self.to_dict().items() if k not in _CHOICES}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def choose(self, thinking: Thinking | None = None, thinking_loss: bool = True) -> Template:
        """The same template, with or without thoughts; None leaves what it has."""
        chosen = copy.copy(self)
        chosen.thinking = thinking or self.thinking
        chosen.thinking_loss = thinking_loss
        chosen.notes = dict(self.notes)
        chosen._forget()
        return chosen

    def asked(self, thinking: Thinking) -> Template:
        """The template as somebody asks for answers: `auto` is its own way."""
        return self if thinking == "auto" else self.choose(thinking)

    def _forget(self) -> None:
        """Drop what was made for other choices."""
        self._skeletons = {}

    def _thinking_dict(self, always: bool = False) -> dict[str, Any]:
        chosen: dict[str, Any] = {}
        if always or self.thinking != "auto":
            chosen["thinking"] = self.thinking
        if not self.thinking_loss:
            chosen["thinking_loss"] = False
        return chosen

    @property
    def stable(self) -> bool:
        """Whether past turns are rendered as they were when they were current."""
        one = self._flat(self._skeleton(Shape(False, (False,))) + [Slot("assistant", turn=0)])
        two = self._flat(self._skeleton(Shape(False, (False, False))))
        return two.startswith(one)

    def prompt(self, turns: Sequence[Turn]) -> list[Piece]:
        """Pieces of a prompt: `turns` ends with the user's question."""
        return self._fill(self._skeleton(shape_of(self._with_system(turns))), turns, frozenset())

    def examples(
        self, conversation: Conversation, train_turns: TrainTurns = "all"
    ) -> list[list[Piece]]:
        """Pieces of the training example(s) of one conversation; none if no answer is in the loss.

        One example, all of its answers in the loss in it, if the template is stable; else one for
        each answer in the loss.
        """
        turns = conversation.turns
        if conversation.kind == "text":
            return [[Piece("bos"), Piece("text", turns[-1].text, True), Piece("end", "", True)]]
        answers_in_loss = answers_in_loss_of(turns, train_turns)
        if not answers_in_loss:
            return []
        turns = self._with_system(turns)
        if self.stable:
            return [self._example(turns, frozenset(answers_in_loss))]
        head = 1 if turns[0].role == "system" else 0
        return [self._example(turns[: head + 2 * (k + 1)], frozenset([k])) for k in answers_in_loss]

    def reference(self, turns: Sequence[Turn]) -> str | None:  # noqa: ARG002
        """The rendering of a whole conversation by the template's makers, if there is another than
        ours."""
        return None

    def thought_marks(self) -> ThoughtMarks:
        """How a thought is told from the answer behind it, in what the model says."""
        return ThoughtMarks()

    def _example(self, turns: Sequence[Turn], answers_in_loss: frozenset[int]) -> list[Piece]:
        shape = shape_of(turns)
        last = len(shape.inputs) - 1
        slots = [*self._skeleton(shape), self._answer(last), *self._closing()]
        return self._fill(number_ends(slots), turns, answers_in_loss)

    def _answer(self, turn: int) -> Slot:
        return Slot("assistant", turn=turn)

    def _with_system(self, turns: Sequence[Turn]) -> list[Turn]:
        if turns[0].role == "system" or not self.default_system:
            return list(turns)
        has_input = self.separate_input and bool(turns[0].input)
        system = self.default_system_input if has_input else ""
        return [Turn("system", system or self.default_system), *turns]

    def _skeleton(self, shape: Shape) -> list[Slot]:
        if shape not in self._skeletons:
            self._skeletons[shape] = self._prompt(shape)
        return self._skeletons[shape]

    @staticmethod
    def _flat(slots: Sequence[Slot]) -> str:
        """A skeleton as one string, ends left out, to compare what surrounds the turns."""
        return "".join(
            s.text if s.kind == "mark" else f"\x00{s.kind}{s.turn}\x00"
            for s in slots
            if s.kind not in ("end", "silent_end")
        )

    def _fill(
        self, slots: Sequence[Slot], turns: Sequence[Turn], answers_in_loss: frozenset[int]
    ) -> list[Piece]:
        turns = self._with_system(turns)
        system = turns[0].text if turns[0].role == "system" else ""
        questions = [t for t in turns if t.role == "user"]
        answers = [t for t in turns if t.role == "assistant"]
        placed = {slot.turn for slot in slots if slot.kind == "input"}
        pieces: list[Piece] = []
        for slot in slots:
            in_loss = slot.turn in answers_in_loss
            if slot.kind == "mark":
                pieces.append(Piece("mark", slot.text, in_loss))
            elif slot.kind in ("bos", "end", "silent_end"):
                pieces.append(Piece(slot.kind, "", in_loss))
            elif slot.kind == "assistant":
                thought, answer = self._thought_and_answer(answers[slot.turn])
                lead = slot.text + self.escape_role_marks(thought)
                if thought and not self.thinking_loss:
                    pieces.append(Piece("text", lead, False, cut=True))
                    pieces.append(Piece("text", self.escape_role_marks(answer), in_loss))
                else:
                    text = lead + self.escape_role_marks(answer)
                    pieces.append(Piece("text", text, in_loss, cut=True))
            else:
                pieces.append(Piece("text", self._slot_text(slot, system, questions, placed)))
        return pieces

    def _thought_and_answer(self, turn: Turn) -> tuple[str, str]:
        """(thought with its marks, the rest) of an answer; no thought if none is wanted."""
        thought, answer = (turn.thought, turn.text) if turn.thought else split_thought(turn.text)
        if self.thinking == "off" or not thought:
            return "", answer
        marked = f"<think>\n{thought}\n</think>\n\n"
        if not turn.thought:  # as it was written
            marked = turn.text[: len(turn.text) - len(answer)]
        return marked, answer

    def _slot_text(
        self, slot: Slot, system: str, questions: Sequence[Turn], placed: set[int]
    ) -> str:
        """What stands in a slot; an input without a place of its own follows its question."""
        if slot.kind == "system":
            return self.escape_role_marks(system)
        turn = questions[slot.turn]
        if slot.kind == "input":
            return self.escape_role_marks(turn.input)
        if turn.input and slot.turn not in placed:
            return self.escape_role_marks(f"{turn.text}\n{turn.input}" if turn.text else turn.input)
        return self.escape_role_marks(turn.text)

    def escape_role_marks(self, text: str) -> str:
        """The text with this template's plain-word role marks made unable to open a turn."""
        return self._guard.sub(r" \g<0>", text) if self._guard else text


def _guard(literals: Sequence[str], marks: Sequence[str] = ()) -> re.Pattern[str] | None:
    """A pattern of the role marks that are plain words: `### Response:`, `User:`, `[INST]`."""
    lines: set[str] = set()
    brackets: set[str] = set(marks)
    for literal in literals:
        for part in re.split(r"\n|<\|.*?\|>", literal):
            brackets.update(re.findall(r"\[/?[A-Z_]+\]|<</?[A-Z]+>>", part))
            word = part.strip()
            if word.endswith((":", "：")) and len(word) <= 40:
                lines.add(word)
    parts = [f"^(?:{'|'.join(map(re.escape, sorted(lines)))})"] if lines else []
    # A space after the opening bracket would change the mark itself: split it instead.
    parts += [f"(?<={re.escape(b[0])}){re.escape(b[1:])}" for b in sorted(brackets)]
    return re.compile("|".join(parts), re.M) if parts else None
