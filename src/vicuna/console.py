"""rich's console behind the one door to the terminal (`terminal.py`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich import console as of_rich
from rich.errors import MarkupError
from rich.segment import Segment
from rich.text import Text

from vicuna.errors import EXIT_PIPE
from vicuna.terminal import COMMANDS, visible


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
