"""The conversation of `vicuna chat`: reads a line, types the answer, understands a few commands."""

from __future__ import annotations

import difflib
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType

from vicuna.commands.beam_view import Show, view_of
from vicuna.data.conversation import Turn
from vicuna.data.templates.renderer import Renderer
from vicuna.errors import UserError
from vicuna.generate.chat import Chat, fit
from vicuna.generate.decode import decode
from vicuna.generate.engines.base import Engine
from vicuna.generate.events import FinishReason, Step
from vicuna.generate.settings import Settings
from vicuna.generate.thoughts import Typed, split
from vicuna.terminal import say

HELP = """\
/reset        forget what was said (the system prompt stays)
/undo         take back the last question and its answer
/system TEXT  set the system prompt; without TEXT, remove it
/save FILE    append the conversation to a JSONL file that vicuna train accepts
/adapter on   answer with the adapter; /adapter on 0.5 at half its strength; /adapter off without
/help         this list
/exit         leave (Ctrl-D too); Ctrl-C stops an answer
"""
_COMMAND = re.compile(r"/(\w+)(?:\s+(.*))?", re.DOTALL)
_ADAPTER = re.compile(r"(?P<off>off)|on(?:\s+(?P<strength>-?\d*\.?\d+))?")
_ANOTHER = "To talk with another one, start anew: vicuna chat --adapter FOLDER"
_NOTES: dict[FinishReason, str] = {
    "length": "(stopped at {limit} tokens; --max_new_tokens allows more)",
    "context": "(stopped: the context of {context} tokens is full; /reset starts anew)",
    "cancelled": "(stopped)",
    "memory": "(stopped: out of memory; /reset starts anew with a short prompt)",
}


def read_line(prompt: str) -> str:
    """A line from the keyboard with editing, or from a pipe without showing the prompt."""
    if not sys.stdin.isatty():
        return input()
    import readline  # noqa: F401  line editing that knows wide characters

    return input(prompt)


def write(text: str) -> None:
    """Show text at once, unfinished lines too."""
    say(text, end="")


def write_dim(text: str) -> None:
    """The same, dim where the screen can show that."""
    say(text, end="", dim=True)


def converse(
    engine: Engine,
    renderer: Renderer,
    settings: Settings,
    system: str = "",
    read: Callable[[str], str] = read_line,
    out: Callable[[str], None] = write,
    view: Callable[[Callable[[str], None]], AbstractContextManager[Show]] = view_of,
    switch: Callable[[bool, float], None] | None = None,
) -> Chat:
    """Talk until the end of the input, Ctrl-C or Ctrl-D at the prompt, or /exit.

    Args:
        read: shows a prompt and returns a line; raises EOFError at the end.
        out: shows text as it is, without adding a line's end.
        view: makes of `out` what shows an answer while it grows.
        switch: sets whether the adapter is used, and its strength.

    Returns: the conversation as it stood at the end.
    """
    talk = _Talk(engine, renderer, settings, Chat(system), out, view, switch)
    while True:
        try:
            line = _valid(read("> ")).strip()
        except (EOFError, KeyboardInterrupt):
            out("\n")
            return talk.chat
        try:
            if not talk.take(line):
                return talk.chat
        except UserError as e:
            out(f"{e}\n")


