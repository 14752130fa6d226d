"""Errors a user can cause: what happened, where, and the way out. Shown without a traceback."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vicuna.messages import Message, lines, message

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130
EXIT_PIPE = 141  # what a shell says of a program whose reader has gone
# Names the file in which a command that fails leaves its error for the process that started it.
ERROR_FILE = "VICUNA_ERROR_FILE"


class UserError(Exception):
    """A mistake that the user can mend.

        raise UserError(
            "port {port} of {host} is in use", host=host, port=port,
            fix="Close the program that uses it, or choose another --port.",
        )

    Args:
        template: one sentence that says what happened, with {places} for its fields; or a
            message that is made already.
        where: the file and line, or the setting, it happened in.
        fix: the way out, as an instruction; a template of the same fields, or a message.
        fields: what stands in the places of both.
    """

    def __init__(self, template: str, /, *, where: str = "", fix: str = "", **fields: Any) -> None:
        self.what = message(template, **fields)
        self.where = where
        self.fix = message(fix, **fields)
        super().__init__(str(self.message))

    @property
    def message(self) -> Message:
        """All that is to be said: the place, what happened, and on lines below it the way out."""
        fields = {"where": self.where, "what": self.what, "fix": self.fix}
        head = "{where}: {what}" if self.where else "{what}"
        return Message(f"{head}\n{{fix}}" if self.fix else head, **fields)

    def __str__(self) -> str:
        return str(self.message)

    def __reduce__(self) -> tuple[Any, ...]:
        return _user_error, (type(self), self.__dict__)


class SettingsError(UserError):
    """Several mistakes in one set of settings, reported together.

    Args:
        mistakes: one sentence each; messages, where they have fields.
    """

    def __init__(self, mistakes: Sequence[str], fix: str = "") -> None:
        self.mistakes = list(mistakes)
        if len(mistakes) == 1:
            super().__init__(mistakes[0], fix=fix)
        else:
            super().__init__(
                Message(
                    "{number} mistakes in the settings:\n{mistakes}",
                    number=len(mistakes),
                    mistakes=lines(mistakes, "- "),
                ),
                fix=fix,
            )


def write_error_file(error: UserError) -> None:
    """Leave an error, as a message, for the process that started this one and asked for it."""
    if path := os.environ.get(ERROR_FILE):
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps(error.message.as_json), encoding="utf-8")


def read_error_file(path: Path, said: str, clean: Callable[[str], str] = str) -> str:
    """The error that a command left, as a message.

    Args:
        said: the error's text as the command printed it; the result if the file has no message
            with just this text.
    """
    with contextlib.suppress(OSError, ValueError, RecursionError):
        written = json.loads(path.read_text(encoding="utf-8"))
        message = Message.from_json(written).cleaned(clean)
        if message.strip() == said:
            return message
    return said


def _user_error(cls: type[UserError], state: dict[str, Any]) -> UserError:
    error = cls.__new__(cls)
    error.__dict__.update(state)
    error.args = (str(error),)
    return error
