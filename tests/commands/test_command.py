"""`vicuna generate` and `vicuna chat` from their words to what they print."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from generate_kit import PathEngine, random_engine, saying

from vicuna import config
from vicuna.commands import generate
from vicuna.data.templates.renderer import Renderer
from vicuna.errors import SettingsError
from vicuna.generate import load
from vicuna.generate.settings import Settings


def decoding(*words: str) -> Settings:
    return load.decoding(config.parse(config.AnswerSettings, words)[0])


class Ready:
    """What `ChatModel` is to the commands."""

    def __init__(self, renderer: Renderer) -> None:
        self.engine: Any = None
        self.renderer, self.notes, self.about = renderer, [], ""

    def set_adapter(self, *_: Any) -> None:
        raise AssertionError("no command of these tests switches")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, renderer: Renderer) -> Any:
    """What the commands load: an engine of the test's choice, the template, no notes."""
    made = Ready(renderer)
    monkeypatch.setattr(load, "open_model", lambda _: made)
    return made


def test_the_defaults_of_the_command_are_never_refused() -> None:
    assert decoding().strategy == "greedy"
    sampled = decoding("--do_sample")
    assert (sampled.strategy, sampled.temperature, sampled.top_p) == ("sample", 0.7, 0.9)
    assert decoding("--do_sample", "--temperature", "0").strategy == "greedy"
    assert decoding("--temperature", "0").strategy == "greedy"
    assert decoding("--num_beams", "4", "--seed", "1").strategy == "beam"
    assert decoding("--num_beams", "4", "--do_sample").strategy == "beam-sample"


def test_every_setting_arrives() -> None:
    words = (
        "--max_new_tokens 9 --min_new_tokens 2 --do_sample --temperature 0.5 --top_k 7 --top_p 0.8 "
        "--min_p 0.1 --typical_p 0.7 --seed 3 --num_beams 4 --num_return_sequences 2 "
        "--length_penalty 0.3 --early_stopping never --repetition_penalty 1.2 "
        "--frequency_penalty 0.1 --presence_penalty 0.2 --no_repeat_ngram_size 3 "
        "--banned_words x yz --logit_bias 5=-1 a==-inf --stop User: --stop_tokens 7 </s> "
        "--logprobs 2"
    )
    found = decoding(*words.split())
    assert found == Settings(
        max_new_tokens=9, min_new_tokens=2, do_sample=True, temperature=0.5, top_k=7, top_p=0.8,
        min_p=0.1, typical_p=0.7, seed=3, num_beams=4, num_return_sequences=2, length_penalty=0.3,
        early_stopping="never", repetition_penalty=1.2, frequency_penalty=0.1,
        presence_penalty=0.2, no_repeat_ngram_size=3, banned_words=("x", "yz"),
        logit_bias={"5": -1, "a=": -math.inf}, stop=("User:",), stop_tokens=("7", "</s>"),
        logprobs=2,
    )  # fmt: skip
    assert found.model_fields_set == set(Settings.model_fields)


@pytest.mark.parametrize(("word", "value"), [("true", True), ("False", False), ("never", "never")])
def test_early_stopping(word: str, value: Any) -> None:
    assert decoding("--num_beams", "2", "--early_stopping", word).early_stopping == value
    with pytest.raises(SettingsError, match="'true', 'false' or 'never'"):
        decoding("--num_beams", "2", "--early_stopping", "sometimes")


def test_mistakes_come_together(loaded: Any) -> None:
    with pytest.raises(SettingsError, match="4 mistakes") as caught:
        generate.generate(["--top_k", "5", "--length_penalty", "2", "--logprobs", "3"])
    for words in ("what to answer", "top_k 5 has no effect", "length_penalty 2", "logprobs are"):
        assert words in str(caught.value)
    with pytest.raises(SettingsError, match="2 mistakes"):
        generate.chat(["--num_return_sequences", "2", "--logprobs", "1", "--num_beams", "2"])
    with pytest.raises(SettingsError, match="show_beams"):
        generate.generate(["--show_beams", "--json", "hello"])


