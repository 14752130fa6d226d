"""The tokenizer's own (Jinja) chat template; what is learned in it is found by rendering it.

The template never sees what people wrote. Of every text it is given the outline alone: a
placeholder, between the white space at its ends and the words that the template looks for
(`</think>`), because these decide how it renders. So nothing said can be taken for a special token,
and conversations of one outline are rendered once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from vicuna.data.conversation import Conversation, Turn
from vicuna.data.loss_mask import TrainTurns, answers_in_loss_of
from vicuna.data.templates.base import Template, ThoughtMarks
from vicuna.data.templates.chat_rendering import Renderings
from vicuna.data.templates.end_token import EOS, EndFinder
from vicuna.data.templates.placeholders import (
    ANSWERS,
    GAP,
    MANY,
    PLACEHOLDER,
    THINK,
    Message,
    Outline,
    any_of,
    begins_thought,
    cut,
    placeholder,
)
from vicuna.data.templates.sandbox import Program
from vicuna.data.templates.skeleton import Shape, Slot
from vicuna.data.think_tags import split_thought
from vicuna.data.tokenizer import Piece


class _TextGap(NamedTuple):
    """A segment whose text is one of the conversation's."""

    kind: Literal["text"]
    number: int
    in_loss: bool
    cut: bool


@dataclass
class _Plan:
    """One example of an outline: its pieces, and gaps for the conversation's texts."""

    pieces: list[Piece | _TextGap] = field(default_factory=list)
    oddity: str = ""  # what the template does with an answer that is not taught


