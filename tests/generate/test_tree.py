"""The tree of tokens: forks are cheap, long answers too."""

from __future__ import annotations

import gc
import sys
from typing import Any

import pytest
from generate_kit import byte_level, make_renderer, random_engine

from vicuna.generate.decode import Finished, Settings, decode
from vicuna.generate.tree import Node, StablePrefix

RENDERER = make_renderer(byte_level(), "chatml")


def child(parent: Node, piece: str, token_id: int = 5) -> Node:
    node = Node(parent, token_id)
    node.piece = piece
    return node


def test_text_and_tokens_of_a_branch() -> None:
    root = Node()
    a = child(root, "ab", 1)
    b = child(child(a, "", 2), "cde", 3)
    assert (b.text(), b.token_ids(), b.length, b.offset) == ("abcde", (1, 2, 3), 3, 2)
    assert [b.text(i) for i in range(7)] == ["abcde", "bcde", "cde", "de", "e", "", ""]
    assert (root.text(), root.token_ids(), root.length) == ("", (), 0)


def test_branches_agree_beyond_their_fork() -> None:
    root = Node()
    agreement = StablePrefix(root)
    the, then = child(root, "the", 1), child(root, "th", 2)
    assert agreement.update([the, then]) == "th"
    cat, dog = child(the, " cat"), child(then, "e do")
    assert agreement.update([cat, dog]) == "e "
    assert agreement.update([child(cat, "s"), child(dog, "g")]) == ""
    assert agreement.length == 4


def test_what_dies_no_longer_disagrees() -> None:
    root = Node()
    agreement = StablePrefix(root)
    a, b = child(root, "a"), child(root, "b")
    assert agreement.update([a, b]) == ""
    x, y = child(a, "x"), child(a, "y")
    assert agreement.update([x, y]) == "a"
    assert agreement.update([child(y, "z")]) == "yz"


def test_a_finished_branch_holds_the_text_until_it_is_beaten() -> None:
    root = Node()
    agreement = StablePrefix(root)
    a = child(root, "a")
    assert agreement.update([a]) == "a"
    end, go = child(a, ""), child(a, "b")
    assert agreement.update([go, end]) == ""
    better, on = child(go, "c"), child(go, "cd")
    assert agreement.update([on, better]) == "bc"


def long_answer(tokens: int, **chosen: Any) -> tuple[int, Finished]:
    """Calls of Python functions that steps cost, all but the engine's, in the last 50 steps."""
    engine = random_engine(RENDERER.tokenizer.vocab_size)
    calls = 0

    def count(frame: Any, event: str, _: Any) -> None:
        nonlocal calls
        calls += event == "call" and "/vicuna/" in frame.f_code.co_filename

    events = decode(
        engine, [5], Settings(max_new_tokens=tokens, min_new_tokens=tokens, **chosen), RENDERER
    )
    for step, event in enumerate(events, 1):
        if step == tokens - 50:
            sys.setprofile(count)
        if step == tokens - 1:
            sys.setprofile(None)
        last = event
    assert isinstance(last, Finished)
    return calls, last


@pytest.mark.parametrize(
    "chosen",
    [{}, {"num_beams": 4}, {"num_beams": 4, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3}],
    ids=str,
)
def test_a_step_costs_the_same_however_long_the_answer_is(chosen: dict[str, Any]) -> None:
    short, _ = long_answer(60, **chosen)
    long, _ = long_answer(400, **chosen)
    assert long < 1.6 * short


def test_dead_branches_are_freed() -> None:
    def nodes() -> int:
        gc.collect()
        return sum(isinstance(o, Node) for o in gc.get_objects())

    before = nodes()
    engine = random_engine(RENDERER.tokenizer.vocab_size)
    events = decode(
        engine, [5], Settings(max_new_tokens=100, min_new_tokens=100, num_beams=4), RENDERER
    )
    most = 0
    for step, _ in enumerate(events, 1):
        if step % 20 == 0:
            most = max(most, (nodes() - before) / step)
    assert most < 8  # nodes a step: not all 4 * 2 that were looked at


def test_a_very_long_branch_can_be_forgotten() -> None:
    node = Node()
    agreement = StablePrefix(node)
    for _ in range(60_000):
        node = child(node, "a")
        agreement.update([node])
    assert len(node.text()) == 60_000
    del node, agreement
    gc.collect()
