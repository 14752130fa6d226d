"""What a base lacks is told before its weights are read, by every command that would meet it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from generate_kit import byte_level
from tokenizers import AddedToken

from kit import save_tokenizer, tiny_model
from vicuna.commands import doctor
from vicuna.commands.generate import generate
from vicuna.commands.plan import run as plan
from vicuna.commands.train import run as train
from vicuna.data.templates.registry import find_template
from vicuna.data.templates.renderer import Renderer
from vicuna.data.tokenizer import Tokenizer
from vicuna.errors import UserError
from vicuna.model import load
from vicuna.model.config_files import check_folder, load_config
from vicuna.model.vocabulary import load_vocabulary, tokens_without_row


def base(folder: Path, added: Sequence[AddedToken] = (), **names: str) -> Path:
    """A tiny base whose tokenizer has tokens that its embedding has no rows for."""
    size = len(save_tokenizer(folder))
    fast = save_tokenizer(folder, **names)
    fast.add_tokens(list(added))
    fast.save_pretrained(folder)
    tiny_model("llama", vocab_size=size).save_pretrained(folder)
    return folder


def changed(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "DEL"}))
    return folder


ROPES: dict[str, dict[str, Any]] = {
    "no factor": {"rope_scaling": {"type": "yarn"}},
    "no type": {"rope_scaling": {"factor": 2.0}},
    "llama3 half": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    "no long factors": {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4}},
    "a word": {"rope_scaling": "linear"},
    "no number": {"rope_scaling": {"type": "linear", "factor": "two"}},
    "zero": {"rope_scaling": {"type": "dynamic", "factor": 0}},
    "theta": {"rope_theta": "big"},
    "no theta": {"rope_theta": None},
    "theta inside": {"rope_parameters": {"rope_type": "default", "rope_theta": -1}},
    "of a layer kind": {"rope_parameters": {"full_attention": {"rope_type": "linear"}}},
}


@pytest.mark.parametrize("changes", ROPES.values(), ids=ROPES)
def test_a_rope_setting_that_is_half_there(tmp_path: Path, changes: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **changes}))
    with pytest.raises(UserError, match=r"rope_(scaling|parameters|theta)"):
        check_folder(tmp_path)


@pytest.mark.parametrize(
    "rope",
    [
        None, {}, {"type": "linear", "factor": 2}, {"rope_type": "default"},
        {"rope_theta": 1e6}, {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192},
        {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
        {"type": "of a family not born yet", "anything": 1},
    ],
)  # fmt: skip
def test_a_rope_setting_that_is_whole(tmp_path: Path, rope: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"rope_scaling": rope}))
    check_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("hidden_size", "64"), ("num_hidden_layers", 0), ("vocab_size", -1), ("head_dim", 2.5),
     ("num_attention_heads", True), ("max_position_embeddings", 1e300)],
)  # fmt: skip
def test_a_count_that_is_none(tmp_path: Path, name: str, value: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {name: value}}))
    with pytest.raises(UserError, match=f"{name} is .* a whole number from 1"):
        check_folder(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"hidden_act": "nope"}, {"num_attention_heads": 5}, {"num_key_value_heads": 3},
     {"model_type": "zzz"}, {"model_type": 7}, {"rms_norm_eps": "x"},
     {"quantization_config": 7}],
    ids=str,
)  # fmt: skip
def test_what_transformers_makes_nothing_of(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Whatever kind of error it raises, reading the config or building the model."""
    changed(base(tmp_path / "base"), **changes)

    def use() -> None:
        load_config(tmp_path / "base")
        load.load_base(tmp_path / "base", load.Chosen("fp32", ""), load.pick_device())

    with pytest.raises(UserError):
        use()


ROWS = byte_level().get_vocab_size()
PAD = AddedToken("[PAD]", special=True)
WORD = AddedToken("麒麟芯片", special=False)
IMAGE = AddedToken("<image>", special=True)


@pytest.mark.parametrize(
    ("added", "names", "named"),
    [([WORD], {}, "麒麟芯片"), ([PAD], {"pad_token": "[PAD]"}, "[PAD]")],
    ids=["a word", "the padding"],
)
def test_a_token_without_a_row_is_refused_before_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, added: list[AddedToken], names: dict[str, str],
    named: str,
) -> None:  # fmt: skip
    folder = base(tmp_path / "base", added, **names)
    rows = tmp_path / "x.jsonl"
    rows.write_text('{"instruction": "麒麟芯片？", "output": "是。"}\n', encoding="utf-8")
    monkeypatch.setattr(load, "load_base", lambda *_: pytest.fail("weights were loaded"))
    data = ["--dataset", str(rows), "--output_dir", str(tmp_path / "run"), "--template", "alpaca"]
    for work in (
        lambda: train(["--model", str(folder), *data]),
        lambda: generate(["--model", str(folder), "--template", "alpaca", "hi"]),
        lambda: plan(["--model", str(folder), "--memory", "4GiB", "--cutoff_len", "64"]),
    ):
        with pytest.raises(UserError) as told:
            work()
        assert f"{ROWS} rows" in str(told.value)
        assert named in str(told.value)
    assert any(f.level == "error" and named in f.text for f in doctor.examine(folder, "alpaca")[1])


def test_a_token_that_nothing_produces_does_no_harm(tmp_path: Path) -> None:
    """Gemma 3 of text alone has a placeholder for images beyond its embedding."""
    folder = base(tmp_path / "base", [IMAGE])
    vocabulary = load_vocabulary(folder)
    renderer = Renderer(find_template("alpaca", vocabulary), Tokenizer(vocabulary))
    assert renderer.tokenizer.vocab_size > ROWS
    assert tokens_without_row(renderer, ROWS) == {}
    assert not any(f.level == "error" for f in doctor.examine(folder, "alpaca")[1])


def test_a_plan_refuses_a_base_with_damaged_weights(tmp_path: Path) -> None:
    folder = base(tmp_path / "base")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be trained as it is"):
        plan(["--model", str(folder), "--memory", "4GiB", "--cutoff_len", "64"])
