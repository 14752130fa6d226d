"""Filters against their definitions, and draws against the distribution they leave."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from generate_kit import PathEngine, byte_level, make_renderer
from torch import Tensor

from vicuna.errors import SettingsError, UserError
from vicuna.generate import sampling
from vicuna.generate.decode import complete
from vicuna.generate.settings import Settings, biases_of

SCORES = torch.tensor([2.0, 1.6, 1.0, 0.9, 0.1, -0.5, -1.0, -3.0])
RENDERER = make_renderer(byte_level(), "chatml")
# 99.9th percentiles of chi-square by degrees of freedom; seeds are fixed, so nothing flickers.
LIMITS = [0, 10.83, 13.82, 16.27, 18.47, 20.52, 22.46, 24.32]


def saying_once(scores: Tensor) -> PathEngine:
    return PathEngine(lambda rows: scores.expand(len(rows), -1))


def chi_square(counts: Counter[Any], wanted: dict[Any, float], draws: int) -> float:
    assert all(wanted[key] > 0 for key in counts)
    return sum((counts[k] - draws * p) ** 2 / (draws * p) for k, p in wanted.items() if p)


def expected(scores: Tensor, s: Settings, prompt: list[int]) -> list[float]:
    """The distribution by the definitions, in plain Python."""
    logits = [float(x) for x in scores]
    for i in set(prompt):
        logits[i] = (
            logits[i] * s.repetition_penalty if logits[i] < 0 else logits[i] / s.repetition_penalty
        )
    logits = [x / s.temperature for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if s.top_k:
        order = order[: s.top_k]
    weights = {i: math.exp(logits[i]) for i in order}
    total = sum(weights.values())
    kept, mass = [], 0.0
    for i in order:
        if mass < s.top_p:
            kept.append(i)
        mass += weights[i] / total
    kept = [i for i in kept if weights[i] >= s.min_p * weights[order[0]]]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.5, "top_k": 5},
    {"top_p": 0.8},
    {"top_p": 0.3},
    {"min_p": 0.3},
    {"repetition_penalty": 1.7},
    {"temperature": 1.4, "top_k": 6, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_draws_follow_the_distribution(changes: dict[str, float]) -> None:
    """One token of 16 answers at a time: answers of one request are independent draws."""
    prompt, rounds, each = [0, 6], 200, 16
    counts: Counter[int] = Counter()
    for seed in range(rounds):
        settings = Settings(
            do_sample=True, seed=seed, num_return_sequences=each, max_new_tokens=1,
            **changes,
        )  # type: ignore[arg-type]  # fmt: skip
        for answer in complete(saying_once(SCORES), prompt, settings, RENDERER).answers:
            token = answer.token_ids[0]
            counts[token] += 1
            assert answer.score == pytest.approx(float(SCORES.log_softmax(0)[token]), abs=1e-5)
    wanted = expected(SCORES, settings, prompt)
    chi = chi_square(counts, dict(enumerate(wanted)), rounds * each)
    assert chi <= LIMITS[sum(p > 0 for p in wanted) - 1]


@pytest.mark.parametrize("p", [0.05, 0.5, 0.95, 0.999])
@pytest.mark.parametrize("spread", [0.01, 3.0])
def test_nucleus_of_a_large_vocabulary(p: float, spread: float) -> None:
    """With and without the short cut of sorting only the likeliest."""
    scores = torch.randn(2, 5000, generator=torch.Generator().manual_seed(1)) * spread
    for row, all_kept in zip(scores, sampling.top_p(scores, p) > -math.inf):
        ordered = row.double().softmax(0).sort(descending=True).values
        count = int((ordered.cumsum(0) - ordered < p).sum())
        assert int(all_kept.sum()) == pytest.approx(count, abs=1)
        assert row[all_kept].min() >= row[~all_kept].max()


def test_filters_keep_at_least_the_likeliest() -> None:
    for kept in (
        sampling.top_k(SCORES[None], 1),
        sampling.top_p(SCORES[None], 1e-9),
        sampling.min_p(SCORES[None], 1.0),
    ):
        assert (kept[0] > -math.inf).nonzero().flatten().tolist() == [0]


@pytest.mark.parametrize("keep", [1, 3, 50])
def test_filters_equal_those_of_transformers(keep: int) -> None:
    from transformers.generation import logits_process as theirs

    scores = torch.randn(4, 300, generator=torch.Generator().manual_seed(2)) * 3
    ids = torch.tensor([[1, 5, 5, 299]] * 4)
    pairs = [
        (sampling.top_k(scores, 40, keep), theirs.TopKLogitsWarper(40, min_tokens_to_keep=keep)),
        (sampling.top_p(scores, 0.7, keep), theirs.TopPLogitsWarper(0.7, min_tokens_to_keep=keep)),
        (sampling.min_p(scores, 0.1, keep), theirs.MinPLogitsWarper(0.1, min_tokens_to_keep=keep)),
        (
            sampling.typical_p(scores, 0.6, keep),
            theirs.TypicalLogitsWarper(0.6, min_tokens_to_keep=keep),
        ),
    ]
    for ours, their in pairs:
        assert torch.equal(ours, their(ids, scores))


@pytest.mark.parametrize("size", [3, 64, 300, 5000, 5003])
@pytest.mark.parametrize("k", [1, 2, 8, 70])
def test_top(size: int, k: int) -> None:
    generator = torch.Generator().manual_seed(size)
    scores = torch.randn(3, size, generator=generator)
    scores[:, : size // 2] = -math.inf
    values, ids = sampling.top(scores, k)
    assert torch.equal(values, scores.topk(min(k, size), 1).values)
    assert torch.equal(scores.gather(1, ids), values)
    assert all(len(set(row)) == len(row) for row in ids.tolist())


def test_the_first_of_equals_is_the_top() -> None:
    scores = torch.zeros(2, 5000)
    scores[:, [70, 71, 900]] = 5.0
    assert sampling.top(scores, 1)[1].tolist() == [[70], [70]]


def race(scores: Tensor, count: int, draws: int) -> Counter[tuple[tuple[int, int], ...]]:
    generator = torch.Generator().manual_seed(5)
    return Counter(
        tuple(sampling.sample_without_replacement(scores, count, generator)) for _ in range(draws)
    )


@pytest.mark.parametrize("head", [1, 2, 128])
def test_draws_without_replacement(head: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every ordered pair has its probability, whichever way its tokens were drawn."""
    monkeypatch.setattr(sampling, "_HEAD", head)
    scores = torch.tensor([[1.0, 0.2, -1.0, -math.inf], [0.5, -2.0, 0.0, 0.9]])
    p = scores.flatten().softmax(0).tolist()
    wanted = {
        (divmod(a, 4), divmod(b, 4)): p[a] * p[b] / (1 - p[a])
        for a in range(8)
        for b in range(8)
        if a != b
    }
    draws = 6000
    chi = chi_square(race(scores, 2, draws), wanted, draws)
    assert chi <= 74.7  # 99.9th percentile for 41 degrees of freedom


