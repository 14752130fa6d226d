"""A thought apart from its answer, however the text comes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vicuna.data.templates.base import ThoughtMarks
from vicuna.generate.thoughts import Parts, ThoughtStream, Typed, split

PLAIN = ThoughtMarks("<think>\n", "\n</think>\n\n")
OPENED = ThoughtMarks("<think>\n", "\n</think>\n\n", opened=True)


@pytest.mark.parametrize(
    ("marks", "text", "wanted"),
    [
        (PLAIN, "<think>\n五减二。\n</think>\n\n三。", ("五减二。", "三。")),
        (PLAIN, "\n<think>a\n\nb</think>c\n", ("a\n\nb", "c\n")),
        (PLAIN, "<think>\n\n</think>\n\n三。", ("", "三。")),
        (PLAIN, "三。", ("", "三。")),
        (PLAIN, " x <think>y</think>", ("", " x <think>y</think>")),
        (PLAIN, "<thin", ("", "<thin")),
        (PLAIN, "<think>还没有想完", ("还没有想完", "")),
        (OPENED, "五减二。\n</think>\n\n三。", ("五减二。", "三。")),
        (OPENED, "五减二。\n</thi", ("五减二。\n</thi", "")),
        (ThoughtMarks("", ""), "<think>a</think>b", ("", "<think>a</think>b")),
    ],
)
def test_an_answer_is_cut_at_its_marks(
    marks: ThoughtMarks, text: str, wanted: tuple[str, str]
) -> None:
    assert split(text, marks) == Parts(*wanted)


texts = st.lists(st.sampled_from(["<think>", "</think>", "<th", "ink>", "\n", " ", "好", "ab"]))


@given(parts=texts, opened=st.booleans())
def test_it_does_not_matter_how_the_text_comes(parts: list[str], opened: bool) -> None:
    marks = OPENED if opened else PLAIN
    whole = split("".join(parts), marks)
    for pieces in (parts, list("".join(parts))):
        stream = ThoughtStream(marks)
        found = [stream.push(p) for p in pieces] + [stream.finish()]
        assert Parts("".join(f.thought for f in found), "".join(f.answer for f in found)) == whole


def test_the_thought_is_typed_above_the_answer() -> None:
    shown: list[str] = []
    typed = Typed(shown.append, PLAIN, lambda text: shown.append(f"({text})"))
    for piece in ("<think>\n想", "一想\n</th", "ink>\n\n三", "。"):
        typed(piece)
    assert typed.finish() == Parts("想一想", "三。")
    assert "".join(shown) == "(想)(一想)\n\n三。"
