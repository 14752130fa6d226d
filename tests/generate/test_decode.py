"""Decoding over PyTorch equals transformers' `generate`, streams, and ends as it should."""

from __future__ import annotations

import random
from itertools import takewhile
from typing import Any

import pytest
import torch
from generate_kit import (
    PathEngine,
    ScriptedEngine,
    byte_level,
    make_renderer,
    plain_engine,
    random_engine,
    saying,
    tiny_llama,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from vicuna.data.templates.renderer import Renderer
from vicuna.errors import UserError
from vicuna.generate.decode import Event, Finished, Settings, Step, decode
from vicuna.generate.engines.base import OutOfMemory
from vicuna.generate.events import one_shot_json

ENDS = range(200, 230)  # so many end tokens that random models end now and then
RENDERER = make_renderer(byte_level(), "chatml", ends=ENDS)
VOCAB = RENDERER.tokenizer.vocab_size
MODELS = [tiny_llama(VOCAB, seed) for seed in range(3)]
MODELS[1] = tiny_llama(VOCAB, 1, num_key_value_heads=4, tie_word_embeddings=True)


def run(engine: Any, prompt: list[int], renderer: Renderer = RENDERER, **s: Any) -> Finished:
    *steps, last = decode(engine, prompt, Settings(**s), renderer)
    assert isinstance(last, Finished)
    assert all(isinstance(step, Step) for step in steps)
    assert "".join(step.text for step in steps) == last.text
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
        "no_repeat_ngram_size": rng.choice([0, 0, 1, 2, 3]),
    }
    theirs = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        eos_token_id=sorted(RENDERER.stop_ids),
        pad_token_id=0,
        **chosen,
    )[0, len(prompt) :].tolist()
    ours = run(plain_engine(model, context_length=256), prompt, **chosen)
    assert list(ours.token_ids) == theirs
    ended = theirs[-1] in RENDERER.stop_ids
    assert ours.finish_reason == ("stop" if ended else "length")


def test_score_is_the_models_own(model: Any) -> None:
    engine = plain_engine(model)
    prompt = [0, 9, 30, 77]
    for changes in ({}, {"do_sample": True, "temperature": 0.3, "seed": 1, "top_k": 9}):
        done = run(engine, prompt, max_new_tokens=12, repetition_penalty=1.5, **changes)
        ids = torch.tensor([[*prompt, *done.token_ids]])
        with torch.no_grad():
            logprobs = model(ids).logits[0].log_softmax(-1)
        rows = range(len(prompt) - 1, ids.shape[1] - 1)
        wanted = sum(float(logprobs[r, ids[0, r + 1]]) for r in rows)
        assert done.score == pytest.approx(wanted, abs=1e-3)


def test_same_seed_same_text(model: Any) -> None:
    engine = plain_engine(model)
    texts = {
        run(engine, [0, 8, 9], do_sample=True, seed=s, max_new_tokens=20).token_ids
        for s in (1, 1, 1, 2, 3)
    }
    assert len(texts) == 3


def test_without_a_seed_draws_differ(model: Any) -> None:
    engine = plain_engine(model)
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
    engine = ScriptedEngine(VOCAB, [[*RENDERER.tokenizer.text("a"), ENDS[3], 5]])
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
    for chosen in ({}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}):
        engine = plain_engine(model, context_length=16)  # which asserts that it is not exceeded
        done = run(engine, list(range(5, 15)), min_new_tokens=20, max_new_tokens=50, **chosen)
        assert {a.finish_reason for a in done.answers} == {"context"}
        assert {len(a.token_ids) for a in done.answers} == {6}


def test_prompt_longer_than_the_context(model: Any) -> None:
    with pytest.raises(UserError, match=r"16 tokens.*context only 16") as caught:
        decode(plain_engine(model, context_length=16), list(range(16)), Settings(), RENDERER)
    assert "Shorten" in caught.value.fix


@pytest.mark.parametrize("after", [0, 1, 4])
def test_cancel_ends_within_a_token(renderer: Renderer, after: int) -> None:
    engine = saying(renderer, "abcdefgh")
    seen: list[str] = []
    events = decode(engine, [5], Settings(stop=("dx",)), renderer, lambda: len(seen) >= after)
    for event in events:
        if isinstance(event, Finished):
            last = event
        elif event.beams:  # the step behind the last one brings what was held back
            seen.append(event.text)
    assert last.finish_reason == "cancelled"
    assert last.completion_tokens == after
    assert last.text == "abcd"[:after]
    assert len(engine.stepped) == max(0, after - 1)


def test_closing_the_iterator_ends_the_computation(renderer: Renderer) -> None:
    engine = saying(renderer, "abcdefgh")
    events = decode(engine, [5], Settings(), renderer)
    first = [next(events), next(events)]
    events.close()  # type: ignore[attr-defined]
    assert [e.text for e in first if isinstance(e, Step)] == ["a", "b"]
    assert len(engine.stepped) == 1


