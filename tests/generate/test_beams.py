"""Beam search equals transformers' `generate` token for token; beam-sample its distribution."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
from generate_kit import (
    PathEngine,
    byte_level,
    make_renderer,
    plain_engine,
    random_engine,
    tiny_llama,
)
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from vicuna.generate.decode import Finished, Settings, decode
from vicuna.generate.engines.torch import open_engine

RENDERER = make_renderer(byte_level(), "chatml")
VOCAB = 64  # ids of the tokenizer's first tokens
SHAPES: list[dict[str, Any]] = [
    {},
    {"num_key_value_heads": 4, "tie_word_embeddings": True},
    {"num_key_value_heads": 1},
    {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2},
]
MODELS = [tiny_llama(VOCAB, seed, **shape) for seed in range(3) for shape in SHAPES]


class Ends:
    """A renderer with end tokens of the test's choice."""

    def __init__(self, ends: list[int]) -> None:
        self.tokenizer, self.stop_ids = RENDERER.tokenizer, frozenset(ends)


def ours(engine: Any, prompt: list[int], ends: list[int], **chosen: Any) -> Finished:
    *_, last = decode(engine, prompt, Settings(**chosen), Ends(ends))  # type: ignore[arg-type]
    assert isinstance(last, Finished)
    return last


def theirs(model: Any, prompt: list[int], ends: list[int], **chosen: Any) -> list[Any]:
    """(token ids, score) of each sequence that `generate` returns."""
    made = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        eos_token_id=ends,
        pad_token_id=VOCAB - 1,
        return_dict_in_generate=True,
        output_scores=True,
        **chosen,
    )
    answers = []
    for row, score in zip(made.sequences[:, len(prompt) :].tolist(), made.sequences_scores):
        end = next((i for i, t in enumerate(row) if t in ends), len(row) - 1)
        answers.append((row[: end + 1], float(score)))
    return answers


def case(seed: int) -> tuple[Any, list[int], list[int], dict[str, Any]]:
    """A model, a prompt, end tokens and settings. VOCAB - 1 pads and is never generated."""
    rng = random.Random(seed)
    model = MODELS[rng.randrange(len(MODELS))]
    prompt = [rng.randrange(VOCAB - 1) for _ in range(rng.randint(1, 12))]
    ends = rng.sample(range(VOCAB - 1), rng.choice([1, 3, 6, 12, 18]))
    beams = rng.choice([2, 3, 4, 4, 5, 8])
    longest = rng.randint(1, 12)
    chosen: dict[str, Any] = {
        "num_beams": beams,
        "num_return_sequences": rng.randint(1, beams),
        "max_new_tokens": longest,
        "length_penalty": rng.choice([1.0, 1.0, 0.0, 0.5, 2.0, -1.0]),
        "early_stopping": rng.choice([False, True, "never"]),
        "min_new_tokens": rng.choice([0, 0, rng.randint(0, longest)]),
        "repetition_penalty": rng.choice([1.0, 1.0, 0.8, 1.3, 2.0]),
        "no_repeat_ngram_size": rng.choice([0, 0, 1, 2, 3]),
    }
    if seed % 2:  # searches that end early, where it matters when they do
        ends = rng.sample(range(VOCAB - 1), rng.choice([6, 12, 24]))
        chosen |= {
            "num_beams": 2 + seed % 3,
            "num_return_sequences": 2,
            "max_new_tokens": 14,
            "length_penalty": rng.choice([1.0, 1.5, 2.0, 3.0]),
            "min_new_tokens": 0,
            "repetition_penalty": 1.0,
        }
    return model, prompt, ends, chosen


@pytest.mark.parametrize("first", range(0, 240, 20))
def test_beam_search_equals_generate(first: int) -> None:
    for seed in range(first, first + 20):
        model, prompt, ends, chosen = case(seed)
        wanted = theirs(model, prompt, ends, do_sample=False, **chosen)
        found = ours(plain_engine(model), prompt, ends, **chosen)
        assert [list(a.token_ids) for a in found.answers] == [ids for ids, _ in wanted], seed
        for answer, (ids, score) in zip(found.answers, wanted):
            assert answer.score == pytest.approx(score, abs=1e-4), seed
            assert answer.finish_reason == ("stop" if ids[-1] in ends else "length")