def test_draws_without_replacement_end_with_what_there_is() -> None:
    scores = torch.full((2, 400), -math.inf)
    scores[0, 399], scores[1, 7] = 0.0, -50.0
    assert set(race(scores, 5, 20)) == {((0, 399), (1, 7))}


def test_draws_from_a_flat_vocabulary() -> None:
    """Most tokens have no random number of their own; they are drawn all the same."""
    scores = torch.zeros(2, 2000)
    counts = Counter(place for places in race(scores, 8, 400) for place in places)
    assert 2100 < len(counts) < 2300  # 4000 * (1 - exp(-3200 / 4000)) = 2203
    halves = sum(n for (row, _), n in counts.items() if row == 0)
    assert abs(halves - 1600) < 120


def test_a_tiny_temperature_is_greedy_and_finite() -> None:
    for seed in range(10):
        settings = Settings(do_sample=True, temperature=1e-30, seed=seed, max_new_tokens=2)
        assert complete(saying_once(SCORES), [5], settings, RENDERER).token_ids == (0, 0)


def test_temperature_zero_is_greedy() -> None:
    settings = Settings(do_sample=True, temperature=0, max_new_tokens=1)
    assert settings.strategy == "greedy"
    assert complete(saying_once(SCORES), [5], settings, RENDERER).token_ids == (0,)