def test_out_of_memory_keeps_what_was_said(renderer: Renderer) -> None:
    def hook(said: int) -> None:
        if said == 3:
            raise OutOfMemory

    done = run(saying(renderer, "abcdefgh", hook=hook), [5], renderer)
    assert (done.text, done.finish_reason) == ("abc", "memory")


def test_one_shot_json(renderer: Renderer) -> None:
    done = run(saying(renderer, "ab"), [5, 6], renderer)
    made = one_shot_json(done)
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


# -- several branches ----


def events_of(engine: Any, renderer: Renderer = RENDERER, **s: Any) -> list[Event]:
    return list(decode(engine, [5], Settings(**s), renderer))


STRATEGIES: list[dict[str, Any]] = [
    {},
    {"num_beams": 2},
    {"num_beams": 5, "early_stopping": True, "num_return_sequences": 4},
    {"num_beams": 4, "length_penalty": 0.0, "early_stopping": "never"},
    {"num_beams": 3, "length_penalty": 3.0, "num_return_sequences": 2},
    {"do_sample": True, "seed": 1},
    {"do_sample": True, "seed": 1, "num_return_sequences": 5},
    {"do_sample": True, "seed": 1, "num_beams": 4, "temperature": 0.7, "top_p": 0.9},
]
# Tokens whose texts begin alike, so that branches agree on more than their tokens.
WORDS = ["a", "ab", "abc", "b", "bc", "c", "好", "好a", " ", " a", "ba", "😀"]


class Spelled:
    """A renderer of a vocabulary of WORDS and one end token; every word may begin an answer."""

    def __init__(self) -> None:
        tokenizer = byte_level()
        tokenizer.add_tokens([w for w in WORDS if tokenizer.token_to_id(w) is None])
        self.tokenizer = make_renderer(tokenizer, "chatml").tokenizer
        self.ids = [tokenizer.token_to_id(w.replace(" ", "Ġ")) for w in WORDS]
        self.ids = [
            i if i is not None else tokenizer.token_to_id(w) for i, w in zip(self.ids, WORDS)
        ]
        halves = self.tokenizer.text("好")[:1]  # the first byte of a character
        self.ids += halves
        self.stop_ids = frozenset({1})


SPELLED = Spelled()


def words_engine(seed: int, **options: Any) -> PathEngine:
    """Random scores of the words and of the end token; nothing else is ever said."""
    few = random_engine(len(SPELLED.ids) + 1, seed, spread=1.0, **options)
    score = few.score

    def spread(rows: list[list[int]]) -> Any:
        scores = torch.full((len(rows), SPELLED.tokenizer.vocab_size), -1e4)
        scores[:, [*SPELLED.ids, 1]] = score(rows)
        return scores

    few.score = spread
    return few


def common(texts: list[str]) -> str:
    """What all texts begin with."""
    columns = zip(*texts)
    return "".join(c[0] for c in takewhile(lambda c: len(set(c)) == 1, columns))


@pytest.mark.parametrize("chosen", STRATEGIES, ids=str)
@pytest.mark.parametrize("stop", [(), ("ca", "b好")])
def test_agreed_text_is_final(chosen: dict[str, Any], stop: tuple[str, ...]) -> None:
    """At every step the text so far is exactly what all contenders have in common, and the best
    answer begins with it, also where the computation is broken off there."""
    for seed in range(12):
        whole = {**chosen, "max_new_tokens": 14, "stop": stop}
        events = events_of(words_engine(seed), SPELLED, **whole)  # type: ignore[arg-type]
        last = events.pop()
        assert isinstance(last, Finished)
        agreed = ""
        for event in events:
            assert isinstance(event, Step)
            agreed += event.text
            if event.beams:
                contenders = [*event.beams, *event.finished[:1]]
                assert agreed == common([beam.text for beam in contenders])
                assert all(beam.text == agreed + beam.open for beam in event.beams)
                scores = [beam.score for beam in event.finished]
                assert scores == sorted(scores, reverse=True)
            assert last.text.startswith(agreed)
            assert not any(s in beam.text for beam in event.beams for s in stop)
        assert agreed == last.text


