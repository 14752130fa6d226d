"""The tokenizer's own (Jinja) chat template; its literals are found by rendering placeholders."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from vicuna.data.sandbox import LimitError, compile_template, render
from vicuna.data.template_base import Shape, Slot, Template
from vicuna.errors import UserError


class ChatTemplate(Template):
    """A tokenizer's own (Jinja) chat template, rendered in a process of its own (`sandbox.py`).

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
        # Longest first, for patterns; a total order, because it gets into the template's digest.
        self.controls = sorted(set(controls) | {eos_token}, key=lambda t: (-len(t), t))
        self._compiled = compile_template(source)
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
        return render(
            self._compiled,
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
                if not merge and shape.system and not isinstance(e, LimitError):
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
