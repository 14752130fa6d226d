"""How a chat template renders a conversation whose last message is an answer.

A rendering falls into three: the prompt, up to where the model begins; what it says; and what
follows. The prompt is the template's own, if its rendering with the answer begins with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vicuna.data.templates.placeholders import (
    ANSWERS,
    GAP,
    MANY,
    THINK,
    Message,
    Outline,
    numbered,
    placeholder,
    with_placeholders,
)
from vicuna.data.templates.sandbox import OTHER, LimitError, Program, RenderError
from vicuna.errors import UserError

# How a thought gets into an answer: as a field of the message, or in its content.
_WAYS = {True: ("field", "inline"), False: ("field",)}


@dataclass(frozen=True)
class Rendered:
    """A rendering whose last message is an answer: the text up to where the model begins, what it
    says, and what follows. Holes stand for texts.

    own: whether the three together are what the template renders.
    odd: what the template does with this answer that is not taught, in words.
    """

    prompt: str
    body: str
    tail: str
    own: bool = True
    oddity: str = ""

    @property
    def text(self) -> str:
        return self.prompt + self.body + self.tail


@dataclass(frozen=True)
class Opening:
    """How an answer begins.

    flag: `enable_thinking` of the rendering with an answer.
    before: what the template renders before the answer; another text than `prompt` if the rendering
        with an answer does not begin as the prompt.
    thought: how a thought that stands beside the answer gets into it: as a `field` of the message,
        `inline` in its content, or it has to be `put` there, because the template leaves it out.
    """

    prompt: str
    flag: bool | None
    before: str
    thought: str = "field"


class Renderings:
    """A template's renderings of outlines, each made once.

    in_parts: whether the template takes contents in parts. merges: whether a system prompt has no
    place of its own, and goes before the first question.
    notes: in what training differs from the template's own rendering, as far as it was met.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self.notes: dict[str, None] = {}
        self._openings: dict[tuple[Outline, bool], Opening] = {}
        self._whole: dict[tuple[Outline, bool], Rendered] = {}
        self.in_parts = self.merges = False
        self._find_form()

    def message(self, role: str, content: str, thought: str | None = None) -> dict[str, Any]:
        """A message as the template takes it."""
        message: dict[str, Any] = {"role": role, "content": content}
        if self.in_parts:
            message["content"] = [{"type": "text", "text": content}]
        if thought is not None:
            message.update(reasoning_content=thought, reasoning=thought, thinking=thought)
        return message

    def render(self, outline: Outline, generate: bool, thinking: bool | None = None) -> str:
        """The rendering of an outline; see `Program.render`."""
        return self.shown([self.message(*m) for m in numbered(outline)], generate, thinking)

    def shown(
        self, messages: list[dict[str, Any]], generate: bool, thinking: bool | None = None
    ) -> str:
        """The rendering of messages.

        Raises: UserError if the template refuses them, or takes more than it may.
        """
        try:
            return self._program.render(messages, generate, thinking)
        except RenderError as e:
            raise UserError(
                "the tokenizer's chat template cannot render this conversation: {error}",
                error=e.args[0],
                where="template auto",
                fix=OTHER,
            ) from e

    def _find_form(self) -> None:
        """How the template takes messages: contents as texts or in parts, and system prompts as
        messages or before the first question."""
        one = (Message("user", GAP), Message("assistant", GAP))
        error: UserError | None = None
        for self.in_parts in (False, True):
            try:
                text = self.render(one, False, None)
            except UserError as e:
                if isinstance(e.__cause__, LimitError):
                    raise
                error = error or e
                continue
            if placeholder(0) in text and placeholder(1) in text:
                break
        else:
            self.in_parts = False
            raise error or UserError(
                "the tokenizer's chat template leaves out what is said",
                where="template auto",
                fix=OTHER,
            )
        system = (Message("system", GAP), Message("user", GAP))
        try:
            self.merges = placeholder(0) not in self.render(system, True, None)
        except UserError as e:
            if isinstance(e.__cause__, LimitError):
                raise
            self.merges = True

    def opening(self, before: Outline, on: bool) -> Opening:
        """How the answer to a question begins, with or without a thought."""
        key = before, on
        if key not in self._openings:
            if len(self._openings) > MANY:
                self._openings.clear()
            self._openings[key] = self._find_opening(before, on)
        return self._openings[key]

    def _find_opening(self, before: Outline, on: bool) -> Opening:
        """The prompt: the template's own, if its rendering with an answer begins with it."""
        prompt = self.render(before, True, on)
        if prompt == self.render(before, False, on):
            return self._unasked_opening(before, on, prompt)
        for how in _WAYS[on]:
            for flag in (None, on):
                ahead = self._ahead(before, ANSWERS[on, how], flag)
                lead = _behind(ahead, prompt)
                if lead is not None and (on or not lead.strip()):
                    return Opening(prompt, flag, prompt, how)
        return self._other_opening(before, on, prompt)

    def _ahead(self, before: Outline, answer: Message, flag: bool | None) -> str | None:
        """What stands before the first text of an answer, None if the answer is left out."""
        first = placeholder(sum(m.gaps for m in before))
        ahead, there, _ = self.render((*before, answer), False, flag).partition(first)
        return ahead if there else None

    def _unasked_opening(self, before: Outline, on: bool, prompt: str) -> Opening:
        """A template that knows no generation prompt: what it writes before every answer."""
        plain = self._ahead(before, ANSWERS[False, "field"], None)
        if plain is None or not plain.startswith(prompt):
            return self._other_opening(before, on, prompt)
        if not on:
            plain = plain.removesuffix(" ")
            return Opening(plain, None, plain)
        for how in _WAYS[True]:
            thinking = self._ahead(before, ANSWERS[True, how], None)
            if thinking is not None:
                same = _in_common(plain, thinking)
                if same != plain:
                    same = same[: max(len(prompt), same.rfind("<"))] if "<" in same else same
                same = same.removesuffix(" ")
                return Opening(same, None, same, how)
        return self._other_opening(before, on, prompt)

    def _other_opening(self, before: Outline, on: bool, prompt: str) -> Opening:
        ahead = self._ahead(before, ANSWERS[False, "field"], None)
        if ahead is None:
            raise UserError(
                "the tokenizer's chat template leaves out the last answer",
                where="template auto",
                fix=OTHER,
            )
        if on and prompt.startswith(ahead):
            self._note("thoughts stand in no answer that this template renders: put there, <think>")
            return Opening(prompt, None, ahead, "put")
        if ahead.startswith(prompt):
            # A block that the template writes before an answer without a thought is given, and not
            # learned. A space at its end belongs to the answer.
            ahead = ahead.removesuffix(" ")
            return Opening(ahead, None, ahead)
        if prompt.startswith(ahead):
            extra = prompt[len(ahead) :]
            if extra.strip() and prompt != self.render(before, True, True):
                self._note(
                    f"the template asks for an answer without a thought with {extra!r}, but its "
                    "rendering of one does not have it: training follows the prompt"
                )
                return Opening(prompt, None, ahead)
            if extra.strip():
                self._note(
                    f"the template begins an answer with {extra!r}, but its rendering of an answer "
                    "without a thought does not have it: prompts without thinking leave it out"
                )
            return Opening(ahead, None, ahead)
        self._note(
            "the template renders what comes before an answer in another way once the answer is "
            "there: training follows the prompt"
        )
        return Opening(prompt, None, ahead, "put" if on else "field")

    def _note(self, text: str) -> None:
        self.notes.setdefault(text)

    def rendered(self, outline: Outline, on: bool) -> Rendered:
        """A conversation with its last answer."""
        key = outline, on
        if key not in self._whole:
            if len(self._whole) > MANY:
                self._whole.clear()
            self._whole[key] = self._find_rendered(outline, on)
        return self._whole[key]

    def _find_rendered(self, outline: Outline, on: bool) -> Rendered:
        before, answer = outline[:-1], outline[-1]
        opening = self.opening(before, on)
        first = sum(m.gaps for m in before)
        plain = self.render((*before, ANSWERS[False, "field"]), False, opening.flag)
        tail = plain.partition(placeholder(first))[2]
        if opening.thought == "inline" and answer.thought is not None:
            self._note(
                "the template has no place for a thought beside an answer: it is put into the "
                "answer, between <think> and </think>"
            )
            answer = Message("assistant", THINK.replace(GAP, answer.thought) + answer.content)
        own, oddity = opening.thought != "put", ""
        if own:
            text = self.render((*before, answer), False, opening.flag)
            own = text.startswith(opening.before)
            oddity = (
                "" if own else "the template takes a part of this answer for a thought; it is not"
            )
        if own:
            rest = text[len(opening.before) :]
            own = opening.before == opening.prompt
        else:
            rest = self._put(before, answer, opening.prompt) + tail
        tail = tail if rest.endswith(tail) else ""
        first += (answer.thought or "").count(GAP)
        if any(placeholder(first + n) not in rest for n in range(answer.content.count(GAP))):
            oddity = "the template leaves out a part of this answer"
        return Rendered(opening.prompt, rest[: len(rest) - len(tail)], tail, own, oddity)

    def _put(self, before: Outline, answer: Message, prompt: str) -> str:
        """An answer with its thought, as reasoning models write it."""
        content = answer.content
        if answer.thought is not None:
            content = THINK.replace(GAP, answer.thought) + content
        if prompt.rstrip().endswith("<think>"):
            content = content.lstrip().removeprefix("<think>")
            content = content.removeprefix("\n") if prompt.endswith("\n") else content
        return with_placeholders(content, sum(m.gaps for m in before))


def _behind(text: str | None, start: str) -> str | None:
    """What follows `start` in a text that begins with it; None in any other."""
    return text[len(start) :] if text is not None and text.startswith(start) else None


def _in_common(a: str, b: str) -> str:
    """What two texts begin with."""
    return a[: next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))]
