"""Templates: the one rule that turns a conversation into segments, for training and for inference.

A template knows two things: how the prompt of turn n looks (`_prompt`), and what closes an answer
(`_closing`). Training is built from the very same prompt, so what the model sees when it answers is
what it saw when it learned. Two kinds: literal strings (`templates.yaml`, or a user's own file) and
the tokenizer's own chat template (`auto`), whose literals are found by rendering it once with
placeholders in place of what was said.

Where a template renders past turns just as it rendered them when they were current, one example
teaches all turns. Where it does not (history inside an instruction, thinking removed from past
turns), every supervised turn becomes an example of its own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from vicuna.data.encode import Encoder, Segment, Vocabulary
from vicuna.data.types import Conversation, Turn
from vicuna.errors import UserError

TrainTurns = Literal["all", "last"]
_FIELD = re.compile(r"\{(bos|end|system|text|input)\}")


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


class Template:
    """Common to both kinds: from skeletons to segments."""

    name: str
    end_token: str  # the control token that ends an answer, "eos" for the tokenizer's own
    default_system: str = ""
    default_system_input: str = ""
    separate_input: bool = False

    def __init__(self) -> None:
        self._skeletons: dict[Shape, list[Slot]] = {}
        self._guard = _guard(self._literals())

    # What a kind of template must say.

    def _prompt(self, shape: Shape) -> list[Slot]:
        raise NotImplementedError

    def _closing(self) -> list[Slot]:
        raise NotImplementedError

    def _literals(self) -> list[str]:
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The template as plain data, to be written into an adapter."""
        raise NotImplementedError

    # What both can do.

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    @property
    def stable(self) -> bool:
        """Whether past turns are rendered as they were when they were current."""
        one = self._flat(self._skeleton(Shape(False, (False,))) + [Slot("assistant", turn=0)])
        two = self._flat(self._skeleton(Shape(False, (False, False))))
        return two.startswith(one)

    def prompt(self, turns: Sequence[Turn]) -> list[Segment]:
        """Segments of a prompt: `turns` ends with the user's question."""
        return self._fill(self._skeleton(_shape(self._with_system(turns))), turns, frozenset())

    def examples(
        self, conversation: Conversation, train_turns: TrainTurns = "all"
    ) -> list[list[Segment]]:
        """Segments of the training example(s) of one conversation.

        One example, all of its supervised answers in it, where the template is stable; else one
        for each supervised answer.
        """
        turns = conversation.turns
        if conversation.kind == "text":
            return [
                [Segment("bos"), Segment("text", turns[-1].text, True), Segment("end", "", True)]
            ]
        turns = self._with_system(turns)
        answers = sum(t.role == "assistant" for t in turns)
        if self.stable:
            taught = frozenset(range(answers) if train_turns == "all" else [answers - 1])
            return [self._example(turns, taught)]
        first = 0 if train_turns == "all" else answers - 1
        head = 1 if turns[0].role == "system" else 0
        return [
            self._example(turns[: head + 2 * (k + 1)], frozenset([k]))
            for k in range(first, answers)
        ]

    def _example(self, turns: Sequence[Turn], taught: frozenset[int]) -> list[Segment]:
        shape = _shape(turns)
        last = len(shape.inputs) - 1
        slots = [*self._skeleton(shape), self._answer(last), *self._closing()]
        return self._fill(_number_ends(slots), turns, taught)

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
        self, slots: Sequence[Slot], turns: Sequence[Turn], taught: frozenset[int]
    ) -> list[Segment]:
        turns = self._with_system(turns)
        system = turns[0].text if turns[0].role == "system" else ""
        questions = [t for t in turns if t.role == "user"]
        answers = [t for t in turns if t.role == "assistant"]
        placed = {slot.turn for slot in slots if slot.kind == "input"}
        segments: list[Segment] = []
        for slot in slots:
            supervised = slot.turn in taught
            if slot.kind == "mark":
                segments.append(Segment("mark", slot.text, supervised))
            elif slot.kind in ("bos", "end", "silent_end"):
                segments.append(Segment(slot.kind, "", supervised))
            elif slot.kind == "assistant":
                text = slot.text + self.harmless(answers[slot.turn].text)
                segments.append(Segment("text", text, supervised))
            else:
                segments.append(Segment("text", self._said(slot, system, questions, placed)))
        return segments

    def _said(self, slot: Slot, system: str, questions: Sequence[Turn], placed: set[int]) -> str:
        """What stands in a slot; an input without a place of its own follows its question."""
        if slot.kind == "system":
            return self.harmless(system)
        turn = questions[slot.turn]
        if slot.kind == "input":
            return self.harmless(turn.input)
        if turn.input and slot.turn not in placed:
            return self.harmless(f"{turn.text}\n{turn.input}" if turn.text else turn.input)
        return self.harmless(turn.text)

    def harmless(self, text: str) -> str:
        """The text with this template's plain-word role marks made unable to open a turn."""
        return self._guard.sub(r" \g<0>", text) if self._guard else text


