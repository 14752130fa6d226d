"""The Python interface: `vicuna.load`, `stream`, `generate`, and what they refuse."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from generate_kit import byte_level, tiny_llama, vocabulary

import vicuna
from kit import save_tokenizer, with_adapter
from vicuna.data.conversation import Turn
from vicuna.data.templates.registry import find_template
from vicuna.errors import SettingsError, UserError
from vicuna.model import fused_lora

needs_llamacpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="needs the extra cpp (xllamacpp)"
)
ENGINES = ["torch", pytest.param("llama.cpp", marks=needs_llamacpp)]
QUESTION = [{"role": "user", "content": "你好，今天天气？"}]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base, as a folder and as GGUF, and an adapter for it."""
    from vicuna.export.gguf_writer import write_base
    from vicuna.model.adapter import save

    folder = tmp_path_factory.mktemp("api")
    torch.set_num_threads(1)
    tokenizer = save_tokenizer(folder / "base", eos_token="<|im_end|>")
    model = tiny_llama(len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder / "base")
    write_base(folder / "base", folder / "base.gguf", "f32")
    (folder / "adapter").mkdir()
    save(with_adapter(model, alpha=32), folder / "adapter", {})
    return folder


def load(place: Path, **options: Any) -> vicuna.Model:
    """The tiny base, without notes becoming warnings of pytest."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = {"model": str(place / "base"), "template": "chatml", "threads": 1, **options}
        return vicuna.load(**given)


@pytest.fixture(scope="module")
def model(place: Path) -> Iterator[vicuna.Model]:
    with load(place) as opened:
        yield opened


def test_importing_vicuna_imports_nothing_heavy() -> None:
    program = (
        "import sys, vicuna; assert 'load' in vicuna.__all__; "
        "print(*{'torch', 'transformers', 'peft', 'pydantic'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == [], done.stderr
    assert done.returncode == 0


def test_every_name_of_the_interface_is_there() -> None:
    assert {name: hasattr(vicuna, name) for name in vicuna.__all__} == dict.fromkeys(
        vicuna.__all__, True
    )
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        vicuna.laod  # noqa: B018


# -- asking ----


def test_a_question_a_message_and_a_turn_are_one(model: vicuna.Model) -> None:
    text = QUESTION[0]["content"]
    forms: list[Any] = [text, QUESTION, [Turn("user", text)]]
    answers = [model.generate(form, max_new_tokens=6) for form in forms]
    assert len({a.token_ids for a in answers}) == 1
    assert answers[0].completion_tokens == 6


def test_an_answer_is_transformers_own(model: vicuna.Model, place: Path) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(place / "base")
    prompt = model.fit(QUESTION).prompt_ids
    for beams in (1, 4):
        found = model.generate(QUESTION, max_new_tokens=12, num_beams=beams)
        with torch.no_grad():
            wanted = reference.generate(
                torch.tensor([prompt]), max_new_tokens=12, num_beams=beams, do_sample=False,
                attention_mask=torch.ones(1, len(prompt)),
            )  # fmt: skip
        assert list(found.token_ids) == wanted[0, len(prompt) :].tolist()


@pytest.mark.parametrize("settings", [{}, {"num_beams": 4}, {"do_sample": True, "seed": 3}])
def test_the_steps_together_are_the_answer(model: vicuna.Model, settings: Any) -> None:
    *steps, last = model.stream(QUESTION, max_new_tokens=10, **settings)
    assert isinstance(last, vicuna.Finished)
    assert all(isinstance(step, vicuna.Step) for step in steps)
    assert "".join(step.text for step in steps) == last.text  # type: ignore[union-attr]
    assert last.text == model.generate(QUESTION, max_new_tokens=10, **settings).text


def test_system_and_earlier_turns_count(model: vicuna.Model) -> None:
    talk = [
        {"role": "system", "content": "短"},
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "好"},
        *QUESTION,
    ]
    ids = model.fit(talk).prompt_ids
    assert len(ids) > len(model.fit(QUESTION).prompt_ids)
    assert model.generate(talk, max_new_tokens=2).prompt_tokens == len(ids)


def test_one_stop_string_is_a_list_of_one(model: vicuna.Model) -> None:
    whole = model.generate(QUESTION, max_new_tokens=12).text
    stop = whole[len(whole) // 2]
    for given in (stop, [stop]):
        found = model.generate(QUESTION, max_new_tokens=12, stop=given)
        assert found.text == whole[: whole.index(stop)]
        assert found.finish_reason == "stop_string"


# -- mistakes ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beam": 4}, "did you mean num_beams"),
        ({"num_beams": 17}, "at most 16"),
        ({"top_k": 5}, "has no effect without sampling"),
        ({"max_new_tokens": "many"}, "a whole number"),
        ({"stop": 5.0}, "stop is 5.0, but must be a list"),
        ({"num_beams": 4, "num_return_sequences": 5}, "above num_beams"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_asked_for(
    model: vicuna.Model, settings: Any, message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        model.stream(QUESTION, **settings)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "system", "content": "s"}],
        [*QUESTION, *QUESTION],
        [*QUESTION, {"role": "assistant", "content": "a"}],
        [{"role": "assistant", "content": "a"}, *QUESTION],
        QUESTION[0],
        [{"role": "robot", "content": "a"}],
        [{"role": "user", "content": ["a"]}],
        ["hello"],
    ],
)
def test_what_is_no_conversation_is_refused(model: vicuna.Model, messages: Any) -> None:
    with pytest.raises(UserError, match="messages: "):
        model.stream(messages)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "lama.cpp"}, "engine is lama.cpp"),
        ({"precision": "fp8"}, "precision is fp8"),
        ({"model": "nowhere"}, "no such model"),
        ({"adapter": "nowhere"}, "no such adapter"),
        ({"context_length": -1}, "at least 0"),
        ({"cache_type": "q2"}, "cache_type is q2"),
        ({"device_map": "tpu"}, "no list of devices"),
        ({"engine": "llama.cpp", "device_map": "cpu"}, "device_map has no effect"),
        ({"engine": "vllm", "cache_type": "f16"}, "cache_type has no effect"),
    ],
)
def test_what_cannot_be_loaded_is_named(place: Path, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(place, **options)


# -- what does not fit ----


def conversation(turns: int) -> list[Turn]:
    talk = [Turn("assistant" if i % 2 else "user", f"{i}: 床前明月光") for i in range(turns)]
    return [Turn("system", "短"), *talk, Turn("user", "你好")]


def test_the_oldest_turns_go_with_a_warning(place: Path) -> None:
    model = load(place, context_length=120)
    talk = conversation(20)
    fitted = model.fit(talk, 8)
    assert 0 < len(fitted.dropped) < 20
    assert len(fitted.dropped) % 2 == 0
    assert fitted.turns == [talk[0], *talk[1 + len(fitted.dropped) :]]
    with pytest.warns(UserWarning, match=f"the {len(fitted.dropped)} oldest turns") as caught:
        answer = model.generate(talk, max_new_tokens=8)
    assert caught[0].filename == __file__
    assert answer.prompt_tokens == len(fitted.prompt_ids)
    assert answer.prompt_tokens + 8 <= model.context_length == 120


def test_a_question_alone_that_does_not_fit_is_refused(place: Path) -> None:
    with pytest.raises(UserError, match="the prompt has"):
        load(place, context_length=20).stream("床前明月光" * 20)


# -- ending ----


def test_cancel_keeps_what_was_said(model: vicuna.Model) -> None:
    whole = model.generate(QUESTION, max_new_tokens=20)
    seen: list[vicuna.Step] = []
    for event in model.stream(QUESTION, max_new_tokens=20, cancel=lambda: len(seen) >= 5):
        if isinstance(event, vicuna.Step):
            seen.append(event)
        else:
            last = event
    assert last.finish_reason == "cancelled"
    assert last.token_ids == whole.token_ids[:5]
    assert "".join(s.text for s in seen) == last.text


def test_a_request_that_begins_ends_the_one_before(model: vicuna.Model) -> None:
    alone = model.generate("春天", max_new_tokens=8)
    first = model.stream(QUESTION, max_new_tokens=20)
    waiting = model.stream("晚上", max_new_tokens=20)  # not begun: it ends nothing
    next(first)
    next(first)
    assert model.generate("春天", max_new_tokens=8).token_ids == alone.token_ids
    *_, last = first
    assert isinstance(last, vicuna.Finished)
    assert last.finish_reason == "cancelled"
    assert len(last.token_ids) == 2
    *_, other = waiting
    assert isinstance(other, vicuna.Finished)
    assert other.finish_reason != "cancelled"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_closed_model_says_so(place: Path, engine: str) -> None:
    model = load(place, engine=engine)
    events = model.stream(QUESTION, max_new_tokens=9)
    next(events)
    model.close()
    model.close()
    *_, last = events  # nothing more is computed with what was freed
    assert isinstance(last, vicuna.Finished)
    assert last.finish_reason == "cancelled"
    with pytest.raises(UserError, match="was closed"):
        model.stream(QUESTION)


# -- adapters and engines ----


@pytest.mark.parametrize("engine", ENGINES)
def test_the_adapter_is_switched_between_requests(place: Path, engine: str) -> None:
    def ask(model: vicuna.Model) -> tuple[int, ...]:
        return model.generate(QUESTION, max_new_tokens=8).token_ids

    options = {"engine": engine, "precision": "fp32"}
    with load(place, **options) as plain:
        base = ask(plain)
        with pytest.raises(UserError, match="no adapter to switch"):
            plain.set_adapter(False)
    with load(place, adapter=str(place / "adapter"), **options) as model:
        adapted = ask(model)
        assert adapted != base
        model.set_adapter(False)
        assert ask(model) == base
        model.set_adapter(True)
        assert ask(model) == adapted
        model.set_adapter(True, 0.0)
        assert ask(model) == base
        events = model.stream(QUESTION, max_new_tokens=8)
        next(events)
        model.set_adapter(True)
        *_, last = events  # no answer is half with and half without
        assert isinstance(last, vicuna.Finished)
        assert last.finish_reason == "cancelled"
        assert ask(model) == adapted
        with pytest.raises(UserError, match="a strength is a number"):
            model.set_adapter(True, float("nan"))


@pytest.mark.parametrize("engine", ENGINES)
def test_adapters_are_loaded_later_mixed_and_dropped(
    place: Path, tmp_path: Path, engine: str
) -> None:
    from vicuna.model.adapter import read_adapter, save
    from vicuna.model.lora_delta import save_weighted_sum

    base = tiny_llama(340, eos_token_id=3)  # the seed of `place`, other adapters
    chatml = {"template": find_template("chatml", vocabulary(byte_level())).to_dict()}
    (tmp_path / "other").mkdir()
    save(with_adapter(base, 7, alpha=48, target=("v_proj",)), tmp_path / "other", chatml)
    parts = {
        n: read_adapter(str(p))
        for n, p in (("one", place / "adapter"), ("two", tmp_path / "other"))
    }
    save_weighted_sum({"one": (parts["one"], 0.5), "two": (parts["two"], 0.8)}, tmp_path / "mix")

    def ask(model: vicuna.Model) -> str:
        return model.generate(QUESTION, max_new_tokens=8).text

    with load(place, engine=engine, precision="fp32", template="") as model:
        alone, prompt = ask(model), model.fit(QUESTION).prompt_ids
        model.load_adapter("one", str(place / "adapter"))
        model.load_adapter("two", str(tmp_path / "other"))
        model.load_adapter("mix", str(tmp_path / "mix"))
        assert ask(model) == alone
        model.set_adapter("one")
        assert ask(model) != alone
        assert model.fit(QUESTION).prompt_ids == prompt
        model.set_adapter({"one": 0.5, "two": 0.8})
        assert model.fit(QUESTION).prompt_ids != prompt  # the heaviest one's template
        both = ask(model)
        model.set_adapter("mix")
        assert ask(model) == both
        model.set_adapter({"one": 0.5, "two": 0.8})
        model.drop_adapter("one")
        model.set_adapter({"two": 0.8})
        assert ask(model) != both
        with pytest.raises(UserError, match="no adapter 'one' is loaded"):
            model.set_adapter({"one": 1.0})
        model.load_adapter("two", str(tmp_path / "mix"))  # replaced where it answers
        model.set_adapter("two")
        assert ask(model) == both
        model.set_adapter({})
        assert ask(model) == alone
        with pytest.raises(UserError, match="no such adapter"):
            model.load_adapter("three", str(tmp_path / "nowhere"))
        assert ask(model) == alone


@needs_llamacpp
@pytest.mark.parametrize("base", ["base", "base.gguf"])
def test_llamacpp_gives_torchs_answers(place: Path, base: str) -> None:
    choice = {"engine": "llama.cpp", "model": str(place / base)}
    model = load(place, precision="fp32")  # auto is bf16 where a CPU has it: further off than F16
    with load(place, num_beams=4, max_new_tokens=12, **choice) as other:
        for beams in (1, 4):
            wanted = model.generate(QUESTION, max_new_tokens=12, num_beams=beams)
            found = other.generate(QUESTION, max_new_tokens=12, num_beams=beams)
            assert found.token_ids == wanted.token_ids
            assert found.score == pytest.approx(wanted.score, abs=0.02)
        taken = "base.gguf as it is" if base.endswith("gguf") else "base in F16"
        assert taken in other.notes[-1]


@needs_llamacpp
def test_many_answers_have_room_beside_a_full_context(place: Path) -> None:
    options: dict[str, Any] = {"engine": "llama.cpp", "context_length": 256}
    question = "床前明月光，疑是地上霜。" * 3
    many = {"max_new_tokens": 100, "num_return_sequences": 8}
    asked = {"do_sample": True, "temperature": 5.0, "seed": 1, "min_new_tokens": 100, **many}
    with load(place, **many, **options) as model:
        assert model.generate(question, **asked).finish_reason == "length"
    with load(place, **options) as model:  # and without it there is what there is
        assert model.generate(question, **asked).finish_reason == "memory"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_cache_of_16_bits_gives_the_same_answer(place: Path, engine: str) -> None:
    gguf = {"model": str(place / "base.gguf")} if engine == "llama.cpp" else {}
    said = []
    for cache_type in ("f32", "f16"):
        with load(place, engine=engine, cache_type=cache_type, device_map="auto", **gguf) as model:
            said.append(model.generate(QUESTION, max_new_tokens=6, num_beams=2).token_ids)
    assert said[0] == said[1]


def test_an_engine_with_its_own_forward_leaves_the_models_alone(place: Path) -> None:
    model = load(place, adapter=str(place / "adapter"))
    layers = [m for m in model._loaded.engine.model.modules() if hasattr(m, "lora_A")]
    assert layers
    assert not any("forward" in vars(layer) for layer in layers)
    assert fused_lora.install(model._loaded.engine.model)[0] == len(
        layers
    )  # it could have been installed


def test_what_is_odd_about_an_adapter_is_warned_of(place: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(str(place / "adapter" / "adapter_model.safetensors"))
    torch.save(weights, tmp_path / "adapter_model.bin")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = vicuna.load(str(place / "base"), str(tmp_path), template="chatml")
    assert {w.filename for w in caught} == {__file__}
    assert [str(w.message) for w in caught] == model.notes
    assert any("no adapter_config.json" in note for note in model.notes)
