"""Filters against their definitions, and draws against the distribution they leave."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from vicuna.errors import UserError
from vicuna.generate import sampling
from vicuna.generate.sampling import Chooser
from vicuna.generate.settings import Settings

SCORES = torch.tensor([2.0, 1.6, 1.0, 0.9, 0.1, -0.5, -1.0, -3.0])


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
    settings = Settings(do_sample=True, seed=3, **changes)  # type: ignore[arg-type]
    prompt, draws = [0, 6], 4000
    wanted = expected(SCORES, settings, prompt)
    choose = Chooser(settings, prompt, [])
    counts: Counter[int] = Counter()
    for _ in range(draws):
        token, logprob = choose(SCORES)
        counts[token] += 1
        if choose._seen is not None:  # each draw starts from the same history here
            choose._seen[token] = token in prompt
        assert logprob == pytest.approx(float(SCORES.log_softmax(0)[token]), abs=1e-5)
    assert all(wanted[i] > 0 for i in counts)
    chi = sum((counts[i] - draws * p) ** 2 / (draws * p) for i, p in enumerate(wanted) if p)
    # 99.9th percentiles of chi-square; the seed is fixed, so this never flickers.
    limit = [0, 10.83, 13.82, 16.27, 18.47, 20.52, 22.46, 24.32][sum(p > 0 for p in wanted) - 1]
    assert chi <= limit


@pytest.mark.parametrize("p", [0.05, 0.5, 0.95, 0.999])
@pytest.mark.parametrize("spread", [0.01, 3.0])
def test_nucleus_of_a_large_vocabulary(p: float, spread: float) -> None:
    """With and without the short cut of sorting only the likeliest."""
    scores = torch.randn(5000, generator=torch.Generator().manual_seed(1)) * spread
    kept = sampling.top_p(scores, p) > -math.inf
    ordered = scores.double().softmax(0).sort(descending=True).values
    assert int(kept.sum()) == pytest.approx(int((ordered.cumsum(0) - ordered < p).sum()), abs=1)
    assert scores[kept].min() >= scores[~kept].max()


def test_filters_keep_at_least_the_likeliest() -> None:
    for kept in (
        sampling.top_k(SCORES, 1),
        sampling.top_p(SCORES, 1e-9),
        sampling.min_p(SCORES, 1.0),
    ):
        assert (kept > -math.inf).nonzero().flatten().tolist() == [0]


def test_filters_equal_those_of_transformers() -> None:
    from transformers.generation import logits_process as theirs

    scores = torch.randn(300, generator=torch.Generator().manual_seed(2)) * 3
    ids = torch.tensor([[1, 5, 5, 299]])
    seen = torch.zeros(300, dtype=torch.bool)
    seen[ids[0]] = True
    pairs = [
        (sampling.penalise(scores, seen, 1.3), theirs.RepetitionPenaltyLogitsProcessor(1.3)),
        (sampling.top_k(scores, 40), theirs.TopKLogitsWarper(40)),
        (sampling.top_p(scores, 0.7), theirs.TopPLogitsWarper(0.7)),
        (sampling.min_p(scores, 0.1), theirs.MinPLogitsWarper(0.1)),
    ]
    for ours, their in pairs:
        assert torch.equal(ours, their(ids, scores[None])[0])


def test_a_tiny_temperature_is_greedy_and_finite() -> None:
    choose = Chooser(Settings(do_sample=True, temperature=1e-30, seed=0), [], [])
    assert {choose(SCORES)[0] for _ in range(20)} == {0}


def test_temperature_zero_is_greedy() -> None:
    choose = Chooser(Settings(do_sample=True, temperature=0), [], [])
    assert choose(SCORES)[0] == 0


def test_end_tokens_wait_for_min_new_tokens() -> None:
    choose = Chooser(Settings(min_new_tokens=2), [], [0, 1])
    assert [choose(SCORES)[0] for _ in range(3)] == [2, 2, 0]


def test_scores_that_are_no_numbers() -> None:
    with pytest.raises(UserError, match="finite"):
        Chooser(Settings(), [], [])(SCORES * math.nan)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(UserError, match="2 mistakes"):
        Settings(min_new_tokens=9, max_new_tokens=8, stop=["a", ""])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="beams are coming"):
        Settings(num_beams=4)
    for wrong in ({"top_p": 0}, {"temperature": -1}, {"max_new_tokens": 0}, {"unknown": 1}):
        with pytest.raises(ValueError):
            Settings(**wrong)  # type: ignore[arg-type]
