"""An answer's thought apart from the answer, while both come.

    thoughts = ThoughtStream(renderer.template.thought_marks())
    for piece in pieces:
        thought, answer = thoughts.push(piece)
    thought, answer = thoughts.finish()

Every piece of text belongs to one of the two; the marks around the thought (`<think>`, `</think>`),
and the white space beside them, belong to neither.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from vicuna.data.templates.base import ThoughtMarks


class Parts(NamedTuple):
    """What was thought and what was answered."""

    thought: str = ""
    answer: str = ""


class ThoughtStream:
    """Cuts a stream of text at the marks of a thought; holds back what may begin one."""

    def __init__(self, marks: ThoughtMarks) -> None:
        self._open, self._close = marks.open.strip(), marks.close.strip()
        # before: nothing but white space has come; then thought, then answer.
        self._state = "thought" if marks.opened and self._close else "before"
        self._fresh = True  # white space behind a mark is not shown
        self._held = ""

    def push(self, text: str) -> Parts:
        """What became certain with this piece."""
        self._held += text
        thought = answer = ""
        if self._state == "before":
            self._begin()
        if self._state == "thought":
            thought = self._think()
        if self._state == "answer":
            answer, self._held = self._shown(self._held), ""
        return Parts(thought, answer)

    def finish(self) -> Parts:
        """What was held back."""
        held, self._held = self._held, ""
        if self._state == "thought":
            return Parts(thought=self._shown(held).rstrip())
        return Parts(answer=held if self._state == "before" else self._shown(held))

    def _begin(self) -> None:
        said = self._held.lstrip()
        if self._open and said.startswith(self._open):
            self._state, self._held = "thought", said[len(self._open) :]
        elif said and not (self._open and self._open.startswith(said)):
            self._state, self._fresh = "answer", False

    def _think(self) -> str:
        at = self._held.find(self._close)
        if at >= 0:
            thought = self._shown(self._held[:at]).rstrip()
            self._held = self._held[at + len(self._close) :]
            self._state, self._fresh = "answer", True
            return thought
        # White space and a part of the mark may be the thought's end.
        sure = self._held
        for size in range(min(len(self._close) - 1, len(sure)), 0, -1):
            if self._close.startswith(sure[-size:]):
                sure = sure[:-size]
                break
        sure = sure.rstrip()
        self._held = self._held[len(sure) :]
        return self._shown(sure)

    def _shown(self, text: str) -> str:
        if self._fresh:
            text = text.lstrip()
            self._fresh = not text
        return text


def split(text: str, marks: ThoughtMarks) -> Parts:
    """A whole answer in two."""
    stream = ThoughtStream(marks)
    first, rest = stream.push(text), stream.finish()
    return Parts(first.thought + rest.thought, first.answer + rest.answer)


class Typed:
    """Types an answer as it comes, its thought above it.

    It is called with text like the function that it types with. think: types thoughts; the same
    function if not given.
    """

    def __init__(
        self,
        out: Callable[[str], None],
        marks: ThoughtMarks,
        think: Callable[[str], None] | None = None,
    ) -> None:
        self._out, self._think, self._stream = out, think or out, ThoughtStream(marks)
        self._thought = self._answer = ""

    def __call__(self, text: str) -> None:
        self._show(self._stream.push(text))

    def finish(self) -> Parts:
        """Type what was held back; the whole thought and answer."""
        self._show(self._stream.finish())
        return Parts(self._thought, self._answer)

    def _show(self, parts: Parts) -> None:
        if parts.thought:
            self._think(parts.thought)
            self._thought += parts.thought
        if parts.answer:
            if self._thought and not self._answer:
                self._out("\n\n")
            self._out(parts.answer)
            self._answer += parts.answer
