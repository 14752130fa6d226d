"""Prompts that are answered at once get the answers that each gets alone."""

from __future__ import annotations

import pytest
import torch
from generate_kit import byte_level, sentencepiece, tiny_llama, vocabulary

from kit import tiny_model
from vicuna.data.conversation import Turn
from vicuna.data.templates.registry import find_template
from vicuna.data.templates.renderer import Renderer
from vicuna.data.tokenizer import Tokenizer
from vicuna.generate.batched_greedy import answer_together, groups
from vicuna.generate.decode import complete
from vicuna.generate.engines.torch import open_engine
from vicuna.generate.settings import Settings

QUESTIONS = [
    "你好",
    "The quick brown fox",
    "月",
    "你好，我是助手。今天天气很好，我们去公园吧。",
    "你好",
]


@pytest.mark.parametrize("tokenizer", [byte_level, sentencepiece])
@pytest.mark.parametrize("template", ["alpaca", "chatml", "llama2"])
def test_answers_are_those_of_each_alone(tokenizer, template: str) -> None:  # type: ignore[no-untyped-def]
    words = vocabulary(tokenizer())
    renderer = Renderer(find_template(template, words), Tokenizer(words))
    engine = open_engine(tiny_llama(400, seed=3, max_position_embeddings=512).float(), 512)
    prompts = [renderer.prompt([Turn("user", q)]) for q in QUESTIONS]
    alone = [complete(engine, p, Settings(max_new_tokens=24), renderer).answers[0] for p in prompts]
    together = answer_together(engine, prompts, 24, renderer)
    assert [a.text for a in together] == [a.text for a in alone]
    assert [a.finish_reason for a in together] == [a.finish_reason for a in alone]
    assert len({a.text for a in together}) > 1


def test_the_windows_of_a_model_are_kept() -> None:
    words = vocabulary(byte_level())
    renderer = Renderer(find_template("chatml", words), Tokenizer(words))
    engine = open_engine(tiny_model("gemma3", vocab_size=400), 512)
    prompts = [renderer.prompt([Turn("user", q)]) for q in QUESTIONS]
    alone = [complete(engine, p, Settings(max_new_tokens=24), renderer).text for p in prompts]
    assert [a.text for a in answer_together(engine, prompts, 24, renderer)] == alone


def test_a_full_context_and_a_caller_who_has_enough_end_an_answer() -> None:
    words = vocabulary(byte_level())
    renderer = Renderer(find_template("alpaca", words), Tokenizer(words))
    prompts = [renderer.prompt([Turn("user", q)]) for q in QUESTIONS[:2]]
    room = max(map(len, prompts)) + 3
    engine = open_engine(tiny_llama(400, seed=3, max_position_embeddings=512), room)
    found = answer_together(engine, prompts, 99, renderer)
    assert "context" in {a.finish_reason for a in found}
    assert all(len(p) + len(a.token_ids) <= room for p, a in zip(prompts, found))
    asked: list[int] = []

    def enough() -> bool:
        asked.append(1)
        return len(asked) > 40

    engine = open_engine(tiny_llama(400, seed=3, max_position_embeddings=512), 512)
    cut = answer_together(engine, prompts, 400, renderer, enough)
    whole = answer_together(engine, prompts, 400, renderer)
    assert "cancelled" in {a.finish_reason for a in cut}
    assert all(w.text.startswith(c.text) for c, w in zip(cut, whole))


def test_scores_that_are_no_numbers_are_told() -> None:
    from vicuna.errors import UserError

    words = vocabulary(byte_level())
    renderer = Renderer(find_template("alpaca", words), Tokenizer(words))
    model = tiny_llama(400)
    engine = open_engine(model, 512)
    model.lm_head.weight.data[:] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        answer_together(engine, [renderer.prompt([Turn("user", "a")])], 4, renderer)


def test_long_prompts_are_answered_alone() -> None:
    short, long = [1, 2, 3], [1, 2, *range(100)]
    assert list(groups([short, long, short], 64, 10)) == [[0, 2], [1]]
    assert list(groups([short] * 5, 2, 10)) == [[0, 1], [2, 3], [4]]
    assert list(groups([[1], [2]], 64, 10)) == [[0], [1]]


def test_one_answer_ends_where_the_caller_says_and_the_others_go_on() -> None:
    words = vocabulary(byte_level())
    renderer = Renderer(find_template("chatml", words), Tokenizer(words))
    engine = open_engine(tiny_llama(400, seed=3, max_position_embeddings=512), 512)
    prompts = [renderer.prompt([Turn("user", q)]) for q in QUESTIONS]
    whole = [a.text for a in answer_together(engine, prompts, 24, renderer)]
    assert all(len(text) > 2 for text in whole)

    def short(number: int, text: str) -> bool:
        return number % 2 == 0 or not text

    cut = [a.text for a in answer_together(engine, prompts, 24, renderer, go_on=short)]
    assert cut[::2] == whole[::2]
    assert all(w.startswith(c) and 0 < len(c) < len(w) for c, w in zip(cut[1::2], whole[1::2]))
