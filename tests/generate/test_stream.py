"""Text comes piece by piece, whole, and stop strings stay hidden."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from generate_kit import byte_level, sentencepiece, vocabulary
from hypothesis import given, settings
from hypothesis import strategies as st

from vicuna.data.tokenizer import Tokenizer
from vicuna.generate.stream import StopStrings, StreamState, TextStream

ENCODERS = {
    "byte-level": Tokenizer(vocabulary(byte_level())),
    "sentencepiece": Tokenizer(vocabulary(sentencepiece())),
}
# Any text, with a lean towards what takes several tokens; U+FFFD itself is tested by itself.
TEXT = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd▁"),
        st.sampled_from("你好𠮷龘😀👩\u200d🚀🇨🇳 \n\tab"),
    ),
    max_size=40,
)
every_encoder = pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS.keys())


def pieces(encoder: Tokenizer, ids: list[int], stops: Sequence[str] = ()) -> list[str]:
    stream, state = TextStream(encoder, stops), StreamState()
    parts = []
    for token_id in ids:
        part, state = stream.push(state, token_id)
        parts.append(part)
    return [*parts, stream.finish(state)]


@every_encoder
@settings(max_examples=150, deadline=None)
@given(text=TEXT)
def test_pieces_are_the_text(encoder: Tokenizer, text: str) -> None:
    parts = pieces(encoder, encoder.text(text))
    assert "".join(parts) == text.removeprefix(" ")
    assert not any("\ufffd" in p for p in parts)


@every_encoder
@settings(max_examples=100, deadline=None)
@given(text=TEXT)
def test_pieces_equal_decoding_at_once(encoder: Tokenizer, text: str) -> None:
    ids = encoder.text(text, first=True)
    whole = encoder.decode(ids)
    if encoder is ENCODERS["byte-level"]:
        whole = whole.removeprefix(" ")
    assert "".join(pieces(encoder, ids)) == whole


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, ENCODERS["byte-level"].vocab_size - 1), max_size=30))
def test_any_bytes_equal_decoding_at_once(ids: list[int]) -> None:
    """Also bytes that are no text: what a model says at random."""
    encoder = ENCODERS["byte-level"]
    whole = encoder.decode(ids).removeprefix(" ")
    shown = "".join(pieces(encoder, ids))
    # An unfinished last character is left out, up to three bytes of it.
    assert whole in [shown + "\ufffd" * n for n in range(4)]


@every_encoder
def test_half_a_character_is_never_shown(encoder: Tokenizer) -> None:
    ids = encoder.text("好🚀")
    assert len(ids) >= 4
    parts = pieces(encoder, ids[:-1])
    assert "".join(parts) == "好"
    assert pieces(encoder, ids)[len(ids) - 1] == "🚀"


@every_encoder
def test_a_broken_character_does_not_stop_the_text(encoder: Tokenizer) -> None:
    half = encoder.text("🚀")[:2]
    assert "".join(pieces(encoder, [*half, *encoder.text("好")])).endswith("好")


@every_encoder
def test_the_replacement_character_itself(encoder: Tokenizer) -> None:
    assert "".join(pieces(encoder, encoder.text("a\ufffdb"))) == "a\ufffdb"


@every_encoder
def test_only_the_first_space_goes(encoder: Tokenizer) -> None:
    assert "".join(pieces(encoder, encoder.text("  ab ab"))) == " ab ab"


@every_encoder
def test_control_tokens_are_not_shown(encoder: Tokenizer) -> None:
    controls = sorted(encoder.control_ids)
    a = encoder.text("a")
    assert "".join(pieces(encoder, [*controls, *a, *controls, *a])) == "aa"


def test_each_token_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Tokenizer(vocabulary(byte_level()))
    stream, state = TextStream(encoder), StreamState()
    lengths: list[int] = []
    decode = encoder.decode
    monkeypatch.setattr(encoder, "decode", lambda ids: lengths.append(len(ids)) or decode(ids))
    for token in encoder.text("床前明月光" * 200):
        _, state = stream.push(state, token)
    assert max(lengths) <= 2
    assert len(lengths) <= encoder.vocab_size
    assert len(state.pending) + len(state.held) == 0


@every_encoder
@settings(max_examples=60, deadline=None)
@given(head=TEXT, tails=st.lists(TEXT, min_size=2, max_size=3))
def test_a_fork_does_not_disturb_the_others(
    encoder: Tokenizer, head: str, tails: list[str]
) -> None:
    """Beams share one stream, and go on from the same state in turn, token by token."""
    stream = TextStream(encoder, ["ab好"])
    begin, state = encoder.text(head), StreamState()
    said = ""
    for token_id in begin:
        part, state = stream.push(state, token_id)
        said += part
    texts, states = [said] * len(tails), [state] * len(tails)
    ids = [encoder.text(t) for t in tails]
    for at in range(max(map(len, ids))):
        for i in range(len(tails)):
            if at < len(ids[i]):
                part, states[i] = stream.push(states[i], ids[i][at])
                texts[i] += part
    for text, end, tail in zip(texts, states, ids):
        assert text + stream.finish(end) == "".join(pieces(encoder, [*begin, *tail], ["ab好"]))


# -- stop strings ----

SHORT = st.text("ab😀", min_size=1, max_size=4)


@settings(max_examples=400, deadline=None)
@given(
    text=st.text("ab😀", max_size=25),
    stops=st.lists(SHORT, max_size=4),
    cuts=st.lists(st.integers(0, 25), max_size=8),
)
def test_stop_strings_never_leak(text: str, stops: list[str], cuts: list[int]) -> None:
    edges = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    holder = StopStrings(stops)
    shown, held, found = "", "", False
    for begin, end in pairwise(edges):
        if not found:
            part, held, found = holder.push(held, text[begin:end])
            shown += part
        assert text.startswith(shown)
        if not found:  # nothing that may yet become a stop string is out
            read = text[:end]
            open_at = [i for i in range(end) for s in stops if s.startswith(read[i:])]
            assert len(shown) <= min(open_at, default=end)
    shown += held
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    assert found == bool(ends)
    assert shown == (text[: min(ends)[1]] if ends else text)
    assert not any(s in shown for s in stops)


def test_text_is_held_back_only_while_it_must_be() -> None:
    holder, held, shown = StopStrings(["User:"]), "", []
    for character in "a U se":
        part, held, _ = holder.push(held, character)
        shown.append(part)
    assert shown == ["a", " ", "", "U ", "s", "e"]
    assert holder.push(held, " User") == (" ", "User", False)
