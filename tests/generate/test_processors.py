"""What changes logits: against the definitions, for branches that fork as beams do."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from generate_kit import byte_level, make_renderer, random_engine, sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vicuna.errors import SettingsError
from vicuna.generate.decode import complete
from vicuna.generate.processors import Processors, tokens_of
from vicuna.generate.settings import Settings

RENDERERS = {
    "byte-level": make_renderer(byte_level(), "chatml"),
    "sentencepiece": make_renderer(sentencepiece(), "alpaca"),
}
ENCODER = RENDERERS["byte-level"].tokenizer
VOCAB = 30


def check_forks(
    chosen: dict[str, Any], expected: Callable[[Tensor, list[int], list[int]], Tensor]
) -> None:
    """Rows that fork and die at random have logits as if each had been computed by itself.

    expected: logits of a row (V,), the prompt and the row's tokens, to changed logits (V,).
    """
    rng = random.Random(1)
    for case in range(10):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 12))]
        process = Processors(Settings(**chosen), prompt, [0, 1], ENCODER)
        rows: list[list[int]] = [[]]
        generator = torch.Generator().manual_seed(case)
        for _ in range(25):
            logits = torch.randn(len(rows), VOCAB, generator=generator)
            before = logits.clone()
            changed = process(logits)
            assert torch.equal(logits, before)
            for row, said in enumerate(rows):
                assert torch.allclose(changed[row], expected(logits[row], prompt, said), atol=1e-6)
            parents = [rng.randrange(len(rows)) for _ in range(rng.randint(1, 5))]
            tokens = [rng.randrange(rng.choice([4, VOCAB])) for _ in parents]
            process.advance(parents, tokens)
            rows = [[*rows[p], t] for p, t in zip(parents, tokens)]


@pytest.mark.parametrize("penalty", [0.7, 1.5])
def test_repetition(penalty: float) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    theirs = RepetitionPenaltyLogitsProcessor(penalty)
    check_forks(
        {"repetition_penalty": penalty},
        lambda logits, prompt, said: theirs(torch.tensor([prompt + said]), logits[None])[0],
    )


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ngrams(size: int) -> None:
    from transformers import NoRepeatNGramLogitsProcessor

    theirs = NoRepeatNGramLogitsProcessor(size)
    check_forks(
        {"no_repeat_ngram_size": size},
        lambda logits, prompt, said: theirs(torch.tensor([prompt + said]), logits[None])[0],
    )


def test_frequency_and_presence() -> None:
    def expected(logits: Tensor, _: list[int], said: list[int]) -> Tensor:
        counts = torch.tensor([said.count(i) for i in range(VOCAB)])
        return logits - 0.3 * counts - 0.8 * (counts > 0)

    check_forks({"frequency_penalty": 0.3, "presence_penalty": 0.8}, expected)


def test_bias_and_minimum_length() -> None:
    def expected(logits: Tensor, _: list[int], said: list[int]) -> Tensor:
        changed = logits.clone()
        changed[4] += 2.5
        changed[9] = -math.inf
        if len(said) < 3:
            changed[[0, 1]] = -math.inf
        return changed

    check_forks({"logit_bias": {4: 2.5, "9": -math.inf}, "min_new_tokens": 3}, expected)


def test_nothing_to_do() -> None:
    process = Processors(Settings(), [1], [2], ENCODER)
    logits = torch.zeros(1, VOCAB)
    assert not process
    assert process(logits) is logits


def test_all_together_in_the_order_of_generate() -> None:
    from transformers import LogitsProcessorList, NoRepeatNGramLogitsProcessor
    from transformers import RepetitionPenaltyLogitsProcessor as Repetition
    from transformers import SequenceBiasLogitsProcessor as Bias

    theirs = LogitsProcessorList(
        [Bias({(4,): 2.5}), Repetition(1.4), NoRepeatNGramLogitsProcessor(2)]
    )
    check_forks(
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "logit_bias": {4: 2.5}},
        lambda logits, prompt, said: theirs(torch.tensor([prompt + said]), logits[None])[0],
    )


def test_tokens_by_spelling() -> None:
    named = ["<|im_end|>", "a", "7", 7]
    assert tokens_of(named, ENCODER, "x") == [3, ENCODER.text("a")[0], 7, 7]
    with pytest.raises(SettingsError, match="3 mistakes"):
        tokens_of(["zebra crossing", -1, 10**6], ENCODER, "logit_bias")


# -- banned words ----

STRATEGIES: list[dict[str, Any]] = [{}, {"num_beams": 3}, {"do_sample": True, "seed": 1}]


@pytest.mark.parametrize("name", RENDERERS)
@pytest.mark.parametrize("chosen", STRATEGIES, ids=str)
@settings(max_examples=25, deadline=None)
@given(words=st.lists(st.text("ab好 😀", min_size=1, max_size=3), min_size=1, max_size=3))
def test_banned_words_never_come(name: str, chosen: dict[str, Any], words: list[str]) -> None:
    """However their letters are cut into tokens, also tokens that hold parts of characters."""
    renderer = RENDERERS[name]
    encoder = renderer.tokenizer
    likely = {i for w in ["a b", "ab", "好", "😀", " ab"] for i in encoder.text(w)}
    bias = dict.fromkeys(likely - encoder.control_ids, 9.0)
    engine = random_engine(encoder.vocab_size, spread=1.0)
    common = {"max_new_tokens": 20, "logit_bias": bias, **chosen}
    for prompt in ([5], [6]):
        text = complete(engine, prompt, Settings(**common, banned_words=words), renderer).text
        assert not any(w in text for w in words)


def test_only_what_completes_a_banned_word_is_forbidden() -> None:
    a, b = ENCODER.text("a")[0], ENCODER.text("b")[0]
    process = Processors(Settings(banned_words=("ab",)), [5], [1], ENCODER)
    logits = torch.zeros(1, ENCODER.vocab_size)
    forbidden = [
        {ENCODER.token(i) for i in (process(logits)[0] == -math.inf).nonzero().flatten().tolist()}
    ]
    for token in (a, a, b):
        process.advance([0], [token])
        found = (process(logits)[0] == -math.inf).nonzero().flatten().tolist()
        forbidden.append({ENCODER.token(i) for i in found})
    inside = {t for t in (ENCODER.token(i) for i in range(ENCODER.vocab_size)) if "ab" in t}
    begin = {t for t in (ENCODER.token(i) for i in range(ENCODER.vocab_size)) if t[0] == "b"}
    assert forbidden == [inside, inside | begin, inside | begin, inside]
    assert "b" in begin
