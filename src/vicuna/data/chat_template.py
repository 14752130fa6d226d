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
from typing import Any, NamedTuple

from vicuna.data.encode import Segment
from vicuna.data.jinja_program import OTHER, Program
from vicuna.data.template_base import (
    Shape,
    Slot,
    Template,
    ThoughtMarks,
    TrainTurns,
    split_thought,
)
from vicuna.data.types import Conversation, Turn
from vicuna.errors import UserError

_GAP = "\0"  # a text's place in an outline
_HOLE = re.compile(r"XqZ(\d+)ZqX")
_THINK = "<think>\n\0\n</think>\n\n"
_MANY = 20_000  # outlines that are kept


class _Message(NamedTuple):
    """One message's outline. thought: None if nothing stands beside the content."""

    role: str
    content: str
    thought: str | None = None

    @property
    def gaps(self) -> int:
        return self.content.count(_GAP) + (self.thought or "").count(_GAP)


_Outline = tuple[_Message, ...]
# How a thought gets into an answer: as a field of the message, or in its content.
_WAYS = {True: ("field", "inline"), False: ("field",)}
_ANSWERS = {
    (False, "field"): _Message("assistant", _GAP),
    (True, "field"): _Message("assistant", _GAP, _GAP),
    (True, "inline"): _Message("assistant", _THINK + _GAP),
}


@dataclass(frozen=True)
class _Rendered:
    """A rendering whose last message is an answer: the text up to where the model begins, what it
    says, and what follows. Holes stand for texts.

    own: whether the three together are what the template renders.
    """

    prompt: str
    body: str
    tail: str
    own: bool = True

    @property
    def text(self) -> str:
        return self.prompt + self.body + self.tail


@dataclass(frozen=True)
class _Opening:
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