@pytest.mark.parametrize("seed", range(20))
def test_beam_search_over_the_torch_engine(seed: int) -> None:
    """The cached tree of the real engine gives the same beams."""
    model, prompt, ends, chosen = case(seed)
    wanted = ours(plain_engine(model), prompt, ends, **chosen)
    found = ours(open_engine(model, 64), prompt, ends, **chosen)
    assert [a.token_ids for a in found.answers] == [a.token_ids for a in wanted.answers]
    assert found.score == pytest.approx(wanted.score, abs=1e-4)


class Penalty(LogitsProcessor):
    """Frequency and presence penalty by their definition."""

    def __init__(self, prompt: int, frequency: float, presence: float) -> None:
        self.prompt, self.frequency, self.presence = prompt, frequency, presence

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        changed = scores.clone()
        for row, ids in enumerate(input_ids[:, self.prompt :].tolist()):
            for token, count in Counter(ids).items():
                changed[row, token] -= self.frequency * count + self.presence
        return changed


class Spoken(StoppingCriteria):
    """Ends a row whose text contains a stop string."""

    def __init__(self, prompt: int, stops: list[str]) -> None:
        self.prompt, self.stops = prompt, stops

    def __call__(self, input_ids: Tensor, _scores: Any, **_: Any) -> Tensor:  # type: ignore[override]
        texts = [RENDERER.tokenizer.decode(row) for row in input_ids[:, self.prompt :].tolist()]
        return torch.tensor([any(s in t for s in self.stops) for t in texts])


@pytest.mark.parametrize("seed", range(20))
def test_penalties_bias_and_stop_tokens(seed: int) -> None:
    model, prompt, ends, _ = case(seed)
    rng = random.Random(seed)
    frequency, presence = rng.choice([0.0, 0.7, -0.5]), rng.choice([0.0, 1.5])
    bias = {rng.randrange(VOCAB - 1): rng.choice([-3.0, 2.0, -math.inf]) for _ in range(5)}
    common: dict[str, Any] = {"num_beams": 4, "max_new_tokens": 12, "num_return_sequences": 4}
    wanted = theirs(
        model, prompt, ends, **common,
        sequence_bias={(token,): value for token, value in bias.items()},
        logits_processor=LogitsProcessorList([Penalty(len(prompt), frequency, presence)]),
    )  # fmt: skip
    found = ours(
        plain_engine(model), prompt, ends[:1], **common, logit_bias=bias,
        frequency_penalty=frequency, presence_penalty=presence, stop_tokens=ends[1:],
    )  # fmt: skip
    assert [list(a.token_ids) for a in found.answers] == [ids for ids, _ in wanted]
    scores = [score for _, score in wanted]
    assert [a.score for a in found.answers] == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize("seed", range(20))
def test_a_stop_string_finishes_a_beam(seed: int) -> None:
    model, prompt, ends, _ = case(seed)
    letters = [RENDERER.tokenizer.decode([i]) for i in range(10, 60)]
    rng = random.Random(seed)
    stops = rng.sample(letters, 6) + ["".join(rng.sample(letters, 2))]
    common: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 10, "num_return_sequences": 3}
    criteria = StoppingCriteriaList([Spoken(len(prompt), stops)])
    wanted = theirs(model, prompt, ends, **common, stopping_criteria=criteria)
    found = ours(plain_engine(model), prompt, ends, **common, stop=stops)
    for answer, (ids, score) in zip(found.answers, wanted):
        text = RENDERER.tokenizer.decode([t for t in answer.token_ids if t not in ends])
        stopped = [text.index(s) for s in stops if s in text]
        assert answer.token_ids == tuple(ids[: len(answer.token_ids)])
        assert answer.score == pytest.approx(score, abs=1e-4)
        if answer.finish_reason == "stop_string":
            assert text.startswith(answer.text)
            assert len(answer.text) <= min(stopped)
        else:
            assert not stopped


