"""Who is there: a conversation for each tab of each browser, kept on the server until it is old.

A tab makes up its own name (128 random bits, in its session storage), so that a reload finds the
conversation again and nobody else does.
"""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vicuna.data.conversation import Turn
from vicuna.errors import UserError
from vicuna.generate.chat import Chat
from vicuna.generate.thoughts import Parts
from vicuna.serve.queue import Job
from vicuna.web.probabilities import ShownToken

Rating = Literal["up", "down", ""]
TURNS = 2000  # of a conversation that is loaded
_NAME = re.compile(r"[0-9a-f]{32}")


@dataclass
class AnswerMeta:
    """What is shown under an answer. stats: numbers and the names of the adapters; rating: the
    reader's; tokens: with their probabilities if those were asked for, the first `thought_tokens`
    of them the thought's."""

    stats: dict[str, Any] = field(default_factory=dict)
    rating: Rating = ""
    tokens: Sequence[ShownToken] = ()
    thought_tokens: int = 0


@dataclass
class Session:
    """What one tab of a browser has.

    notes: one for each answer. editing: the question that the next one replaces.
    mix: strengths of the adapters that answer, by their path.
    job: what is being computed for it. greeted: whether the page was opened for it before.
    request_id: counts the questions and replacements of the conversation: an answer knows its
        question by it.
    dataset_requests: counts the choices of a data set: one that is still being read knows by it
        that another was chosen meanwhile.
    """

    name: str
    chat: Chat = field(default_factory=Chat)
    notes: list[AnswerMeta] = field(default_factory=list)
    editing: int | None = None
    mix: dict[str, float] = field(default_factory=dict)
    job: Job | None = None
    greeted: bool = False
    request_id: int = 0
    dataset_requests: int = 0
    last_used: float = field(default_factory=time.monotonic)
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    @property
    def busy(self) -> bool:
        """Whether something is being computed, or waits."""
        return self.job is not None and not self.job.ended.is_set()

    def stop(self) -> None:
        """End what is being computed for this session, and for no other."""
        if self.job is not None:
            self.job.cancel()

    def begin(self, text: str) -> list[Turn]:
        """A question, in the place of the one that is edited; the turns to answer."""
        with self.lock:
            if self.editing is not None:
                self.cut(self.editing)
            self.request_id += 1
            return self.chat.ask(text)

    def end(
        self, request_id: int, parts: Parts, stats: dict[str, Any],
        tokens: Sequence[ShownToken] = (), thought_tokens: int = 0,
    ) -> None:  # fmt: skip
        """The answer to a question, if it still stands; where nothing was said, the question goes
        too.

        Args:
            request_id: what `request_id` was when it began.
            parts: the thought stays beside the answer; the template says what becomes of it.
        """
        with self.lock:
            if request_id != self.request_id or not self.open_question:
                return
            self.chat.answer(parts.answer, parts.thought)
            if parts.answer.strip() or parts.thought.strip():
                self.notes.append(AnswerMeta(stats, "", tokens, thought_tokens))

    @property
    def open_question(self) -> bool:
        """Whether the last question has no answer yet."""
        return len(self.chat.turns) > 2 * len(self.notes)

    def answered(self) -> Chat:
        """The conversation without a question that has no answer yet."""
        return Chat(self.chat.system, self.chat.turns[: 2 * len(self.notes)])

    def _replace(self, chat: Chat) -> None:
        """Another conversation; what is being computed for this one is stopped and goes nowhere."""
        self.stop()
        with self.lock:
            self.request_id += 1
            self.job = None
            self.chat, self.editing = chat, None
            self.notes = [AnswerMeta() for _ in range(len(chat.turns) // 2)]

    def cut(self, question: int) -> str:
        """Take back a question (counted from 0) and all behind it; its text.

        Raises: UserError where there is none.
        """
        self.editing = None
        if not 0 <= question < len(self.notes):
            raise UserError("there is no such question any more")
        text = self.chat.turns[2 * question].text
        del self.chat.turns[2 * question :]
        del self.notes[question:]
        return text

    def question(self, place: int) -> str:
        """The text of a question. Raises: UserError where there is none."""
        if not 0 <= place < len(self.notes):
            raise UserError("there is no such question any more")
        return self.chat.turns[2 * place].text

    def clear(self) -> None:
        """Forget the conversation; the system prompt stays."""
        self._replace(Chat(self.chat.system))

    def load(self, line: str) -> None:
        """Take a conversation from a line of JSONL as `vicuna train` reads it.

        Raises: UserError where it is none.
        """
        from vicuna.data.conversation import Raw
        from vicuna.data.records.formats import parse

        parsed = parse(Raw(1, line))
        if parsed.conversation is None or parsed.conversation.kind != "chat":
            reasons = ", ".join(sorted({p.reason for p in parsed.problems})) or "no turns"
            raise UserError("not a conversation: {reasons}", reasons=reasons, where="conversation")
        turns = list(parsed.conversation.turns)
        if len(turns) > TURNS:
            raise UserError(
                "a conversation may have {turns} turns", turns=TURNS, where="conversation"
            )
        system = turns.pop(0).text if turns and turns[0].role == "system" else ""
        if len(turns) % 2:
            turns.pop()
        turns = [
            Turn(t.role, f"{t.text}\n{t.input}" if t.input else t.text, thought=t.thought)
            for t in turns
        ]
        self._replace(Chat(system, turns))


class Sessions:
    """All sessions by name; the oldest go where there are too many.

    Args:
        most: how many are kept.
        hours: how long one that nobody uses is kept.
    """

    def __init__(self, most: int = 1000, hours: float = 24) -> None:
        self._most, self._seconds = most, hours * 3600
        self._lock = threading.Lock()
        self._all: OrderedDict[str, Session] = OrderedDict()

    def get(self, name: str) -> Session:
        """The session of a tab, a new one where there is none.

        Raises: UserError where this is no name that a tab makes up.
        """
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UserError("this page has no session yet", fix="Load it again.")
        with self._lock:
            session = self._all.setdefault(name, Session(name))
            session.last_used = time.monotonic()
            self._all.move_to_end(name)
            while len(self._all) > 1 and self._old(next(iter(self._all.values()))):
                self._all.popitem(last=False)
            return session

    def _old(self, session: Session) -> bool:
        if session.busy:
            return False
        return len(self._all) > self._most or time.monotonic() - session.last_used > self._seconds


def rate(session: Session, answer: int, rating: Rating, path: Path) -> None:
    """Write what the reader thinks of an answer to a data file: one line, a conversation that
    ends with this answer. The same rating again takes it back on the page, not in the file.

    Raises: UserError where there is no such answer, or the file cannot be written.
    """
    if not 0 <= answer < len(session.notes):
        raise UserError("there is no such answer any more")
    note = session.notes[answer]
    if note.rating == rating:
        note.rating = ""
        return
    talk = Chat(session.chat.system, session.chat.turns[: 2 * answer + 2])
    path.parent.mkdir(parents=True, exist_ok=True)
    talk.save(path)
    note.rating = rating
