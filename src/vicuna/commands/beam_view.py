"""The answer while it grows, on the screen: typed, or with all its beams drawn in place.

    with view_of(write, show_beams=True) as view:
        for event in decode(...):
            if isinstance(event, Step):
                view.show(event)

A drawing is a block of the text that is final, and below it a line for each open beam: its score,
the agreed text solid, the rest dim. When the answer ends, the drawing goes and the text is left.
"""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from rich.cells import cell_len
from rich.live import Live
from rich.text import Text

from vicuna.console import Console
from vicuna.generate.events import Beam, Step

# Drawings a second at most: a reader sees no more, and a slow terminal must not slow the answer.
_RATE = 20
_NARROW = 32  # columns below which scores are short


class View(Protocol):
    """Shows steps between `with` and its end; what is final then stays on the screen."""

    def __enter__(self) -> View: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def show(self, step: Step) -> None:
        """Show how things stand."""
        ...


def view_of(
    out: Callable[[str], None], show_beams: bool = False, console: Console | None = None
) -> View:
    """A view for the standard output: beams are drawn where it is a terminal, else text is typed.

    Args:
        out: shows text as it is, without adding a line's end.
    """
    if show_beams:
        console = console or Console()
        if console.is_terminal and not console.is_dumb_terminal:
            return BeamView(console, out)
    return TypedView(out)


class TypedView:
    """Types the final text."""

    def __init__(self, out: Callable[[str], None]) -> None:
        self._out = out

    def __enter__(self) -> TypedView:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing is left to do."""

    def show(self, step: Step) -> None:
        """Type what became final."""
        if step.text:
            self._out(step.text)


class BeamView:
    """Draws the beams in place; at the end the text alone is left on the screen.

    Args:
        console: a terminal.
        out: takes the final text.
        rate: drawings a second at most.
    """

    def __init__(self, console: Console, out: Callable[[str], None], rate: float = _RATE) -> None:
        self._console, self._out = console, out
        self._pause = 1 / rate
        self._next = 0.0
        self._texts: list[str] = []
        self._tail = ""  # the end of the text: as much as a screen can show
        self._live = Live(
            console=console, auto_refresh=False, transient=True, vertical_overflow="crop"
        )

    def __enter__(self) -> BeamView:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the drawing away and leave the text."""
        self._live.stop()
        self._out("".join(self._texts))

    def show(self, step: Step) -> None:
        """Draw a step, unless the last drawing was a moment ago."""
        width, height = self._console.size
        self._texts.append(step.text)
        self._tail = (self._tail + step.text)[-width * height :]
        now = time.monotonic()
        if now >= self._next and step.beams:
            self._next = now + self._pause
            self._live.update(frame(self._tail, step, width, height), refresh=True)


def frame(agreed: str, step: Step, width: int, height: int) -> Text:
    """A drawing of at most `height` - 1 lines of at most `width` columns.

    Args:
        agreed: the final text so far, the step's included, or its end.
    """
    lines = _beam_lines(agreed, step, width, max(1, height - 3))
    room = max(0, height - 1 - len(lines))
    block = _last_lines(agreed, width, room)
    return Text("\n", no_wrap=True, overflow="crop").join([*block, *lines])


def _beam_lines(agreed: str, step: Step, width: int, most: int) -> list[Text]:
    """A line for the best finished branch and for each open one."""
    lines = [_finished_line(beam, width) for beam in step.finished[:1]]
    lines += [_open_line(agreed, beam, width) for beam in step.beams]
    if len(lines) > most:
        rest = len(lines) - most + 1
        lines = [*lines[: most - 1], Text(_head(f"and {rest} more", width), "dim")]
    return lines


def _open_line(agreed: str, beam: Beam, width: int) -> Text:
    line = Text().append(_score(beam, width), "cyan")
    solid, dim = _plain(agreed), _plain(beam.open)
    shown = _tail(solid + dim, width - line.cell_len)
    split = max(0, len(shown) - len(dim))
    return line.append(shown[:split]).append(shown[split:], "dim")


def _finished_line(beam: Beam, width: int) -> Text:
    line = Text().append(_score(beam, width), "green")
    return line.append(_tail(_plain(beam.text) + " ■", width - line.cell_len), "dim green")


def _score(beam: Beam, width: int) -> str:
    score = beam.score + 0.0  # no -0.0
    return f"{score:8.3f}  " if width >= _NARROW else f"{score:.1f} "


def _last_lines(text: str, width: int, most: int) -> list[Text]:
    """The end of a text in at most so many lines, broken at the width; wide characters count
    twice."""
    lines = [""]
    for paragraph in text.split("\n"):
        used = 0
        for character in _plain(paragraph):
            size = cell_len(character)
            if used + size > width:
                lines.append("")
                used = 0
            lines[-1] += character
            used += size
        lines.append("")
    lines.pop()
    return [Text(line, "bold") for line in lines[-most:]] if most and text else []


def _plain(text: str) -> str:
    """Text in one line, and without characters that would steer the terminal."""
    if text.isprintable():
        return text
    steering = ("Cc", "Zl", "Zp")
    text = text.replace("\n", "⏎").replace("\t", " ")
    return "".join("·" if unicodedata.category(c) in steering else c for c in text)


def _head(text: str, columns: int) -> str:
    """The beginning of a text that fits in so many columns."""
    used = 0
    for i, character in enumerate(text):
        used += cell_len(character)
        if used > columns:
            return text[:i]
    return text


def _tail(text: str, columns: int) -> str:
    """The end of a text that fits in so many columns, behind an ellipsis where it is cut."""
    used = 0
    for i in range(len(text) - 1, -1, -1):
        used += cell_len(text[i])
        if used > columns:
            return _cut(text[i + 1 :], columns)
    return text


def _cut(text: str, columns: int) -> str:
    """Room for an ellipsis before a text that was cut."""
    if columns < 1:
        return ""
    while text and cell_len(text) > columns - 1:
        text = text[1:]
    return "…" + text
