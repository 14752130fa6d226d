"""The command line: settings that may be named without a value."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from vicuna import config
from vicuna.config import TrainSettings, parse
from vicuna.config.base import DatasetEntry, Settings
from vicuna.errors import SettingsError
from vicuna.generate.settings import Settings as Decoding


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("", "none"),
        ("--gradient_checkpointing", "full"),
        ("--gradient_checkpointing --seed 1", "full"),
        ("--gradient-checkpointing", "full"),
        ("--gradient_checkpointing tiny", "full"),
        ("--gradient_checkpointing seed=1", "full"),
        ("--gradient_checkpointing selective tiny", "selective"),
        ("--gradient_checkpointing offload", "offload"),
        ("--gradient_checkpointing true", "full"),
        ("--gradient_checkpointing false", "none"),
        ("--gradient_checkpointing none", "none"),
        ("gradient_checkpointing=true", "full"),
        ("--no_gradient_checkpointing", "none"),
        ("instruct-7b", "full"),
        ("instruct-7b --no_gradient_checkpointing", "none"),
    ],
)
def test_gradient_checkpointing_is_a_switch_and_a_choice(words: str, wanted: str) -> None:
    settings, given = parse(TrainSettings, words.split())
    assert settings.gradient_checkpointing == wanted
    assert settings.seed in (1, 42)
    assert ("gradient_checkpointing" in given) == bool(words)


def test_a_wrong_choice_is_named_with_the_right_ones() -> None:
    with pytest.raises(SettingsError, match="gradient_checkpointing is half, but must be 'none'"):
        parse(TrainSettings, ["--gradient_checkpointing", "half"])


def test_other_settings_without_a_value() -> None:
    settings, _ = parse(TrainSettings, ["--resume", "--strict", "tiny", "--no_share_prefixes"])
    assert (settings.resume, settings.strict, settings.share_prefixes) == ("last", True, False)
    with pytest.raises(SettingsError, match="seed needs a value"):
        parse(TrainSettings, ["--seed"])


@pytest.mark.parametrize(
    ("cls", "words", "near"),
    [
        (config.ExportSettings, ["--type", "q4km"], "q4_k_m"),
        (config.ExportSettings, ["--type", "Q5-K-M"], "q5_k_m"),
        (config.TrainSettings, ["--precision", "bf61"], "bf16"),
        (config.TrainSettings, ["--lr_scheduler_type", "cosin"], "cosine"),
        (config.GenerateSettings, ["--engine", "llamacpp"], "llama.cpp"),
        (config.MergeSettings, ["--method", "dare_linea"], "dare_linear"),
    ],
)
def test_the_nearest_value_is_named(cls: Any, words: list[str], near: str) -> None:
    with pytest.raises(SettingsError, match=f"; did you mean {re.escape(near)}\\?"):
        config.parse(cls, words, free=[])


def test_a_value_that_is_near_none_gets_the_list_alone() -> None:
    with pytest.raises(SettingsError) as told:
        config.parse(config.ExportSettings, ["--type", "zzzzzz"], free=[])
    assert "did you mean" not in str(told.value)
    assert "q4_k_m" in str(told.value)


@pytest.mark.parametrize(("word", "near"), [("tinny", "tiny"), ("instruct7b", "instruct-7b")])
def test_a_recipe_that_is_misspelt_is_told_the_nearest_and_all(word: str, near: str) -> None:
    with pytest.raises(SettingsError, match=rf"did you mean {near}\?") as caught:
        parse(TrainSettings, [word])
    assert all(name in str(caught.value) for name in config.builtin_recipes())


CLASSES = [
    c for c in vars(config).values()
    if isinstance(c, type) and issubclass(c, Settings) and c is not Settings
]  # fmt: skip


def _numbers(cls: type[BaseModel]) -> list[str]:
    return [
        n for n, f in cls.model_fields.items() if float in (f.annotation, *get_args(f.annotation))
    ]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "NaN", "1e999"])
@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_what_is_no_number_is_said_to_be_none(cls: type[Settings], value: str) -> None:
    for name in _numbers(cls):
        with pytest.raises(SettingsError) as told:
            parse(cls, [f"--{name}={value}"])
        assert f"{name} is '{value}', but must be a number" in told.value.mistakes


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_no_number_in_a_decoder_or_a_data_set(value: str) -> None:
    for cls, others in ((Decoding, {}), (DatasetEntry, {"path": "x"})):
        for name in _numbers(cls):
            for given in (value, float(value)):
                with pytest.raises(SettingsError, match=f"{name} is .*, but must be a number$"):
                    config.build(cls, {**others, name: given})
    assert Decoding(logit_bias={"5": float("-inf")}).logit_bias == {"5": float("-inf")}


def test_a_file_beside_a_recipe_is_the_data(tmp_path: Path) -> None:
    data = tmp_path / "my records.jsonl"
    data.write_text("")
    for argv in (["qwen3-4b", str(data)], [str(data), "qwen3-4b"]):
        settings, _ = parse(TrainSettings, argv)
        assert [entry.path for entry in settings.dataset] == [str(data)]
    with pytest.raises(SettingsError, match="neither a setting"):
        parse(TrainSettings, [str(tmp_path / "missing.jsonl")])
