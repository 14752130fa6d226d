"""The history: taking back, saving, and fitting the context."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from generate_kit import byte_level, make_renderer
from hypothesis import given, settings
from hypothesis import strategies as st

from vicuna.data.conversation import Turn
from vicuna.data.records.formats import parse
from vicuna.data.records.read_file import read
from vicuna.data.templates.renderer import Renderer
from vicuna.errors import UserError
from vicuna.generate.chat import DENSE, Chat, fit

RENDERER = make_renderer(byte_level(), "chatml")


def talked(*said: str, system: str = "") -> Chat:
    chat = Chat(system)
    for question, answer in zip(said[::2], said[1::2]):
        chat.ask(question)
        chat.answer(answer)
    return chat


def test_turns() -> None:
    chat = talked("问一", "答一", system="礼貌。")
    assert chat.ask("问二") == [
        Turn("system", "礼貌。"),
        Turn("user", "问一"),
        Turn("assistant", "答一"),
        Turn("user", "问二"),
    ]


def test_undo_takes_back_a_question_and_its_answer() -> None:
    chat = talked("a", "b", "c", "d")
    assert chat.undo() == "c"
    assert [t.text for t in chat.turns] == ["a", "b"]
    assert (chat.undo(), chat.undo()) == ("a", None)


def test_a_question_without_any_answer_goes() -> None:
    assert [t.text for t in talked("a", "b", "c", "\n").turns] == ["a", "b"]


def test_reset_keeps_the_system_prompt() -> None:
    chat = talked("a", "b", system="s")
    chat.reset()
    assert chat.all_turns() == [Turn("system", "s")]


def test_what_is_saved_is_training_data(tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    talked("你好", "你好！\n\n有事吗？", "再见", "再见 😀", system="礼貌。").save(file)
    talked("1", "2").save(file)
    problems: list = []
    parsed = [parse(raw) for raw in read(file, problems)]
    assert not problems
    assert [[(t.role, t.text) for t in p.conversation.turns] for p in parsed if p.conversation] == [
        [
            ("system", "礼貌。"),
            ("user", "你好"),
            ("assistant", "你好！\n\n有事吗？"),
            ("user", "再见"),
            ("assistant", "再见 😀"),
        ],
        [("user", "1"), ("assistant", "2")],
    ]


def test_saving_nothing_or_nowhere(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing"):
        Chat().save(tmp_path / "x.jsonl")
    assert not (tmp_path / "x.jsonl").exists()
    with pytest.raises(UserError, match="cannot write"):
        talked("a", "b").save(tmp_path / "missing" / "x.jsonl")


WORDS = st.text("abc好", min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(
    said=st.lists(WORDS, min_size=1, max_size=11).filter(lambda s: len(s) % 2),
    system=st.sampled_from(["", "Be brief."]),
    context=st.integers(20, 300),
    reserve=st.integers(1, 400),
)
def test_fit(said: list[str], system: str, context: int, reserve: int) -> None:
    turns = [Turn("user" if i % 2 == 0 else "assistant", s) for i, s in enumerate(said)]
    head = [Turn("system", system)] if system else []
    fitted = fit([*head, *turns], RENDERER, context, reserve)
    kept = fitted.turns[len(head) :]
    assert fitted.turns[: len(head)] == head
    assert fitted.dropped + kept == turns
    assert kept[0].role == "user"
    assert fitted.prompt_ids == RENDERER.prompt(fitted.turns)
    budget = context - min(reserve, context // 2)
    assert len(fitted.prompt_ids) <= budget or len(kept) == 1
    if fitted.dropped:  # and not more than needed
        one_more = [*head, *fitted.dropped[-2:], *kept]
        assert len(RENDERER.prompt(one_more)) > budget


def test_fit_counts_the_templates_own_words() -> None:
    renderer: Renderer = make_renderer(byte_level(), "vicuna-chat")
    turns = [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")]
    whole = len(renderer.prompt(turns))
    assert not fit(turns, renderer, whole + 10, 10).dropped
    assert fit(turns, renderer, whole + 9, 10).dropped == turns[:2]


def test_what_cannot_fit_is_never_tokenized() -> None:
    class Counting:
        longest = 0

        def prompt(self, turns: Sequence[Turn]) -> list[int]:
            self.longest = max(self.longest, sum(len(t.text) for t in turns))
            return [0] * sum(len(t.text) // 4 for t in turns)

    renderer: Any = Counting()
    huge = "字" * 30_000_000
    for turns in ([Turn("user", huge)], [Turn("system", huge), Turn("user", "q")]):
        with pytest.raises(UserError, match="too long: 3000000"):
            fit(turns, renderer, 512, 64)
    talk = [Turn("user", huge), Turn("assistant", "a"), Turn("user", "b"), Turn("assistant", "c")]
    kept = fit([*talk, Turn("user", "q")], renderer, 512, 64)
    assert [t.text for t in kept.turns] == ["b", "c", "q"]
    many = [Turn(role, "x" * 9) for _ in range(50_000) for role in ("user", "assistant")]
    assert fit([*many, Turn("user", "q")], renderer, 512, 64).turns[-1].text == "q"
    assert renderer.longest <= DENSE * 512
