"""The words of the data path: record, conversation, problem."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Role = Literal["system", "user", "assistant"]
Action = Literal["dropped", "repaired", "warned"]


class Number(str):
    """A JSON number as it was written: 3.10 stays 3.10, and 5,000 digits are no trouble."""

    __slots__ = ()


class Raw(NamedTuple):
    """One record as it stands in a file, not parsed yet where it is text.

    `line` is 1-based: the line the record starts on (for Parquet, its row).
    `value` is JSON text, or a dict for tabular files.
    """

    line: int
    value: str | dict[str, Any]


@dataclass(slots=True)
class Turn:
    """One utterance.

    input: the separate material of an instruction (Alpaca's `input`). thought: the reasoning that
    precedes an answer, without its marks. in_loss: whether an answer is in the loss.
    """

    role: Role
    text: str
    input: str = ""
    thought: str = ""
    in_loss: bool = True


@dataclass(slots=True)
class Conversation:
    """What every data format becomes.

    `turns` is an optional system turn, then user and assistant in strict alternation, ending with
    the assistant. For `kind == "text"` (continued pre-training) it is one assistant turn and no
    template is applied. merit: its score or rank among answers to one question, more is better.
    """

    turns: list[Turn]
    line: int = 0
    kind: Literal["chat", "text"] = "chat"
    merit: float | None = None


class Problem(NamedTuple):
    """Something about a record that the user should know.

    reason: one of `records/reasons.py`; a detail may follow after ": ". action: what was done: the
    record was `dropped`, `repaired` (used after a change), or `warned` of (used as it is).
    """

    line: int
    field: str
    reason: str
    action: Action

    @property
    def summary(self) -> str:
        """The reason without its detail: what problems are counted by."""
        return self.reason.split(": ")[0]


@dataclass(slots=True)
class Parsed:
    """What a record became: a conversation (None if it was dropped), its format, its problems.

    unused: keys that had a value and decided nothing, those of turns as `messages[].name`.
    """

    conversation: Conversation | None
    format: str
    problems: list[Problem] = field(default_factory=list)
    unused: tuple[str, ...] = ()
