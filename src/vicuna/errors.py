"""Errors a user can cause: what happened, where, and the way out. Shown without a traceback."""

from __future__ import annotations

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130
EXIT_PIPE = 141  # what a shell says of a program whose reader has gone


class UserError(Exception):
    """A mistake that the user can mend.

    Args:
        what: one sentence that says what happened.
        where: the file and line, or the setting, it happened in.
        fix: the way out, as an instruction.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.fix:
            lines.append(self.fix)
        return "\n".join(lines)


class SettingsError(UserError):
    """Several mistakes in one set of settings, reported together."""

    def __init__(self, mistakes: list[str], fix: str = "") -> None:
        self.mistakes = mistakes
        many = f"{len(mistakes)} mistakes in the settings:\n" if len(mistakes) > 1 else ""
        super().__init__(many + "\n".join(f"- {m}" if many else m for m in mistakes), fix=fix)