@pytest.mark.parametrize(
    "words", [[""], [" \n\t"], ["\u3000"], ["", ""], ["", "--input_text", "x"]]
)
def test_an_empty_instruction_is_refused(loaded: Any, words: list[str]) -> None:
    with pytest.raises(SettingsError, match="the instruction is empty"):
        generate.generate(words)


def test_text(loaded: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for beams in ("1", "3"):
        loaded.engine = saying(loaded.renderer, "你好！")
        assert generate.generate(["--num_beams", beams, "问"]) == 0
        assert capsys.readouterr().out == "你好！\n"


def test_several_answers(loaded: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--num_beams", "3", "--num_return_sequences", "3", "--max_new_tokens", "8", "q"]
    loaded.engine = tellings(loaded.renderer)
    generate.generate(["--json", *words])
    printed = json.loads(capsys.readouterr().out)
    scores = [output["score"] for output in printed["outputs"]]
    assert scores == sorted(scores, reverse=True)
    assert len({tuple(o["token_ids"]) for o in printed["outputs"]}) == 3
    tokens = sum(len(o["token_ids"]) for o in printed["outputs"])
    assert printed["usage"]["completion_tokens"] == tokens
    generate.generate(words)
    first, second, third = [o["text"] for o in printed["outputs"]]
    wanted = f"{first}\n--- 2: {scores[1]:.3f}\n{second}\n--- 3: {scores[2]:.3f}\n{third}\n"
    assert capsys.readouterr().out == wanted


def tellings(renderer: Renderer) -> PathEngine:
    """Random words of letters only."""
    engine = random_engine(renderer.tokenizer.vocab_size, seed=2)
    letters = {i for c in "abcdefghij" for i in renderer.tokenizer.text(c)}
    others = [i for i in range(renderer.tokenizer.vocab_size) if i not in letters]
    score = engine.score

    engine.score = lambda rows: score(rows).index_fill(1, torch.tensor(others), -50.0)
    return engine


def test_logprobs_in_json(loaded: Any, capsys: pytest.CaptureFixture[str]) -> None:
    loaded.engine = saying(loaded.renderer, "ab")
    generate.generate(["--json", "--logprobs", "2", "q"])
    (output,) = json.loads(capsys.readouterr().out)["outputs"]
    assert [t["token_id"] for t in output["logprobs"]] == output["token_ids"]
    assert all(len(t["top"]) == 2 for t in output["logprobs"])
    assert sum(t["logprob"] for t in output["logprobs"]) == pytest.approx(output["score"])


def test_several_answers_of_a_file(loaded: Any, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"instruction": "a"}\n{"instruction": "b"}\n')
    loaded.engine = tellings(loaded.renderer)
    words = ["--input", str(tmp_path / "q.jsonl"), "--output", str(tmp_path / "a.jsonl")]
    more = ["--num_beams", "2", "--num_return_sequences", "2", "--max_new_tokens", "5"]
    for _ in range(2):  # the second time there is nothing left to answer
        assert generate.generate([*words, *more]) == 0
        lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
        assert len(lines) == 2
        for line in lines:
            assert len(line["outputs"]) == 2
            assert line["outputs"][0]["text"] == line["output"]


def test_beams_drawn_into_a_pipe_are_text(loaded: Any, capsys: pytest.CaptureFixture[str]) -> None:
    loaded.engine = saying(loaded.renderer, "你好！")
    generate.generate(["--num_beams", "2", "--show_beams", "问"])
    assert capsys.readouterr().out == "你好！\n"


def test_chat_with_beams(
    loaded: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("你好\n/undo\n再见\n"))
    loaded.engine = saying(loaded.renderer, "你好！", "再见！")
    assert generate.chat(["--num_beams", "4", "--show_beams"]) == 0
    assert capsys.readouterr().out.split("\n")[1:4] == ["你好！", "Taken back: 你好", "再见！"]
