"""rich's console behind the one door to the terminal (`terminal.py`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import console as of_rich
from rich.errors import MarkupError
from rich.markup import escape
from rich.segment import Segment
from rich.text import Text

from vicuna.errors import EXIT_PIPE
from vicuna.terminal import COMMANDS, visible

SELDOM = 30.0  # seconds between lines in a log


@contextmanager
def working(
    console: of_rich.Console, text: str, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[str], None]]:
    """A line that says what takes long; the callable changes its details.

    Into a file or a pipe the details go as lines, at most one in `SELDOM` seconds.
    """
    if console.is_terminal:
        with console.status(f"{text} ...") as status:
            yield lambda detail: status.update(f"{text}: {escape(detail)}")
        return
    last = clock()

    def line(detail: str) -> None:
        nonlocal last
        if clock() - last >= SELDOM:
            last = clock()
            console.print(escape(f"{text}: {detail}"))

    yield line


class Console(of_rich.Console):
    """rich's console; the texts in whatever it renders are made visible."""

    def __init__(self, **words: Any) -> None:
        super().__init__(**{"highlight": False, "emoji": False, **words})

    def render(
        self, renderable: Any, options: of_rich.ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """As rich's; only rich's own control segments (cursor, erase) reach the terminal."""
        for segment in super().render(renderable, options):
            if segment.control or not COMMANDS.search(segment.text):
                yield segment
            else:
                yield Segment(visible(segment.text), segment.style)

    def render_str(self, text: str, **words: Any) -> Text:
        """As rich's; brackets that are no markup are text, not an error."""
        try:
            return super().render_str(text, **words)
        except MarkupError:
            return super().render_str(text, **{**words, "markup": False})

    def on_broken_pipe(self) -> None:
        """As rich's; the exit code is a pipe's (`| head`), not a fault's."""
        try:
            super().on_broken_pipe()
        except SystemExit:
            raise SystemExit(EXIT_PIPE) from None
