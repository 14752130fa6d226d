"""The history of a conversation: asking, taking back, saving, and fitting it into the context."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from vicuna.append_lines import append_line
from vicuna.data.conversation import Turn
from vicuna.data.templates.renderer import Renderer
from vicuna.errors import UserError
from vicuna.system_errors import cannot_write

# Characters that a token of a context may stand for: more than any real text has. What is longer
# cannot fit, and is not given to the tokenizer: its memory and time grow with the text.
DENSE = 16


@dataclass
class Chat:
    """A conversation: a system prompt ("" for the template's own) and answered questions.

    `turns` alternates user and assistant and ends with an assistant, except between `ask` and
    `answer`.
    """

    system: str = ""
    turns: list[Turn] = field(default_factory=list)

    def ask(self, text: str) -> list[Turn]:
        """Add a question; the turns to answer, the system prompt first."""
        self.turns.append(Turn("user", text))
        return self.all_turns()

    def answer(self, text: str, thought: str = "") -> None:
        """Add the answer to the last question. If nothing was said, the question goes too."""
        if text.strip() or thought.strip():
            self.turns.append(Turn("assistant", text, thought=thought))
        else:
            self.turns.pop()

    def undo(self) -> str | None:
        """Take back the last question and its answer; the question, None where there is none."""
        if not self.turns:
            return None
        question = max(i for i, t in enumerate(self.turns) if t.role == "user")
        text = self.turns[question].text
        del self.turns[question:]
        return text

    def reset(self) -> None:
        """Forget all turns; the system prompt stays."""
        self.turns.clear()

    def all_turns(self) -> list[Turn]:
        """The turns as a template takes them."""
        return [*([Turn("system", self.system)] if self.system else []), *self.turns]

    def messages(self) -> list[dict[str, str]]:
        """The conversation in OpenAI's form; thoughts stand beside their answers."""
        return [
            {"role": t.role, "content": t.text}
            | ({"reasoning_content": t.thought} if t.thought else {})
            for t in self.all_turns()
        ]

    def save(self, path: Path) -> None:
        """Append the conversation to a JSONL file, one line that `vicuna train` accepts.

        Raises: UserError where there is nothing to save or the file cannot be written.
        """
        if not self.turns:
            raise UserError("nothing was said yet", where="/save")
        line = json.dumps({"messages": self.messages()}, ensure_ascii=False)
        try:
            append_line(path.expanduser(), line)
        except (OSError, ValueError) as e:
            raise cannot_write(e, path) from e


class Fitted(NamedTuple):
    """Turns that fit a context, their prompt, and what was dropped for it, oldest first."""

    turns: list[Turn]
    prompt_ids: list[int]
    dropped: list[Turn]


def fit(turns: Sequence[Turn], renderer: Renderer, context: int, reserve: int) -> Fitted:
    """Drop whole oldest questions with their answers until prompt and answer fit the context.

    The system prompt and the last question always stay: a prompt that still is too long is for
    `decode` to refuse.

    Args:
        turns: a system turn or none, then user and assistant in turn, ending with a question.
        context: tokens for prompt and answer together.
        reserve: tokens kept free for the answer, at most half of the context: a generous
            `max_new_tokens` must not drive the whole conversation out.
    """
    budget = context - min(reserve, context // 2)
    head = 1 if turns[0].role == "system" else 0
    check_length([*turns[:head], *turns[-1:]], context)
    # What cannot fit, whatever its tokens are, is dropped unread.
    first, left = len(turns) - 1, DENSE * context - _length([*turns[:head], turns[-1]])
    while first > head:
        before = max(head, first - 2)
        left -= _length(turns[before:first])
        if left < 0:
            break
        first = before
    while True:
        kept = [*turns[:head], *turns[first:]]
        prompt = renderer.prompt(kept)
        if len(prompt) <= budget or len(turns) - first <= 1:
            return Fitted(kept, prompt, list(turns[head:first]))
        first += 2


def check_length(turns: Sequence[Turn], context: int) -> None:
    """Refuse turns that cannot fit a context, before they are tokenized.

    Raises: UserError.
    """
    length = sum(len(turn.text) + len(turn.input) for turn in turns)
    if length > DENSE * context:
        raise UserError(
            "this is too long: {length} characters, and the model's context has {context} tokens",
            length=length,
            context=context,
            where="prompt",
            fix="Shorten it, or use a model with a longer context.",
        )


def _length(turns: Sequence[Turn]) -> int:
    """Characters of turns, and of a template's around them: an empty turn counts, too."""
    return sum(len(turn.text) + len(turn.input) + 1 for turn in turns)