def _shape(turns: Sequence[Turn]) -> Shape:
    return Shape(turns[0].role == "system", tuple(bool(t.input) for t in turns if t.role == "user"))


def _number_ends(slots: Sequence[Slot]) -> list[Slot]:
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


def _guard(literals: Sequence[str]) -> re.Pattern[str] | None:
    """A pattern of the role marks that are plain words: `### Response:`, `User:`, `[INST]`."""
    lines: set[str] = set()
    brackets: set[str] = set()
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


# -- literal templates ----------------------------------------------------------------------------


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
            raise UserError(what, where=f"template {name}", fix=f"Known keys: {sorted(known)}")
        self.name = name
        self.spec = _Spec(**spec)
        for key in ("user", "assistant"):
            if "{text}" not in getattr(self.spec, key):
                raise UserError(f"{key} needs {{text}}", where=f"template {name}")
        self.end_token = self.spec.end
        self.default_system = self.spec.default_system
        self.default_system_input = self.spec.default_system_input
        self.separate_input = bool(self.spec.user_input or self.spec.first_user_input)
        super().__init__()

    def to_dict(self) -> dict[str, Any]:
        given = {k: v for k, v in self.spec.__dict__.items() if v and k != "about"}
        return {"kind": "literal", "name": self.name, **given}

    def _literals(self) -> list[str]:
        spec = self.spec
        texts = [spec.start, spec.user, spec.user_input, spec.first_user, spec.first_user_input]
        texts += [spec.past_user, spec.past_first_user, spec.past_assistant, spec.assistant]
        texts += [spec.system]
        return [part for text in texts for part in _FIELD.split(text)]

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

    def _example(self, turns: Sequence[Turn], taught: frozenset[int]) -> list[Segment]:
        # The white space before an answer's text belongs to the answer (see templates.yaml).
        shape = _shape(turns)
        last = len(shape.inputs) - 1
        answer = _slots(self.spec.assistant, last, answer=True)
        return self._fill(_number_ends([*self._skeleton(shape), *answer]), turns, taught)


def _slots(text: str, turn: int = -1, answer: bool = False) -> list[Slot]:
    """Parse one template string into slots."""
    slots: list[Slot] = []
    for i, part in enumerate(_FIELD.split(text)):
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


# -- the tokenizer's own chat template ----------------------------------------------------------