@dataclass
class _Plan:
    """One example of an outline: pieces to be filled with the conversation's texts.

    pieces: (kind, text or number of a text, supervised, cut).
    """

    pieces: list[tuple[str, str | int, bool, bool]] = field(default_factory=list)


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
        special = "|".join(map(re.escape, self.controls))
        self._special = re.compile(special)
        self._end = re.compile(rf"\s{{0,2}}(?:{special})+")
        # What looks like a special token is never shown to the template: nobody can write one.
        watched = [w for w in self._program.watched if not self._special.search(w)]
        # Answers of reasoning models hold a thought between these two.
        self._special_think = bool({"<think>", "</think>"} & set(self.controls))
        marks = [] if self._special_think else ["<think>", "</think>"]
        self._watched = {"user": _any_of(watched), "assistant": _any_of([*watched, *marks])}
        self._openings: dict[tuple[_Outline, bool], _Opening] = {}
        self._renderings: dict[tuple[_Outline, bool], _Rendered] = {}
        self._plans: dict[Any, list[_Plan]] = {}
        self._in_parts, self._merges = False, False
        self.notes = {}
        self._find_form()
        self.end_token = self._find_end()
        super().__init__()

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
        self._plans, self._openings, self._renderings = {}, {}, {}

    # -- rendering ----------------------------------------------------------------------------

    def _messages(self, outline: _Outline) -> list[dict[str, Any]]:
        """Messages whose texts are placeholders, numbered from the first to the last."""
        count = iter(range(sum(m.gaps for m in outline)))

        def spelled(text: str) -> str:
            pieces = text.split(_GAP)
            return pieces[0] + "".join(_hole(next(count)) + p for p in pieces[1:])

        return [
            self._message(
                m.role, None if m.thought is None else spelled(m.thought), spelled(m.content)
            )
            for m in outline
        ]

    def _message(self, role: str, thought: str | None, content: str) -> dict[str, Any]:
        message: dict[str, Any] = {"role": role, "content": content}
        if self._in_parts:
            message["content"] = [{"type": "text", "text": content}]
        if thought is not None:
            message.update(reasoning_content=thought, reasoning=thought, thinking=thought)
        return message

    def _render(self, outline: _Outline, generate: bool, thinking: bool | None) -> str:
        try:
            return self._program.render(self._messages(outline), generate, thinking)
        except Exception as e:  # a program of somebody else's may raise anything
            raise UserError(
                f"the tokenizer's chat template cannot render this conversation: {e}",
                where="template auto",
                fix=OTHER,
            ) from e

    def _find_form(self) -> None:
        """How the template takes messages: contents as texts or in parts, and system prompts as
        messages or before the first question."""
        one = (_Message("user", _GAP), _Message("assistant", _GAP))
        error: UserError | None = None
        for self._in_parts in (False, True):
            try:
                text = self._render(one, False, None)
            except UserError as e:
                error = error or e
                continue
            if _hole(0) in text and _hole(1) in text:
                break
        else:
            self._in_parts = False
            raise error or UserError(
                "the tokenizer's chat template leaves out what is said",
                where="template auto",
                fix=OTHER,
            )
        system = (_Message("system", _GAP), _Message("user", _GAP))
        try:
            self._merges = _hole(0) not in self._render(system, True, None)
        except UserError:
            self._merges = True

    def _find_end(self) -> str:
        """The control token that ends an answer; "eos" is the tokenizer's own."""
        one = (_Message("user", _GAP), _Message("assistant", _GAP))
        token = self._ends_with(self._rendered(one, False).tail)
        return "eos" if token in ("", self.eos_token) else token

    def _ends_with(self, tail: str) -> str:
        """The control token, among those directly behind an answer, that ends it: the tokenizer's
        end if it is there, else the first."""
        found = self._end.match(tail)
        tokens = self._special.findall(found[0]) if found else []
        return self.eos_token if self.eos_token in tokens else tokens[0] if tokens else ""

    # -- where an answer begins ---------------------------------------------------------------

    def _opening(self, before: _Outline, on: bool) -> _Opening:
        key = before, on
        if key not in self._openings:
            if len(self._openings) > _MANY:
                self._openings.clear()
            self._openings[key] = self._find_opening(before, on)
        return self._openings[key]

    def _find_opening(self, before: _Outline, on: bool) -> _Opening:
        """The prompt: the template's own, if its rendering with an answer begins with it."""
        prompt = self._render(before, True, on)
        if prompt == self._render(before, False, on):
            return self._unasked_opening(before, on, prompt)
        for how in _WAYS[on]:
            for flag in (None, on):
                ahead = self._ahead(before, _ANSWERS[on, how], flag)
                lead = _behind(ahead, prompt)
                if lead is not None and (on or not lead.strip()):
                    return _Opening(prompt, flag, prompt, how)
        return self._odd_opening(before, on, prompt)

    def _ahead(self, before: _Outline, answer: _Message, flag: bool | None) -> str | None:
        """What stands before the first text of an answer, None if the answer is left out."""
        hole = _hole(sum(m.gaps for m in before))
        ahead, there, _ = self._render((*before, answer), False, flag).partition(hole)
        return ahead if there else None

    def _unasked_opening(self, before: _Outline, on: bool, prompt: str) -> _Opening:
        """A template that knows no generation prompt: what it writes before every answer."""
        plain = self._ahead(before, _ANSWERS[False, "field"], None)
        if plain is None or not plain.startswith(prompt):
            return self._odd_opening(before, on, prompt)
        if not on:
            plain = plain.removesuffix(" ")
            return _Opening(plain, None, plain)
        for how in _WAYS[True]:
            thinking = self._ahead(before, _ANSWERS[True, how], None)
            if thinking is not None:
                same = _in_common(plain, thinking)
                if same != plain:
                    same = same[: max(len(prompt), same.rfind("<"))] if "<" in same else same
                same = same.removesuffix(" ")
                return _Opening(same, None, same, how)
        return self._odd_opening(before, on, prompt)

    def _odd_opening(self, before: _Outline, on: bool, prompt: str) -> _Opening:
        ahead = self._ahead(before, _ANSWERS[False, "field"], None)
        if ahead is None:
            raise UserError(
                "the tokenizer's chat template leaves out the last answer",
                where="template auto",
                fix=OTHER,
            )
        if on and prompt.startswith(ahead):
            self._note("thoughts stand in no answer that this template renders: put there, <think>")
            return _Opening(prompt, None, ahead, "put")
        if ahead.startswith(prompt):
            # A block that the template writes before an answer without a thought is given, and not
            # learned. A space at its end belongs to the answer.
            ahead = ahead.removesuffix(" ")
            return _Opening(ahead, None, ahead)
        if prompt.startswith(ahead):
            extra = prompt[len(ahead) :]
            if extra.strip():
                self._note(
                    f"the template begins an answer with {extra!r}, but its rendering of an answer "
                    "without a thought does not have it: prompts without thinking leave it out"
                )
            return _Opening(ahead, None, ahead)
        self._note(
            "the template renders what comes before an answer in another way once the answer is "
            "there: training follows the prompt"
        )
        return _Opening(prompt, None, ahead, "put" if on else "field")

    def _note(self, text: str) -> None:
        self.notes.setdefault(text)

    # -- a conversation with its answer -------------------------------------------------------

    def _rendered(self, outline: _Outline, on: bool) -> _Rendered:
        key = outline, on
        if key not in self._renderings:
            if len(self._renderings) > _MANY:
                self._renderings.clear()
            self._renderings[key] = self._find_rendered(outline, on)
        return self._renderings[key]

    def _find_rendered(self, outline: _Outline, on: bool) -> _Rendered:
        before, answer = outline[:-1], outline[-1]
        opening = self._opening(before, on)
        hole = _hole(sum(m.gaps for m in before))
        plain = self._render((*before, _ANSWERS[False, "field"]), False, opening.flag)
        tail = plain.partition(hole)[2]
        if opening.thought == "inline" and answer.thought is not None:
            self._note(
                "the template has no place for a thought beside an answer: it is put into the "
                "answer, between <think> and </think>"
            )
            answer = _Message("assistant", _THINK.replace(_GAP, answer.thought) + answer.content)
        own = opening.thought != "put"
        if own:
            text = self._render((*before, answer), False, opening.flag)
            own = text.startswith(opening.before)
        if own:
            rest = text[len(opening.before) :]
            own = opening.before == opening.prompt
        else:
            rest = self._put(before, answer, opening.prompt) + tail
        tail = _common_end(rest, tail)
        return _Rendered(opening.prompt, rest[: len(rest) - len(tail)], tail, own)

    def _put(self, before: _Outline, answer: _Message, prompt: str) -> str:
        """An answer with its thought, as reasoning models write it."""
        content = answer.content
        if answer.thought is not None:
            content = _THINK.replace(_GAP, answer.thought) + content
        if prompt.rstrip().endswith("<think>"):
            content = content.lstrip().removeprefix("<think>")
            content = content.removeprefix("\n") if prompt.endswith("\n") else content
        first = sum(m.gaps for m in before)
        pieces = content.split(_GAP)
        return pieces[0] + "".join(_hole(first + n) + p for n, p in enumerate(pieces[1:]))

    # -- examples and prompts -----------------------------------------------------------------

    def prompt(self, turns: Sequence[Turn]) -> list[Segment]:
        outline, texts = self._outline(turns)
        on = self._opens_thought(outline)
        key = outline, on
        if key not in self._plans:
            text = self._opening(outline, on).prompt
            self._keep(key, [self._plan(text, outline, frozenset())])
        return self._fill_plan(self._plans[key][0], texts)

    def examples(
        self, conversation: Conversation, train_turns: TrainTurns = "all"
    ) -> list[list[Segment]]:
        if conversation.kind == "text":
            return super().examples(conversation, train_turns)
        turns = conversation.turns
        taught = self._taught(turns, train_turns)
        if not taught:
            return []
        outline, texts = self._outline(turns)
        key = outline, taught, "examples"
        if key not in self._plans:
            self._keep(key, self._find_plans(outline, frozenset(taught)))
        return [self._fill_plan(plan, texts) for plan in self._plans[key]]

    def _keep(self, key: Any, plans: list[_Plan]) -> None:
        if len(self._plans) > _MANY:
            self._plans.clear()
        self._plans[key] = plans

    def _find_plans(self, outline: _Outline, taught: frozenset[int]) -> list[_Plan]:
        """One example with all answers that look there as they look when they are the last; one
        for each other answer."""
        answers = [i for i, m in enumerate(outline) if m.role == "assistant"]
        whole = self._rendered(outline, self._thinks(outline[-1]))
        inside, apart = set(), []
        for n in sorted(taught):
            current = self._rendered(outline[: answers[n] + 1], self._thinks(outline[answers[n]]))
            if whole.text.startswith(current.prompt + current.body):
                inside.add(n)
            else:
                apart.append(n)
        plans = []
        for n in apart:
            past = outline[: answers[n] + 1]
            current = self._rendered(past, self._thinks(past[-1]))
            plans.append(self._plan(current.text, past, frozenset([n])))
        if inside:
            plans.append(self._plan(whole.text, outline, frozenset(inside)))
        return plans

    def _plan(self, text: str, outline: _Outline, taught: frozenset[int]) -> _Plan:
        """Cut a rendering at those of its answers that look as they did when they were the last."""
        plan = _Plan()
        at, number = 0, -1
        for i, message in enumerate(outline):
            if message.role != "assistant":
                continue
            number += 1
            current = self._rendered(outline[: i + 1], self._thinks(message))
            if not text.startswith(current.prompt + current.body) or len(current.prompt) < at:
                continue
            learned = number in taught
            self._add(plan, text[at : len(current.prompt)], False, cut=bool(at))
            at = len(current.prompt)
            spoken = current.body
            if not self.thinking_loss and self._thinks(message):
                thought = _thought_of(spoken)
                self._add(plan, thought, False, cut=True)
                self._add(plan, spoken[len(thought) :], learned, cut=not thought)
            else:
                self._add(plan, spoken, learned, cut=True)
            if not spoken:
                plan.pieces.append(("text", "", learned, True))
            at += len(spoken)
            at += self._add_end(plan, text[at:], learned)
        self._add(plan, text[at:], False, cut=bool(at))
        return plan

    def _add(self, plan: _Plan, text: str, supervised: bool, cut: bool) -> None:
        for n, part in enumerate(_HOLE.split(text)):
            if n % 2:
                plan.pieces.append(("text", int(part), supervised, cut))
                cut = False
            elif part:
                plan.pieces.append(("mark", part, supervised, cut))
                cut = False

    def _add_end(self, plan: _Plan, tail: str, supervised: bool) -> int:
        """What closes an answer; the characters of it that are the answer's."""
        end = self.eos_token if self.end_token == "eos" else self.end_token
        found = self._end.match(tail)
        tokens = list(self._special.finditer(found[0])) if found else []
        place = next((t for t in tokens if t[0] == end), None)
        if place is None:
            plan.pieces.append(("silent_end", "", supervised, False))
            return 0
        self._add(plan, tail[: place.start()], supervised, cut=False)
        plan.pieces.append(("end", "", supervised, False))
        return place.end()

    def _fill_plan(self, plan: _Plan, texts: Sequence[str]) -> list[Segment]:
        return [
            Segment(kind, self.harmless(texts[what]) if isinstance(what, int) else what, sup, cut)  # type: ignore[arg-type]
            for kind, what, sup, cut in plan.pieces
        ]

    # -- outlines -----------------------------------------------------------------------------

    def _outline(self, turns: Sequence[Turn]) -> tuple[_Outline, list[str]]:
        """The outline of turns, and the texts that belong into its gaps."""
        texts: list[str] = []
        messages: list[_Message] = []
        merged = ""
        for turn in turns:
            if turn.role == "assistant":
                said, thought = self._spoken(turn)
                outline = None if not thought else self._cut(thought, "assistant", texts)
                messages.append(_Message("assistant", self._cut(said, "assistant", texts), outline))
                continue
            said = turn.text
            if turn.input:
                said = f"{said}\n{turn.input}" if said else turn.input
            if turn.role == "system" and self._merges:
                merged = said
                continue
            cut = self._cut(said, "user", texts)
            if merged:
                # The system prompt first: its texts come before the question's.
                own = len(texts) - cut.count(_GAP)
                head: list[str] = []
                cut = f"{self._cut(merged, 'user', head)}\n\n{cut}"
                texts[own:own] = head
                merged = ""
            messages.append(_Message(turn.role, cut))
        return tuple(messages), texts

    def _spoken(self, turn: Turn) -> tuple[str, str]:
        """What an answer says, and the thought beside it."""
        if self.thinking == "off":
            return (turn.text if turn.thought else split_thought(turn.text)[1]), ""
        if self._special_think and not turn.thought:
            # Only as a whole block can they be meant: everywhere else they are harmless words.
            thought, said = split_thought(turn.text)
            return said, thought
        return turn.text, turn.thought

    def _cut(self, text: str, role: str, texts: list[str]) -> str:
        """The outline of a text; what fills its gaps goes to `texts`.

        A template sees the words that it looks for, and the white space beside them and at both
        ends.
        """
        if not text:
            return ""
        words = self._watched[role]
        found = list(words.finditer(text)) if words else []
        if not found and not (text[0].isspace() or text[-1].isspace()):
            texts.append(text)
            return _GAP
        outline, at = [], 0
        for start, end in [*((f.start(), f.end()) for f in found), (len(text), len(text))]:
            between = text[at:start]
            inner = between.strip()
            if inner:
                texts.append(inner)
                left, _, right = between.partition(inner)
                outline.append(f"{left}{_GAP}{right}")
            else:
                outline.append(between)
            outline.append(text[start:end])
            at = end
        return "".join(outline)

    def _thinks(self, answer: _Message) -> bool:
        """Whether an answer is rendered as one with a thought."""
        if self.thinking != "auto":
            return self.thinking == "on"
        return answer.thought is not None or _begins_thought(answer.content)

    def _opens_thought(self, outline: _Outline) -> bool:
        """Whether an answer is asked for as one with a thought."""
        if self.thinking != "auto":
            return self.thinking == "on"
        return self._opening(outline, True).prompt == self._render(outline, True, None)

    # -- for other programs -------------------------------------------------------------------

    @property
    def stable(self) -> bool:
        """Whether past turns are rendered as they were when they were current."""
        turn = (_Message("user", _GAP), _ANSWERS[False, "field"])
        return len(self._find_plans(turn * 2, frozenset([0, 1]))) == 1

    def _prompt(self, shape: Shape) -> list[Slot]:
        """The skeleton of a prompt whose texts are all plain."""
        turns = [Turn("system", "s")] if shape.system else []
        places = [("system", -1)] if shape.system else []
        for n in range(len(shape.inputs)):
            turns += [Turn("user", "u"), Turn("assistant", "a")]
            places += [("user", n), ("assistant", n)]
        outline, _ = self._outline(turns[:-1])
        text = self._opening(outline, self._opens_thought(outline)).prompt
        slots: list[Slot] = []
        lead = ""  # white space before an answer belongs to it
        for kind, what, _, cut in self._plan(text, outline, frozenset()).pieces:
            if isinstance(what, int):
                name, turn = places[what]
                slots.append(Slot(name, lead, turn))  # type: ignore[arg-type]
                lead = ""
            elif kind == "mark" and cut and not what.strip() and slots[-1].kind != "end":
                lead = what
            elif kind != "silent_end":
                slots.append(Slot(kind, what))  # type: ignore[arg-type]
        return slots

    def thought_marks(self) -> ThoughtMarks:
        one = (_Message("user", _GAP),)
        asked = self._opens_thought(one)
        on = self._rendered((*one, _ANSWERS[True, "field"]), True).body
        first, _, rest = on.partition(_hole(1))
        close = rest.partition(_hole(2))[0]
        return ThoughtMarks(first or "<think>", close, opened=asked and not first.strip())

    def _literals(self) -> list[str]:
        roles = ["user", "assistant", "user"] if self._merges else ["system", "user"]
        text = self._render(tuple(_Message(role, _GAP) for role in roles), True, None)
        if not self._merges:
            text += self._render((_Message("user", _GAP), _ANSWERS[False, "field"]), False, None)
        pieces = self._special.split(_HOLE.sub("\n", text))
        return [p for p in pieces if p]

    def _role_marks(self) -> list[str]:
        return sorted({m for part in self._literals() for m in re.findall(r"<\|\w+\|>", part)})

    def reference(self, turns: Sequence[Turn]) -> str:
        """The template's own rendering of a whole conversation, its texts in it as they are."""
        outline, _ = self._outline(turns)
        on = self._thinks(outline[-1])
        opening = self._opening(outline[:-1], on)
        messages: list[dict[str, Any]] = []
        merged = ""
        for turn in turns:
            said, thought = self._spoken(turn)
            if turn.input:
                said = f"{said}\n{turn.input}" if said else turn.input
            if turn.role == "system" and self._merges:
                merged = f"{said}\n\n"
                continue
            if thought and opening.thought == "inline":
                said, thought = f"{_THINK.replace(_GAP, thought)}{said}", ""
            messages.append(self._message(turn.role, thought or None, merged + said))
            merged = ""
        return self._program.render(messages, False, opening.flag)


def _begins_thought(content: str) -> bool:
    return content.lstrip().startswith("<think>") and "</think>" in content


def _any_of(words: Sequence[str]) -> re.Pattern[str] | None:
    longest_first = sorted(set(words), key=lambda w: (-len(w), w))
    return re.compile("|".join(map(re.escape, longest_first))) if words else None


def _thought_of(body: str) -> str:
    """The part of an answer's rendering that is its thought and the marks around it."""
    at = body.rfind("</think>")
    if at >= 0:
        end = re.compile(r"</think>\s*").match(body, at)
        return body[: end.end()] if end else ""
    holes = list(_HOLE.finditer(body))
    return body[: holes[1].start()] if len(holes) > 1 else ""


def _behind(text: str | None, start: str) -> str | None:
    """What follows `start` in a text that begins with it; None in any other."""
    return text[len(start) :] if text is not None and text.startswith(start) else None


def _in_common(a: str, b: str) -> str:
    """What two texts begin with."""
    return a[: next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))]


def _common_end(text: str, end: str) -> str:
    return end if text.endswith(end) else ""


def _hole(n: int) -> str:
    return f"XqZ{n}ZqX"
