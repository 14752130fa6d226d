"""An example cut up for people's eyes: nothing is lost, nothing is coloured wrongly."""

from __future__ import annotations

import numpy as np
import pytest
from generate_kit import byte_level, make_renderer, sentencepiece

from vicuna.data.conversation import Conversation, Turn
from vicuna.data.dataset import Lengths
from vicuna.data.loss_mask import END_TOKEN, NEXT_TOKEN, NO_TARGET, Example
from vicuna.data.preview import BROKEN, spans, tokens
from vicuna.data.templates.renderer import Renderer

TURNS = [
    Turn("user", "你好 <|im_end|> 😀"),
    Turn("assistant", "很好，谢谢。 fine"),
    Turn("user", "再见"),
    Turn("assistant", "回头见 👋"),
]
RENDERERS = {
    "byte-level": make_renderer(byte_level(), "chatml"),
    "sentencepiece": make_renderer(sentencepiece(), "alpaca"),
    "silent ends": make_renderer(byte_level(), "vicuna-chat"),
}


@pytest.fixture(params=RENDERERS)
def renderer(request: pytest.FixtureRequest) -> Renderer:
    return RENDERERS[request.param]


def example_of(renderer: Renderer, turns: list[Turn] = TURNS) -> Example:
    segments = renderer.template.examples(Conversation(turns), "all")
    return renderer.tokenizer.encode_many(segments, renderer.end_id)[-1]


def test_spans_hold_every_token_once_and_are_learned_where_the_labels_say(
    renderer: Renderer,
) -> None:
    example = example_of(renderer)
    found = list(spans(example, renderer))
    ids = [i for span in found for i in span.ids]
    assert ids == example.ids.tolist()
    learned = [span.in_loss for span in found for _ in span.ids]
    expected = [False, *(example.labels[:-1] == NEXT_TOKEN).tolist()]
    assert learned == expected
    silent = [span for span in found if span.silent]
    assert len(silent) == int((example.labels == END_TOKEN).sum())
    assert all(span.in_loss and not span.ids for span in silent)


def test_a_learned_answer_and_its_end_stand_in_the_spans() -> None:
    renderer = RENDERERS["byte-level"]
    found = list(spans(example_of(renderer), renderer))
    answer = "".join(span.text for span in found if span.in_loss and not span.control)
    assert "很好，谢谢。 fine" in answer
    assert "你好" not in answer
    # What a user typed is text, even where it is spelled like a control token.
    assert any("<|im_end|>" in span.text for span in found if not span.control)


def test_tokens_together_are_the_span_and_none_is_half_a_character(renderer: Renderer) -> None:
    for span in spans(example_of(renderer), renderer):
        pieces = list(tokens(span, renderer.tokenizer))
        assert [i for _, ids in pieces for i in ids] == span.ids
        assert "".join(text for text, _ in pieces) == span.text
        assert not any(BROKEN in text for text, _ in pieces)


def test_bytes_that_are_no_character_are_shown_and_do_not_hang(renderer: Renderer) -> None:
    example = example_of(renderer)
    cut = Example(example.ids[:9], np.full(9, NO_TARGET, np.uint8))
    for span in spans(cut, renderer):
        assert [i for _, ids in tokens(span, renderer.tokenizer) for i in ids] == span.ids


def test_what_a_cutoff_loses() -> None:
    lengths = Lengths(np.array([10, 20, 30, 40]), np.array([5, 5, 25, 40]))
    lost = lengths.lost(20)
    assert lost == (0.5, 0.5, 70, 30)
    assert lengths.lost(40) == (0.0, 0.25, 0, 0)
    assert Lengths(np.zeros(0), np.zeros(0)).lost(5) == (0.0, 0.0, 0, 0)


def test_a_histogram_counts_everything_once() -> None:
    lengths = Lengths(np.array([1, 10, 11, 20, 39, 40, 41, 5000]), np.zeros(8))
    # Bars of ten tokens: 1 to 10, 11 to 20, 21 to 30, and all that is longer.
    assert lengths.histogram(40, 4) == [2, 2, 0, 4]
    assert sum(lengths.histogram(640, 64)) == 8
    assert (lengths.longest, lengths.quantile(50)) == (5000, 29)
