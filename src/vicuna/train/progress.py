"""What the user sees of a run: notes, the data table, the progress bar, the summary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.markup import escape

from vicuna.console import Console, working


class Screen:
    """Prints to the terminal, or plain lines where there is none."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(soft_wrap=True)
        self.warnings: list[str] = []

    def say(self, text: str) -> None:
        if text:
            self.console.print(escape(text))

    def warn(self, text: str) -> None:
        """Something that may hurt; also kept for the log."""
        self.warnings.append(text)
        self.console.print(f"[yellow]warning:[/] {escape(text)}")

    def report(self, report: Any) -> None:
        """The data report as a table."""
        self.console.print(report.rich_table())

    @contextmanager
    def working(self, text: str) -> Iterator[Callable[[str], None]]:
        """A line that says what takes long; the callable changes its details."""
        with working(self.console, text) as say:
            yield say

    @contextmanager
    def bar(self, total: int, done: int) -> Iterator[Callable[[int, str], None]]:
        """A progress bar over steps; call it with (steps done, words). Lines where no terminal."""
        if not self.console.is_terminal:
            yield self._lines(total, done)
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task("starting", total=total, completed=done)
            yield lambda step, words: progress.update(task, completed=step, description=words)

    def _lines(self, total: int, done: int) -> Callable[[int, str], None]:
        every = max(1, (total - done) // 20)

        def line(step: int, words: str) -> None:
            if step == total or (step - done) % every == 0:
                self.say(f"{step}/{total}  {words}")

        return line
