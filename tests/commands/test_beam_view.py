"""Beams on the screen: what is drawn, how wide it is, and what is left when the answer ends."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

import pytest
from generate_kit import byte_level, make_renderer, random_engine
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from vicuna.commands.beam_view import drawn_beams, frame, view_of
from vicuna.generate.decode import Settings, Step, decode
from vicuna.generate.events import Beam
from vicuna.generate.tree import Node

RENDERER = make_renderer(byte_level(), "chatml")


def terminal(width: int = 60, height: int = 20) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    console = Console(
        file=file, force_terminal=True, width=width, height=height, color_system="standard",
        highlight=False, legacy_windows=False, _environ={"TERM": "xterm"},
    )  # fmt: skip
    return console, file


def beam(agreed: str, text: str, score: float, reason: str | None = None) -> Beam:
    root = Node()
    node = Node(root, 5)
    node.piece = agreed + text
    node.reason = reason  # type: ignore[assignment]
    return Beam(node, score, len(agreed))


def drawn(agreed: str, *texts: str, width: int = 60, height: int = 20) -> Text:
    beams = tuple(beam(agreed, t, -0.1 * i) for i, t in enumerate(texts))
    return frame(agreed, Step("", beams), width, height)


def dim_parts(text: Text) -> list[str]:
    return [text.plain[s.start : s.end] for s in text.spans if "dim" in str(s.style)]


def test_agreed_text_is_solid_and_the_rest_dim() -> None:
    made = drawn("你好，", "世界", "朋友")
    assert made.plain.splitlines() == ["你好，", "   0.000  你好，世界", "  -0.100  你好，朋友"]
    assert dim_parts(made) == ["世界", "朋友"]


def test_the_best_finished_answer_has_a_line() -> None:
    step = Step(
        "", (beam("a", "b", -1.0),),
        (beam("", "all of it", -0.5, "stop"), beam("", "another", -0.7, "stop")),
    )  # fmt: skip
    assert frame("a", step, 60, 20).plain.splitlines() == [
        "a",
        "  -0.500  all of it ■",
        "  -1.000  ab",
    ]


def test_long_answers_show_their_end() -> None:
    made = drawn("一二三四五六七八九十" * 20, "末尾", width=20, height=8).plain.splitlines()
    assert len(made) == 7
    assert made[:-1] == ["一二三四五六七八九十"] * 6
    assert made[-1] == "0.0 …六七八九十末尾"


def test_line_breaks_and_what_steers_a_terminal() -> None:
    made = drawn("one\ntwo\x1b[2J\tx\r", "a\nb")
    assert made.plain.splitlines()[:2] == ["one", "two·[2J x·"]
    assert made.plain.splitlines()[-1].endswith("one⏎two·[2J x·a⏎b")


def test_many_beams_in_a_low_window() -> None:
    made = drawn("", *"abcdefgh", height=6).plain.splitlines()
    assert len(made) == 3
    assert made[-1] == "and 6 more"


@settings(max_examples=300, deadline=None)
@given(
    agreed=st.text("a你😀\n é\x1b", max_size=300),
    texts=st.lists(st.text("a你😀\n", max_size=80), min_size=1, max_size=16),
    width=st.integers(4, 100),
    height=st.integers(2, 30),
)
def test_a_drawing_fits_the_window(agreed: str, texts: list[str], width: int, height: int) -> None:
    made = drawn(agreed, *texts, width=width, height=height)
    lines = made.plain.split("\n")
    assert len(lines) <= max(1, height - 1)
    assert max(map(cell_len, lines)) <= max(width, 5)
    if width >= 20 and height >= 5:
        assert re.sub(r"\s", "", made.plain)


# -- the whole way ----


def screen(output: str, width: int) -> list[str]:
    """What a terminal shows after this output: text, line feeds, and the few codes that rich's
    live drawings use."""
    lines, row, column = [""], 0, 0
    codes = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|(\r)|(\n)|([^\x1b\r\n]+)")
    for match in codes.finditer(output):
        arguments, code, back, feed, text = match.groups()
        if code == "A":
            row = max(0, row - int(arguments or 1))
        elif code == "K":
            lines[row] = ""
        elif back:
            column = 0
        elif feed:
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif text:
            kept = lines[row][:column] if column else ""
            lines[row] = kept + text + lines[row][len(kept + text) :]
            column += len(text)
            assert cell_len(lines[row]) <= width or "final" in text
    return lines


def steps(**chosen: object) -> Iterator[Step]:
    engine = random_engine(RENDERER.tokenizer.vocab_size, seed=3)
    made = Settings(num_beams=4, max_new_tokens=30, min_new_tokens=30, **chosen)  # type: ignore[arg-type]
    return (e for e in decode(engine, [5], made, RENDERER) if isinstance(e, Step))


def test_the_text_alone_is_left() -> None:
    console, file = terminal()
    said = ""
    with drawn_beams(console, lambda text: print(text, end="", file=file), rate=1e9) as show:
        for step in steps():
            said += step.text
            show(step)
    output = file.getvalue()
    assert output.count("\x1b[2m") > 50  # dim text was drawn again and again
    assert output.endswith(said)
    kept = "".join(screen(output[: len(output) - len(said)], 60))
    assert not kept.strip()  # the drawing is gone


def test_what_was_said_is_left_after_an_interruption() -> None:
    console, _ = terminal()
    shown: list[str] = []

    def talk() -> None:
        with drawn_beams(console, shown.append, rate=1e9) as show:
            show(Step("said so far", (beam("said so far", " open", -1.0),)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk()
    assert shown == ["said so far"]


def test_drawings_are_few_where_tokens_are_many() -> None:
    console, file = terminal()
    with drawn_beams(console, lambda _: None, rate=1e-6) as show:
        for step in steps():
            show(step)
    assert file.getvalue().count("\x1b[36m") == 8  # scores of the first drawing and the last


def test_where_text_is_typed() -> None:
    shown: list[str] = []
    pipe = Console(file=io.StringIO())
    for view in (view_of(shown.append, True, pipe), view_of(shown.append)):
        shown.clear()
        with view as show:
            said = []
            for step in steps():
                said += [step.text] if step.text else []
                show(step)
            assert shown == said  # as it comes
    console, file = terminal()
    with view_of(shown.append, True, console) as show:
        show(next(steps()))
    assert "\x1b[36m" in file.getvalue()