class ChatTemplate(Template):
    """A tokenizer's own (Jinja) chat template, rendered in a sandbox.

    Its literals are found by rendering it with placeholders; what people wrote never passes through
    Jinja, so it can neither be changed nor taken for special tokens.
    """

    def __init__(
        self,
        source: str,
        bos_token: str,
        eos_token: str,
        controls: Sequence[str],
        name: str = "auto",
    ) -> None:
        self.name = name
        self.source, self.bos_token, self.eos_token = source, bos_token, eos_token
        self.controls = sorted(set(controls) | {eos_token}, key=len, reverse=True)
        self._compiled = _compile(source)
        self.end_token, self._tail = self._find_end()
        self._lead = self._find_lead()
        super().__init__()

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "jinja",
            "name": self.name,
            "source": self.source,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "controls": self.controls,
        }

    def _render(self, messages: list[dict[str, str]], generate: bool) -> str:
        return self._compiled.render(
            messages=messages,
            add_generation_prompt=generate,
            bos_token=self.bos_token,
            eos_token=self.eos_token,
            tools=None,
            documents=None,
            enable_thinking=False,
        )

    def _messages(self, shape: Shape, answered: bool, merge_system: bool) -> list[dict[str, str]]:
        messages: list[dict[str, str]] = []
        if shape.system and not merge_system:
            messages.append({"role": "system", "content": _hole("system", 0)})
        last = len(shape.inputs) - 1
        for n in range(len(shape.inputs)):
            content = _hole("user", n)
            if n == 0 and shape.system and merge_system:
                content = f"{_hole('system', 0)}\n\n{content}"
            messages.append({"role": "user", "content": content})
            if n < last or answered:
                messages.append({"role": "assistant", "content": _hole("assistant", n)})
        return messages

    def _try_render(self, shape: Shape, answered: bool) -> str:
        for merge in (False, True):
            try:
                text = self._render(self._messages(shape, answered, merge), not answered)
            except Exception as e:
                if not merge and shape.system:
                    continue
                raise UserError(
                    f"the tokenizer's chat template cannot render this conversation: {e}",
                    where="template auto",
                    fix="Choose another one with --template (alpaca, chatml, llama3 ...).",
                ) from e
            if not shape.system or _hole("system", 0) in text:
                return text
        return text

    def _find_end(self) -> tuple[str, list[Slot]]:
        """The control token after an answer, and what follows the answer in the rendering."""
        text = self._try_render(Shape(False, (False,)), answered=True)
        tail = text.split(_hole("assistant", 0))[-1]
        found = re.match(rf"(\s{{0,2}})({'|'.join(map(re.escape, self.controls))})", tail)
        if not found:
            return "eos", [Slot("silent_end")]
        lead = [Slot("mark", found[1])] if found[1] else []
        rest = tail[found.end() :]
        slots = [*lead, Slot("end"), *([Slot("mark", rest)] if rest else [])]
        return ("eos" if found[2] == self.eos_token else found[2]), slots

    def _find_lead(self) -> str:
        """White space that stands before an answer but not at the end of its prompt.

        It belongs to the answer (Llama 2's space), as in the literal templates.
        """
        prompt = self._try_render(Shape(False, (False,)), answered=False)
        before = self._try_render(Shape(False, (False,)), answered=True)
        before = before.split(_hole("assistant", 0))[0]
        lead = before[len(prompt) :] if before.startswith(prompt) else ""
        return "" if lead.strip() else lead

    def _answer(self, turn: int) -> Slot:
        return Slot("assistant", self._lead, turn)

    def _closing(self) -> list[Slot]:
        return list(self._tail)

    def _literals(self) -> list[str]:
        text = self._try_render(Shape(True, (False, False)), answered=False)
        pieces = re.split("|".join(map(re.escape, self.controls)), _HOLE.sub("\n", text))
        return [p for p in pieces if p]

    def _prompt(self, shape: Shape) -> list[Slot]:
        text = self._try_render(shape, answered=False)
        end = self.eos_token if self.end_token == "eos" else self.end_token
        slots: list[Slot] = []
        for i, part in enumerate(_HOLE.split(text)):
            if i % 3 == 1:
                kind = part
            elif i % 3 == 2:
                turn = int(part) if kind != "system" else -1
                if kind == "assistant" and slots[-1].text.endswith(self._lead):
                    before = slots.pop().text.removesuffix(self._lead)
                    slots += [Slot("mark", before), self._answer(turn)]
                else:
                    slots.append(Slot(kind, turn=turn))  # type: ignore[arg-type]
            elif part:
                after_answer = bool(slots) and slots[-1].kind == "assistant"
                slots += _split_end(part, end) if after_answer else [Slot("mark", part)]
        return slots