def _valid(line: str) -> str:
    """The line without what no tokenizer takes: bytes of a pipe that are not UTF-8."""
    return line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class _Talk:
    """One conversation on the screen."""

    def __init__(
        self,
        engine: Engine,
        renderer: Renderer,
        settings: Settings,
        chat: Chat,
        out: Callable[[str], None],
        view: Callable[[Callable[[str], None]], AbstractContextManager[Show]],
        switch: Callable[[bool, float], None] | None,
    ) -> None:
        self.engine, self.renderer, self.settings = engine, renderer, settings
        self.chat, self.out, self.view, self.switch = chat, out, view, switch
        self.marks = renderer.template.thought_marks()
        self.dropped = 0  # turns that did not fit, as last told

    def take(self, line: str) -> bool:
        """Obey a command or answer a question; False where it was the last."""
        if not line:
            return True
        # `/etc/hosts` begins a question: only a word alone or before a space is a command.
        command = _COMMAND.fullmatch(line)
        if not command:
            self.answer(line)
            return True
        name, rest = command[1], (command[2] or "").strip()
        if name in ("exit", "quit"):
            return False
        commands: dict[str, Callable[[str], str]] = {
            "help": lambda _: HELP,
            "reset": self.reset,
            "undo": self.undo,
            "system": self.set_system,
            "save": self.save,
            "adapter": self.set_adapter,
        }
        if name in commands:
            self.out(commands[name](rest))
        else:
            close = difflib.get_close_matches(name, [*commands, "exit", "quit"], n=1)
            near = f"did you mean /{close[0]}? " if close else ""
            self.out(f"No command /{name}; {near}/help lists them.\n")
        return True

    def reset(self, _: str) -> str:
        self.chat.reset()
        return "The conversation starts anew.\n"

    def undo(self, _: str) -> str:
        question = self.chat.undo()
        return "Nothing to take back.\n" if question is None else f"Taken back: {question}\n"

    def set_system(self, text: str) -> str:
        self.chat.system = text
        return "The system prompt is set.\n" if text else "The system prompt is removed.\n"

    def save(self, name: str) -> str:
        if not name:
            raise UserError("the file's name is missing", where="/save", fix="/save talk.jsonl")
        self.chat.save(Path(name))
        return f"Saved to {name}.\n"

    def set_adapter(self, text: str) -> str:
        words = _ADAPTER.fullmatch(text)
        if not words:
            raise UserError(
                "on or off? It switches the adapter that this talk was started with: /adapter off, "
                "/adapter on, /adapter on 0.5",
                where="/adapter",
                fix=_ANOTHER,
            )
        if self.switch is None:
            raise UserError("there is no adapter to switch", where="/adapter", fix=_ANOTHER)
        if words["off"]:
            self.switch(False, 1.0)
            return "The base alone answers.\n"
        strength = float(words["strength"] or 1)
        self.switch(True, strength)
        return "The adapter answers" + (f" at {strength:g}.\n" if strength != 1 else ".\n")

    def answer(self, question: str) -> None:
        """Type the answer; what was typed until an interruption is kept."""
        said: list[str] = []
        typed = Typed(self.out, self.marks, write_dim if self.out is write else None)
        try:
            with _ctrl_c() as cancelled:
                note = self._type(self.chat.ask(question), said, cancelled, typed)
            typed.finish()
        except KeyboardInterrupt:  # a second Ctrl-C, or where no handler can be set
            note = _NOTES["cancelled"] + "\n"
        finally:
            thought, text = split("".join(said), self.marks)
            self.chat.answer(text, thought)
        if not (note or "".join(said).strip()):
            note = "(the model said nothing)\n"
        self.out("\n" + note)

    def _type(
        self,
        turns: list[Turn],
        said: list[str],
        cancelled: Callable[[], bool],
        typed: Callable[[str], None],
    ) -> str:
        """Show the answer and put its text into `said`; a note on how it ended."""
        context, limit = self.engine.context_length, self.settings.max_new_tokens
        fitted = fit(turns, self.renderer, context, limit)
        events = decode(self.engine, fitted.prompt_ids, self.settings, self.renderer, cancelled)
        self._tell_dropped(len(fitted.dropped))
        note = ""
        with self.view(typed) as show:
            for event in events:
                if isinstance(event, Step):
                    said.append(event.text)
                    show(event)
                else:
                    note = _NOTES.get(event.finish_reason, "")
        return note.format(limit=limit, context=context) + "\n" if note else ""

    def _tell_dropped(self, turns: int) -> None:
        if turns > self.dropped:
            many = turns > 2
            what = (
                f"{turns // 2} oldest questions with their answers" if many else "oldest question"
            )
            what += " no longer fit" if many else " with its answer no longer fits"
            self.out(f"(the {what} the context of {self.engine.context_length} tokens)\n")
        self.dropped = turns


@contextmanager
def _ctrl_c() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C only makes the yielded function true, so that the engine stops
    between two tokens and keeps what it knows; a second one interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    pressed = threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def press(number: int, frame: FrameType | None) -> None:
        if pressed.is_set():
            signal.default_int_handler(number, frame)
        pressed.set()

    signal.signal(signal.SIGINT, press)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)
