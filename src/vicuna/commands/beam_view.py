"""The answer while it grows, on the screen: typed, or with all its beams drawn in place.

    with view_of(write, show_beams=True) as show:
        for event in decode(...):
            if isinstance(event, Step):
                show(event)

A drawing is a block of the text that is final, and below it a line for each open beam: its score,
the agreed text solid, the rest dim. When the answer ends, the drawing goes and the text is left.
"""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.cells import cell_len
from rich.live import Live
from rich.text import Text

from vicuna.console import Console
from vicuna.generate.events import Beam, Step

# Drawings a second at most: a reader sees no more, and a slow terminal must not slow the answer.
_RATE = 20
_NARROW = 32  # columns below which scores are short


Show = Callable[[Step], None]  # shows how an answer stands


@contextmanager
def view_of(
    out: Callable[[str], None], show_beams: bool = False, console: Console | None = None
) -> Iterator[Show]:
    """Inside, the yielded function shows steps on the standard output: beams are drawn if it is a
    terminal, else text is typed.

    Args:
        out: shows text as it is, without adding a line's end.
    """
    console = console or Console()
    if show_beams and console.is_terminal and not console.is_dumb_terminal:
        with drawn_beams(console, out) as show:
            yield show
    else:
        yield lambda step: out(step.text) if step.text else None


@contextmanager
def drawn_beams(
    console: Console, out: Callable[[str], None], rate: float = _RATE
) -> Iterator[Show]:
    """Inside, the yielded function draws the beams in place; at the end, also after an error, the
    drawing goes, and the text alone is given to `out`.

    Args:
        console: a terminal.
        rate: drawings a second at most.
    """
    texts: list[str] = []
    tail, due = "", 0.0  # the end of the text: as much as a screen can show
    live = Live(console=console, auto_refresh=False, transient=True, vertical_overflow="crop")

    def show(step: Step) -> None:
        nonlocal tail, due
        width, height = console.size
        texts.append(step.text)
        tail = (tail + step.text)[-width * height :]
        now = time.monotonic()
        if now >= due and step.beams:
            due = now + 1 / rate
            live.update(frame(tail, step, width, height), refresh=True)

    live.start()
    try:
        yield show
    finally:
        live.stop()
        out("".join(texts))


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