@pytest.mark.parametrize("chosen", STRATEGIES, ids=str)
@pytest.mark.parametrize("how", ["cancelled", "memory"])
@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_broken_off_anywhere(chosen: dict[str, Any], how: str, after: int) -> None:
    def hook(said: int) -> None:
        if how == "memory" and said == after:
            raise OutOfMemory

    engine = words_engine(3, hook=hook)
    steps: list[Step] = []
    choice = Settings(max_new_tokens=14, min_new_tokens=8, **chosen)
    events = decode(
        engine, [5], choice, SPELLED,  # type: ignore[arg-type]
        lambda: how == "cancelled" and len(steps) >= after,
    )  # fmt: skip
    for event in events:
        if isinstance(event, Finished):
            last = event
        elif event.beams:
            steps.append(event)
    assert len(steps) == after
    assert last.finish_reason == how
    assert len(engine.stepped) == max(0, after - (how == "cancelled"))
    if steps:
        known = [*steps[-1].beams, *steps[-1].finished]
        assert last.score == max(beam.score for beam in known)
        assert len(last.answers) == min(choice.num_return_sequences, len(known))
        assert last.text == max(known, key=lambda beam: beam.score).text
    else:
        assert (last.text, last.token_ids, last.score) == ("", (), 0.0)


def test_broken_off_behind_finished_answers() -> None:
    """The best of what is finished and what is open counts, and it is said what happened."""
    seen = set()
    for seed in range(30):
        steps: list[Step] = []
        events = decode(
            words_engine(seed), [5], Settings(num_beams=3, num_return_sequences=3), SPELLED,  # type: ignore[arg-type]
            lambda: bool(steps and steps[-1].finished),  # noqa: B023
        )  # fmt: skip
        for event in events:
            if isinstance(event, Finished):
                last = event
            elif event.beams:
                steps.append(event)
        if last.finish_reason == "cancelled":
            known = [*steps[-1].beams, *steps[-1].finished]
            best = max(known, key=lambda beam: beam.score)
            assert (last.text, last.score) == (best.text, best.score)
            seen.add(last.answers[0].finish_reason)
    assert seen == {"stop", "cancelled"}


def test_a_caller_that_wants_the_text_needs_three_lines(renderer: Renderer) -> None:
    said = ""
    for event in decode(saying(renderer, "你好😀。"), [5], Settings(num_beams=3), renderer):
        if isinstance(event, Step):
            said += event.text
    assert said == "你好😀。"


def test_independent_answers_share_the_prompt() -> None:
    engine = words_engine(0)
    done = events_of(engine, SPELLED, do_sample=True, num_return_sequences=6, seed=2)[-1]  # type: ignore[arg-type]
    assert isinstance(done, Finished)
    assert len(engine.prompts) == 1
    assert len(done.answers) == 6
    assert done.completion_tokens == sum(len(a.token_ids) for a in done.answers)
    # Rows that ended are not computed any further.
    lengths = sorted(len(a.token_ids) for a in done.answers)
    assert [len(s) for s in engine.stepped] == [
        sum(length > i + 1 for length in lengths) for i in range(len(engine.stepped))
    ]


def test_an_engine_with_few_rows() -> None:
    engine = random_engine(VOCAB, max_rows=2)
    run(engine, [5], num_beams=2, max_new_tokens=3)
    for chosen in ({"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}):
        with pytest.raises(UserError, match="at most 2"):
            decode(engine, [5], Settings(**chosen), RENDERER)  # type: ignore[arg-type]


def test_stop_tokens_by_id_and_by_name(renderer: Renderer) -> None:
    a, b = renderer.tokenizer.text("a")[0], renderer.tokenizer.text("b")[0]
    for token in (b, str(b), "b"):
        done = run(saying(renderer, "ab"), [5], renderer, stop_tokens=[token])
        assert (done.text, done.token_ids, done.finish_reason) == ("a", (a, b), "stop")
    with pytest.raises(UserError, match=r"2 mistakes(.|\n)*'no such'(.|\n)*99999"):
        decode(saying(renderer), [5], Settings(stop_tokens=("no such", 99999)), renderer)


@pytest.mark.parametrize("chosen", STRATEGIES, ids=str)
def test_logprobs(chosen: dict[str, Any], model: Any) -> None:
    engine = plain_engine(model)
    done = run(
        engine, [5, 9], logprobs=3, max_new_tokens=6, **{**chosen, "repetition_penalty": 1.4}
    )
    for answer in done.answers:
        assert answer.logprobs is not None
        assert tuple(t.token_id for t in answer.logprobs) == answer.token_ids
        with torch.no_grad():
            rows = model(torch.tensor([[5, 9, *answer.token_ids]])).logits[0].log_softmax(-1)
        for token, row in zip(answer.logprobs, rows[1:]):
            assert token.logprob == pytest.approx(float(row[token.token_id]), abs=1e-4)
            assert [i for i, _ in token.top] == row.topk(3).indices.tolist()
            assert [p for _, p in token.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
        printed = one_shot_json(done)["outputs"][0]["logprobs"][0]
        assert set(printed) == {"token_id", "logprob", "top"}
    assert run(engine, [5], max_new_tokens=2, **chosen).answers[0].logprobs is None