def test_an_answer_does_not_depend_on_how_many_there_are() -> None:
    def drawn(count: int) -> list[tuple[int, ...]]:
        settings = Settings(
            do_sample=True, seed=4, num_return_sequences=count, max_new_tokens=6, min_new_tokens=6
        )
        answers = complete(saying_once(SCORES), [5], settings, RENDERER).answers
        assert [a.score for a in answers] == sorted((a.score for a in answers), reverse=True)
        return [a.token_ids for a in answers]

    one, four, eight = drawn(1), drawn(4), drawn(8)
    assert set(one) < set(four) < set(eight)
    assert len(set(eight)) == 8


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("sample", [False, True])
def test_scores_that_are_no_numbers(beams: int, sample: bool) -> None:
    for bad in (math.nan, math.inf):
        scores = SCORES.clone()
        scores[3] = bad
        with pytest.raises(UserError, match="finite"):
            complete(
                saying_once(scores), [5], Settings(num_beams=beams, do_sample=sample), RENDERER
            )


@pytest.mark.parametrize("beams", [1, 3])
def test_nothing_is_allowed(beams: int) -> None:
    settings = Settings(num_beams=beams, logit_bias=dict.fromkeys(range(8), -math.inf))
    with pytest.raises(UserError, match="forbid every token"):
        complete(saying_once(SCORES), [5], settings, RENDERER)


# -- settings ----


def test_contradictions_come_all_at_once() -> None:
    with pytest.raises(SettingsError, match="4 mistakes"):
        Settings(
            min_new_tokens=9, max_new_tokens=8, stop=["a", ""], num_beams=2,  # type: ignore[arg-type]
            num_return_sequences=3, logit_bias={5: math.nan},
        )  # fmt: skip
    for wrong in (
        {"top_p": 0}, {"temperature": -1}, {"max_new_tokens": 0}, {"unknown": 1},
        {"num_beams": 17}, {"early_stopping": "sometimes"}, {"typical_p": 1.5},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            Settings(**wrong)  # type: ignore[arg-type]


SAMPLING = [
    {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.5}, {"min_p": 0.1}, {"typical_p": 0.5},
]  # fmt: skip
BEAMS: list[dict[str, Any]] = [{"length_penalty": 2.0}, {"early_stopping": "never"}]


@pytest.mark.parametrize("given", SAMPLING, ids=str)
def test_sampling_settings_without_sampling_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=r"no effect.*do_sample"):
        Settings(**given)
    if "temperature" not in given:
        with pytest.raises(SettingsError, match=r"no effect.*temperature 0"):
            Settings(do_sample=True, temperature=0, **given)
    assert Settings(do_sample=True, **given).strategy == "sample"
    assert Settings(do_sample=True, num_beams=2, **given).strategy == "beam-sample"


@pytest.mark.parametrize("given", BEAMS, ids=str)
def test_beam_settings_without_beams_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=r"no effect.*num_beams"):
        Settings(**given)
    assert Settings(num_beams=2, **given).strategy == "beam"


def test_several_equal_answers_are_refused() -> None:
    with pytest.raises(SettingsError, match="same answer"):
        Settings(num_return_sequences=2)


def test_what_does_nothing_may_be_given() -> None:
    Settings(temperature=1.0, top_k=0, top_p=1.0, length_penalty=1.0, early_stopping=False, seed=3)
    Settings(temperature=0)


def test_biases_from_words() -> None:
    assert biases_of(["5=-2", "a=b=1.5", "==-inf"]) == {"5": -2, "a=b": 1.5, "=": -math.inf}
    with pytest.raises(SettingsError, match="3 mistakes"):
        biases_of(["5", "=3", "a=b"])
