"""Decoding over PyTorch equals transformers' `generate`, streams, and ends as it should."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from generate_kit import ScriptedEngine, byte_level, make_renderer, saying, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st

from vicuna.data.template import Renderer
from vicuna.errors import UserError
from vicuna.generate.decode import Finished, Piece, Settings, decode
from vicuna.generate.engines.base import OutOfMemory
from vicuna.generate.engines.torch import TorchEngine
from vicuna.generate.events import one_shot_json

ENDS = range(200, 230)  # so many end tokens that random models end now and then
RENDERER = make_renderer(byte_level(), "chatml", ends=ENDS)
VOCAB = RENDERER.encoder.vocab_size
MODELS = [tiny_llama(VOCAB, seed) for seed in range(3)]
MODELS[1] = tiny_llama(VOCAB, 1, num_key_value_heads=4, tie_word_embeddings=True)


def run(engine: Any, prompt: list[int], renderer: Renderer = RENDERER, **s: Any) -> Finished:
    *pieces, last = decode(engine, prompt, Settings(**s), renderer)
    assert isinstance(last, Finished)
    assert all(isinstance(p, Piece) for p in pieces)
    assert "".join(p.text for p in pieces) == last.text
    assert tuple(p.token_id for p in pieces if p.token_id is not None) == last.token_ids
    return last


def random_prompt(rng: random.Random) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(rng.randint(1, 40))]


@pytest.mark.parametrize("case", range(60))
def test_greedy_equals_generate(case: int) -> None:
    rng = random.Random(case)
    model = MODELS[case % len(MODELS)]
    prompt = random_prompt(rng)
    longest = rng.randint(1, 24)
    chosen = {
        "max_new_tokens": longest,
        "min_new_tokens": rng.choice([0, rng.randint(0, longest)]),
        "repetition_penalty": rng.choice([1.0, 1.0, 0.8, 1.3, 2.0]),
    }
    theirs = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        eos_token_id=sorted(RENDERER.stop_ids),
        pad_token_id=0,
        **chosen,
    )[0, len(prompt) :].tolist()
    ours = run(TorchEngine(model, 256), prompt, **chosen)
    assert list(ours.token_ids) == theirs
    ended = theirs[-1] in RENDERER.stop_ids
    assert ours.finish_reason == ("stop" if ended else "length")


def test_score_is_the_models_own(engine: TorchEngine, model: Any) -> None:
    prompt = [0, 9, 30, 77]
    for changes in ({}, {"do_sample": True, "temperature": 0.3, "seed": 1, "top_k": 9}):
        done = run(engine, prompt, max_new_tokens=12, repetition_penalty=1.5, **changes)
        ids = torch.tensor([[*prompt, *done.token_ids]])
        with torch.no_grad():
            logprobs = model(ids).logits[0].log_softmax(-1)
        rows = range(len(prompt) - 1, ids.shape[1] - 1)
        wanted = sum(float(logprobs[r, ids[0, r + 1]]) for r in rows)
        assert done.score == pytest.approx(wanted, abs=1e-3)


def test_same_seed_same_text(engine: TorchEngine) -> None:
    texts = {
        run(engine, [0, 8, 9], do_sample=True, seed=s, max_new_tokens=20).token_ids
        for s in (1, 1, 1, 2, 3)
    }
    assert len(texts) == 3


def test_without_a_seed_draws_differ(engine: TorchEngine) -> None:
    drawn = [run(engine, [0, 8], do_sample=True, max_new_tokens=20).token_ids for _ in range(3)]
    assert len(set(drawn)) > 1


# -- how answers end, and what is shown ----


def test_the_end_token_is_counted_and_not_shown(renderer: Renderer) -> None:
    done = run(saying(renderer, "你好😀。"), [5], renderer)
    assert (done.text, done.finish_reason) == ("你好😀。", "stop")
    assert done.token_ids[-1] == renderer.end_id
    assert done.completion_tokens == len(done.token_ids)
    assert 0 <= done.first_token_seconds <= done.total_seconds


def test_any_other_end_token_ends_too() -> None:
    engine = ScriptedEngine(VOCAB, [[*RENDERER.encoder.text("a"), ENDS[3], 5]])
    assert run(engine, [5]).text == "a"


@settings(max_examples=100, deadline=None)
@given(
    answer=st.text("ab好😀 ", max_size=20),
    stops=st.lists(st.text("ab好😀 ", min_size=1, max_size=3), max_size=3),
)
def test_no_part_of_a_stop_string_is_shown(answer: str, stops: list[str]) -> None:
    said = answer.removeprefix(" ")
    renderer = make_renderer_once()
    done = run(saying(renderer, answer), [5], renderer, stop=stops)
    ends = [(said.find(s) + len(s), said.find(s)) for s in stops if s in said]
    assert done.text == (said[: min(ends)[1]] if ends else said)
    assert done.finish_reason == ("stop_string" if ends else "stop")


def make_renderer_once(made: list[Renderer] = []) -> Renderer:  # noqa: B006  kept on purpose
    if not made:
        made.append(make_renderer(byte_level(), "chatml"))
    return made[0]


def test_nothing_is_computed_after_a_stop_string(renderer: Renderer) -> None:
    engine = saying(renderer, "one STOP two")
    done = run(engine, [5], renderer, stop=["STOP"])
    assert done.text == "one "
    assert len(engine.stepped) == len(done.token_ids) - 1


def test_length_shows_what_was_held_back(renderer: Renderer) -> None:
    done = run(saying(renderer, "abcdef"), [5], renderer, max_new_tokens=3, stop=["cde"])
    assert (done.text, done.finish_reason) == ("abc", "length")


def test_length_in_the_middle_of_a_character(renderer: Renderer) -> None:
    done = run(saying(renderer, "好🚀"), [5], renderer, max_new_tokens=3)
    assert done.finish_reason == "length"
    assert done.text == "好"


def test_context_full(model: Any) -> None:
    engine = TorchEngine(model, 16)
    done = run(engine, list(range(5, 15)), min_new_tokens=20, max_new_tokens=50)
    assert (done.finish_reason, done.completion_tokens) == ("context", 6)
    assert len(engine._held) <= 16


def test_prompt_longer_than_the_context(model: Any) -> None:
    with pytest.raises(UserError, match=r"16 tokens.*context only 16") as caught:
        decode(TorchEngine(model, 16), list(range(16)), Settings(), RENDERER)
    assert "Shorten" in caught.value.fix


@pytest.mark.parametrize("after", [0, 1, 4])
def test_cancel_ends_within_a_token(renderer: Renderer, after: int) -> None:
    engine = saying(renderer, "abcdefgh")
    seen: list[str] = []
    events = decode(engine, [5], Settings(stop=("dx",)), renderer, lambda: len(seen) >= after)
    for event in events:
        if isinstance(event, Piece):
            if event.token_id is not None:
                seen.append(event.text)
        else:
            last = event
    assert last.finish_reason == "cancelled"
    assert last.completion_tokens == after
    assert last.text == "abcd"[:after]
    assert len(engine.stepped) == max(0, after - 1)


def test_closing_the_iterator_ends_the_computation(renderer: Renderer) -> None:
    engine = saying(renderer, "abcdefgh")
    events = decode(engine, [5], Settings(), renderer)
    first = [next(events), next(events)]
    events.close()  # type: ignore[attr-defined]
    assert [e.text for e in first] == ["a", "b"]
    assert len(engine.stepped) == 1


def test_out_of_memory_keeps_what_was_said(renderer: Renderer) -> None:
    def hook(said: int) -> None:
        if said == 3:
            raise OutOfMemory

    done = run(saying(renderer, "abcdefgh", hook=hook), [5], renderer)
    assert (done.text, done.finish_reason) == ("abc", "memory")


def test_one_shot_json(renderer: Renderer) -> None:
    done = run(saying(renderer, "ab"), [5, 6], renderer)
    made = one_shot_json([done])
    assert made["outputs"] == [
        {
            "text": "ab",
            "token_ids": list(done.token_ids),
            "score": done.score,
            "finish_reason": "stop",
        }
    ]
    assert made["usage"] == {"prompt_tokens": 2, "completion_tokens": done.completion_tokens}
    assert set(made["timings"]) == {"first_token_seconds", "total_seconds", "tokens_per_second"}