def test_all_beams_go_on_where_most_continuations_end() -> None:
    """However many continuations end with a stop string, as many beams as asked for go on."""
    letters = [RENDERER.tokenizer.decode([i]) for i in range(10, 50)]
    for chosen in ({}, {"do_sample": True, "seed": 1}):
        settings = Settings(
            num_beams=4,
            stop=letters,
            max_new_tokens=5,
            early_stopping="never",
            length_penalty=3.0,
            **chosen,
        )
        events = decode(plain_engine(MODELS[0]), [5], settings, RENDERER)
        steps = [e for e in events if not isinstance(e, Finished)]
        assert [len(s.beams) for s in steps[:3]] == [4, 4, 4]


def test_more_beams_than_continuations() -> None:
    """Three tokens: the second step has at most six open branches, and nothing is made up."""
    engine = random_engine(3, seed=1)
    *steps, last = decode(engine, [0], Settings(num_beams=16, max_new_tokens=3), Ends([2]))  # type: ignore[arg-type]
    assert [len(s.beams) for s in steps if not isinstance(s, Finished)][:2] == [2, 4]
    assert isinstance(last, Finished)


SAMPLED = [
    {"num_beams": 2},
    {"num_beams": 3, "temperature": 1.7, "length_penalty": 0.0},
    {"num_beams": 2, "top_k": 3, "early_stopping": True},
    {"num_beams": 2, "top_p": 0.7, "temperature": 0.8},
]


@pytest.mark.parametrize("chosen", SAMPLED, ids=str)
def test_beam_sample_follows_the_distribution_of_generate(chosen: dict[str, Any]) -> None:
    """Frequencies of whole answers over thousands of seeds, by a two-sample chi-square test."""
    model = tiny_llama(6, 3, initializer_range=0.1)
    prompt, ends, runs = [4, 2], [1], 1200
    torch.manual_seed(11)
    made = model.generate(
        torch.tensor([prompt] * runs), attention_mask=torch.ones(runs, 2, dtype=torch.long),
        eos_token_id=ends, pad_token_id=5, do_sample=True, max_new_tokens=3,
        **{"top_k": 0, **chosen},
    )[:, 2:].tolist()  # fmt: skip
    wanted = Counter(tuple(r[: r.index(1) + 1] if 1 in r else r) for r in made)
    engine = remembered(plain_engine(model))
    found = Counter(
        ours(engine, prompt, ends, do_sample=True, max_new_tokens=3, seed=s, **chosen).token_ids
        for s in range(runs)
    )
    chi, cells = two_sample(wanted, found)
    assert cells > 5
    # 99.9th percentile of chi-square (Wilson and Hilferty 1931); the seeds are fixed.
    freedom = cells - 1
    assert chi <= freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3


def remembered(engine: PathEngine) -> PathEngine:
    """The same engine, each path computed once."""
    known: dict[tuple[int, ...], Tensor] = {}
    score = engine.score

    def recall(rows: list[list[int]]) -> Tensor:
        for row in rows:
            if tuple(row) not in known:
                known[tuple(row)] = score([row])[0]
        return torch.stack([known[tuple(row)] for row in rows])

    engine.score = recall
    return engine


def two_sample(a: Counter[Any], b: Counter[Any]) -> tuple[float, int]:
    """Chi-square of two samples of one size, and the cells; rare outcomes are one cell."""
    cells: Counter[Any] = Counter()
    others: Counter[Any] = Counter()
    for key in a.keys() | b.keys():
        cell = key if a[key] + b[key] >= 20 else "rare"
        cells[cell] += a[key]
        others[cell] += b[key]
    keys = cells.keys() | others.keys()
    chi = sum((cells[k] - others[k]) ** 2 / (cells[k] + others[k]) for k in keys)
    return chi, len(keys)


def test_the_same_seed_draws_the_same_beams() -> None:
    engine = plain_engine(MODELS[0])
    drawn = {
        ours(engine, [5], [1], num_beams=3, do_sample=True, seed=s, max_new_tokens=10).token_ids
        for s in (1, 1, 2, 3)
    }
    assert len(drawn) == 3