def _split_end(literal: str, end: str) -> list[Slot]:
    found = re.match(rf"(\s{{0,2}}){re.escape(end)}", literal)
    if not found:
        return [Slot("mark", literal)]
    slots = [Slot("mark", found[1])] if found[1] else []
    slots.append(Slot("end"))
    if literal[found.end() :]:
        slots.append(Slot("mark", literal[found.end() :]))
    return slots


_HOLE = re.compile(r"XqZ(system|user|assistant)(\d+)ZqX")


def _hole(kind: str, n: int) -> str:
    return f"XqZ{kind}{n}ZqX"


@lru_cache(maxsize=8)
def _compile(source: str) -> Any:
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    env.globals["raise_exception"] = raise_exception
    env.filters["tojson"] = lambda x, **_: json.dumps(x, ensure_ascii=False)
    try:
        return env.from_string(source)
    except TemplateError as e:
        raise UserError(
            f"the tokenizer's chat template does not parse: {e}",
            where="template auto",
            fix="Choose another one with --template (alpaca, chatml, llama3 ...).",
        ) from e


# -- finding templates --------------------------------------------------------------------------


@lru_cache(maxsize=1)
def builtin() -> dict[str, dict[str, Any]]:
    """The templates that come with the project, by name."""
    import yaml

    text = resources.files("vicuna.data").joinpath("templates.yaml").read_text(encoding="utf-8")
    specs: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return specs


def find(name: str, vocabulary: Vocabulary) -> Template:
    """The template of this name: `auto`, a built-in one, or a YAML file of the user's.

    `auto` is the tokenizer's own chat template, or alpaca where it has none.

    Raises: UserError where there is no such template.
    """
    if name == "auto":
        if not vocabulary.chat_template:
            return LiteralTemplate("alpaca", builtin()["alpaca"])
        return ChatTemplate(
            vocabulary.chat_template,
            vocabulary.bos_token,
            vocabulary.eos_token,
            list(vocabulary.special_tokens),
        )
    if name in builtin():
        return LiteralTemplate(name, builtin()[name])
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        import yaml

        spec = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(spec, dict):
            raise UserError("expected keys such as user: and assistant:", where=str(path))
        return LiteralTemplate(path.stem, spec)
    raise UserError(
        f"no template {name!r}",
        where="template",
        fix=f"Known: auto, {', '.join(builtin())}, or a YAML file of your own (docs/data.md).",
    )


def from_dict(saved: dict[str, Any]) -> Template:
    """The template that `to_dict` wrote."""
    saved = dict(saved)
    kind, name = saved.pop("kind"), saved.pop("name")
    if kind == "jinja":
        return ChatTemplate(
            saved["source"], saved["bos_token"], saved["eos_token"], saved["controls"], name
        )
    return LiteralTemplate(name, saved)


@dataclass
class Renderer:
    """A template together with a tokenizer: conversations to token ids, both ways of use."""

    template: Template
    encoder: Encoder
    end_id: int = field(init=False)
    stop_ids: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        vocabulary = self.encoder.vocabulary
        end = None if self.template.end_token == "eos" else self.template.end_token
        found = self.encoder.token_id(end) if end else None
        # A template's end that this vocabulary does not have as a token could never stop anything.
        self.end_id = vocabulary.eos_id if found is None else found
        self.stop_ids = frozenset({self.end_id, vocabulary.eos_id, *vocabulary.end_ids})

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Token ids of a prompt whose last turn is the user's."""
        example = self.encoder.encode(self.template.prompt(turns), self.end_id)
        return [int(i) for i in example.ids]