class ChatTemplate(Template):
    """A tokenizer's own (Jinja) chat template, rendered in a sandbox.

    notes: in what training differs from the template's own rendering of a whole conversation, as
        far as it was met.
    """

    def __init__(
        self,
        source: str,
        bos_token: str,
        eos_token: str,
        controls: Sequence[str],
        name: str = "auto",
        words: dict[str, str] | None = None,
        date: str = "",
    ) -> None:
        self.name = name
        self.source, self.bos_token, self.eos_token = source, bos_token, eos_token
        self.controls = sorted(set(controls) | {eos_token}, key=lambda t: (-len(t), t))
        self.words = {k: v for k, v in (words or {}).items() if k in source}
        known = {**self.words, "bos_token": bos_token, "eos_token": eos_token}
        self._program = Program(source, known, date)
        self.date = self._program.date
        self._ends = EndFinder(self.controls, eos_token)
        self._special = self._ends.special
        # What looks like a special token is never shown to the template: nobody can write one.
        watched = [w for w in self._program.watched if not self._special.search(w)]
        # Answers of reasoning models hold a thought between these two.
        self._special_think = bool({"<think>", "</think>"} & set(self.controls))
        marks = [] if self._special_think else ["<think>", "</think>"]
        self._watched = {"user": any_of(watched), "assistant": any_of([*watched, *marks])}
        self._renderings = Renderings(self._program)
        self._plans: dict[Any, list[_Plan]] = {}
        self.end_token = self._find_end()
        super().__init__()
        self.notes = self._renderings.notes

    def to_dict(self) -> dict[str, Any]:
        saved: dict[str, Any] = {
            "kind": "jinja",
            "name": self.name,
            "source": self.source,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "controls": self.controls,
        }
        if self.words:
            saved["words"] = self.words
        if self.date:
            saved["date"] = self.date
        return {**saved, **self._thinking_dict(always=True)}

    def _forget(self) -> None:
        super()._forget()
        self._renderings, self._plans = Renderings(self._program), {}
        self.notes = self._renderings.notes

    def _find_end(self) -> str:
        """The control token that ends an answer; "eos" is the tokenizer's own."""
        one = (Message("user", GAP), Message("assistant", GAP))
        return self._ends.end_of(self._renderings.rendered(one, False).tail)

    # -- examples and prompts -----------------------------------------------------------------

    def prompt(self, turns: Sequence[Turn]) -> list[Piece]:
        outline, texts = self._outline(turns)
        on = self._opens_thought(outline)
        key = outline, on
        if key not in self._plans:
            text = self._renderings.opening(outline, on).prompt
            self._keep(key, [self._plan(text, outline, frozenset())])
        return self._fill_plan(self._plans[key][0], texts)

    def examples(
        self, conversation: Conversation, train_turns: TrainTurns = "all"
    ) -> list[list[Piece]]:
        if conversation.kind == "text":
            return super().examples(conversation, train_turns)
        self.oddity = ""
        turns = conversation.turns
        answers_in_loss = answers_in_loss_of(turns, train_turns)
        if not answers_in_loss:
            return []
        outline, texts = self._outline(turns)
        key = outline, answers_in_loss, "examples"
        if key not in self._plans:
            self._keep(key, self._find_plans(outline, frozenset(answers_in_loss)))
        self.oddity = next((p.oddity for p in self._plans[key] if p.oddity), "")
        return [self._fill_plan(plan, texts) for plan in self._plans[key]]

    def _keep(self, key: Any, plans: list[_Plan]) -> None:
        if len(self._plans) > MANY:
            self._plans.clear()
        self._plans[key] = plans

    def _find_plans(self, outline: Outline, answers_in_loss: frozenset[int]) -> list[_Plan]:
        """One example with all answers that look there as they look when they are the last; one
        for each other answer."""
        answers = [i for i, m in enumerate(outline) if m.role == "assistant"]
        whole = self._renderings.rendered(outline, self._thinks(outline[-1]))
        inside, apart = set(), []
        for n in sorted(answers_in_loss):
            current = self._renderings.rendered(
                outline[: answers[n] + 1], self._thinks(outline[answers[n]])
            )
            if whole.text.startswith(current.prompt + current.body):
                inside.add(n)
            else:
                apart.append(n)
        plans = []
        for n in apart:
            past = outline[: answers[n] + 1]
            current = self._renderings.rendered(past, self._thinks(past[-1]))
            plans.append(self._plan(current.text, past, frozenset([n])))
        if inside:
            plans.append(self._plan(whole.text, outline, frozenset(inside)))
        return plans

    def _plan(self, text: str, outline: Outline, answers_in_loss: frozenset[int]) -> _Plan:
        """Cut a rendering at those of its answers that look as they did when they were the last."""
        plan = _Plan()
        at, number = 0, -1
        for i, message in enumerate(outline):
            if message.role != "assistant":
                continue
            number += 1
            current = self._renderings.rendered(outline[: i + 1], self._thinks(message))
            if not text.startswith(current.prompt + current.body) or len(current.prompt) < at:
                continue
            in_loss = number in answers_in_loss
            if in_loss:
                plan.oddity = current.oddity or _border(current.prompt, current.body) or plan.oddity
            self._add(plan, text[at : len(current.prompt)], False, cut=bool(at))
            at = len(current.prompt)
            spoken = current.body
            if not self.thinking_loss and self._thinks(message):
                thought = _thought_of(spoken)
                self._add(plan, thought, False, cut=True)
                self._add(plan, spoken[len(thought) :], in_loss, cut=not thought)
            else:
                self._add(plan, spoken, in_loss, cut=True)
            if not spoken:
                plan.pieces.append(Piece("text", "", in_loss, True))
            at += len(spoken)
            at += self._add_end(plan, text[at:], in_loss)
        self._add(plan, text[at:], False, cut=bool(at))
        return plan

    def _add(self, plan: _Plan, text: str, in_loss: bool, cut: bool) -> None:
        for n, part in enumerate(PLACEHOLDER.split(text)):
            if n % 2:
                plan.pieces.append(_TextGap("text", int(part), in_loss, cut))
                cut = False
            elif part:
                plan.pieces.append(Piece("mark", part, in_loss, cut))
                cut = False

    def _add_end(self, plan: _Plan, tail: str, in_loss: bool) -> int:
        """What closes an answer; the characters of it that are the answer's."""
        end = self.eos_token if self.end_token == EOS else self.end_token
        place = next((t for t in self._ends.tokens_behind(tail) if t[0] == end), None)
        if place is None:
            plan.pieces.append(Piece("silent_end", "", in_loss))
            return 0
        self._add(plan, tail[: place.start()], in_loss, cut=False)
        plan.pieces.append(Piece("end", "", in_loss))
        return place.end()

    def _fill_plan(self, plan: _Plan, texts: Sequence[str]) -> list[Piece]:
        return [
            Piece("text", self.escape_role_marks(texts[piece.number]), piece.in_loss, piece.cut)
            if isinstance(piece, _TextGap)
            else piece
            for piece in plan.pieces
        ]

    # -- outlines -----------------------------------------------------------------------------

    def _outline(self, turns: Sequence[Turn]) -> tuple[Outline, list[str]]:
        """The outline of turns, and the texts that belong into its gaps."""
        texts: list[str] = []
        messages: list[Message] = []
        merged, watched = "", self._watched["assistant"]
        for turn in turns:
            if turn.role == "assistant":
                said, thought = self._thought_and_answer(turn)
                outline = None if not thought else cut(thought, watched, texts)
                messages.append(Message("assistant", cut(said, watched, texts), outline))
                continue
            said = turn.text
            if turn.input:
                said = f"{said}\n{turn.input}" if said else turn.input
            if turn.role == "system" and self._renderings.merges:
                merged = said
                continue
            asked = cut(said, self._watched["user"], texts)
            if merged:
                # The system prompt first: its texts come before the question's.
                own = len(texts) - asked.count(GAP)
                head: list[str] = []
                asked = f"{cut(merged, self._watched['user'], head)}\n\n{asked}"
                texts[own:own] = head
                merged = ""
            messages.append(Message(turn.role, asked))
        return tuple(messages), texts

    def _thought_and_answer(self, turn: Turn) -> tuple[str, str]:
        """What an answer says, and the thought beside it."""
        if self.thinking == "off":
            return (turn.text if turn.thought else split_thought(turn.text)[1]), ""
        if self._special_think and not turn.thought:
            # Only as a whole block can they be meant: everywhere else they are harmless words.
            thought, said = split_thought(turn.text)
            return said, thought
        return turn.text, turn.thought

    def _thinks(self, answer: Message) -> bool:
        """Whether an answer is rendered as one with a thought."""
        if self.thinking != "auto":
            return self.thinking == "on"
        return answer.thought is not None or begins_thought(answer.content)

    def _opens_thought(self, outline: Outline) -> bool:
        """Whether an answer is asked for as one with a thought."""
        if self.thinking != "auto":
            return self.thinking == "on"
        return self._renderings.opening(outline, True).prompt == self._renderings.render(
            outline, True, None
        )

    # -- for other programs -------------------------------------------------------------------

    @property
    def stable(self) -> bool:
        """Whether past turns are rendered as they were when they were current."""
        turn = (Message("user", GAP), ANSWERS[False, "field"])
        return len(self._find_plans(turn * 2, frozenset([0, 1]))) == 1

    def _prompt(self, shape: Shape) -> list[Slot]:
        """The skeleton of a prompt whose texts are all plain."""
        turns = [Turn("system", "s")] if shape.system else []
        places = [("system", -1)] if shape.system else []
        for n in range(len(shape.inputs)):
            turns += [Turn("user", "u"), Turn("assistant", "a")]
            places += [("user", n), ("assistant", n)]
        outline, _ = self._outline(turns[:-1])
        text = self._renderings.opening(outline, self._opens_thought(outline)).prompt
        end = self.eos_token if self.end_token == EOS else self.end_token
        slots: list[Slot] = []
        lead = ""  # white space before an answer belongs to it
        for kind, what, _, begins in self._plan(text, outline, frozenset()).pieces:
            if isinstance(what, int):
                name, turn = places[what]
                slots.append(Slot(name, lead, turn))  # type: ignore[arg-type]
                lead = ""
            elif kind == "mark" and begins and not what.strip() and slots[-1].kind != "end":
                lead = what
            elif (
                kind == "mark" and slots and slots[-1].kind == "assistant" and what.startswith(end)
            ):
                slots += [Slot("end"), Slot("mark", what.removeprefix(end))]
            elif kind != "silent_end":
                slots.append(Slot(kind, what))  # type: ignore[arg-type]
        return slots

    def thought_marks(self) -> ThoughtMarks:
        one = (Message("user", GAP),)
        asked = self._opens_thought(one)
        on = self._renderings.rendered((*one, ANSWERS[True, "field"]), True).body
        first, _, rest = on.partition(placeholder(1))
        close = rest.partition(placeholder(2))[0]
        return ThoughtMarks(first or "<think>", close, opened=asked and not first.strip())

    def _literals(self) -> list[str]:
        roles = ["user", "assistant", "user"] if self._renderings.merges else ["system", "user"]
        text = self._renderings.render(tuple(Message(role, GAP) for role in roles), True, None)
        if not self._renderings.merges:
            text += self._renderings.render(
                (Message("user", GAP), ANSWERS[False, "field"]), False, None
            )
        pieces = self._special.split(PLACEHOLDER.sub("\n", text))
        return [p for p in pieces if p]

    def _role_marks(self) -> list[str]:
        return sorted({m for part in self._literals() for m in re.findall(r"<\|\w+\|>", part)})

    def reference(self, turns: Sequence[Turn]) -> str:
        """The template's own rendering of a whole conversation, its texts in it as they are."""
        outline, _ = self._outline(turns)
        on = self._thinks(outline[-1])
        opening = self._renderings.opening(outline[:-1], on)
        messages: list[dict[str, Any]] = []
        merged = ""
        for turn in turns:
            said, thought = self._thought_and_answer(turn)
            if turn.input:
                said = f"{said}\n{turn.input}" if said else turn.input
            if turn.role == "system" and self._renderings.merges:
                merged = f"{said}\n\n"
                continue
            if thought and opening.thought == "inline":
                said, thought = f"{THINK.replace(GAP, thought)}{said}", ""
            messages.append(self._renderings.message(turn.role, merged + said, thought or None))
            merged = ""
        return self._renderings.shown(messages, False, opening.flag)


def _border(prompt: str, body: str) -> str:
    """What is to be said of the place where an answer begins."""
    if prompt.endswith("\n") and body[:1].isspace():
        return "the answer begins with white space, which is encoded apart from the prompt's end"
    return ""


def _thought_of(body: str) -> str:
    """The part of an answer's rendering that is its thought and the marks around it."""
    at = body.rfind("</think>")
    if at >= 0:
        end = re.compile(r"</think>\s*").match(body, at)
        return body[: end.end()] if end else ""
    holes = list(PLACEHOLDER.finditer(body))
    return body[: holes[1].start()] if len(holes) > 1 else ""
