"""The base that an adapter names is found, or said to be the adapter's own claim."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kit import save_tokenizer, tiny_model, with_adapter
from vicuna import config
from vicuna.commands import merge
from vicuna.commands.model_source import open_source
from vicuna.config import AnswerSettings, MergeSettings, TrainSettings
from vicuna.errors import UserError
from vicuna.generate.load import open_model
from vicuna.model import adapter_base
from vicuna.model.adapter import read_adapter, save
from vicuna.train import resume
from vicuna.train.progress import RunConsole


def adapter(folder: Path, base: Any) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    save(with_adapter(tiny_model("llama", vocab_size=352)), folder, {})
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))
    return str(folder)


def base(folder: Path) -> Path:
    tiny_model("llama", vocab_size=352).save_pretrained(str(folder))
    save_tokenizer(folder)
    return folder


ELSEWHERE = (
    r"D:\models\tiny-base",
    r"C:/Users/me/models/tiny-base",
    r"\\server\share\tiny-base",
    "/root/autodl-tmp/tiny-base",
    "~/autodl-tmp/tiny-base",
    "~nobody-of-this-name/tiny-base",
    "./models/tiny-base",
    "../tiny-base",
    "models/deep/tiny-base",
    "file:///models/tiny-base",
    "底座/七B",
    "x" * 5000,
    "tiny-base",
)


@pytest.mark.parametrize("name", ELSEWHERE, ids=lambda n: n[:30])
def test_a_base_of_another_machine_is_the_adapters_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(adapter_base, "locate", lambda *_, **__: pytest.fail("the hub was asked"))
    folder = adapter(tmp_path / "a", name)
    ways = (
        lambda: open_model(config.build(AnswerSettings, {"adapter": folder})),
        lambda: open_source(Asked(folder)),
        lambda: merge.run(["--adapter", folder, "--output_dir", str(tmp_path / "m")]),
        lambda: resume.find_start(
            config.build(TrainSettings, {"init_adapter": folder, "dataset": ["x"]}),
            {},
            RunConsole(),
        ),
    )
    for way in ways:
        with pytest.raises(UserError, match=r"the adapter names .* as its base") as found:
            way()
        assert name[:100] in found.value.what
        assert found.value.where == f"adapter {folder}"
        assert "--model FOLDER" in found.value.fix
        assert "smollm2" not in str(found.value)


class Asked:
    model = template = ""
    allow_other_base = False

    def __init__(self, adapter: str) -> None:
        self.adapter = adapter


@pytest.mark.parametrize("name", ["unsloth/tiny-base-unsloth-bnb-4bit", "models/tiny-base"])
def test_a_hub_id_that_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def no_hub(model: str, weights: bool = True) -> Path:
        raise UserError(f"the hub cannot be reached ({weights})", fix="--model smollm2-135m")

    monkeypatch.setattr(adapter_base, "locate", no_hub)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"the adapter names {name} as its base") as found:
        open_model(config.build(AnswerSettings, {"adapter": adapter(tmp_path / "a", name)}))
    assert "smollm2" not in str(found.value)
    assert ("16 bits" in found.value.fix) == ("4bit" in name)


def test_no_name_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not say which base"):
        open_model(config.build(AnswerSettings, {"adapter": adapter(tmp_path / "a", None)}))


@pytest.mark.parametrize(
    "name", ["bases/one", "../bases/one", "~/bases/one", "bases/one/", "{}/bases/one"]
)
def test_a_base_that_is_here_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """From the home folder, from the adapter's own, from the one it lies in, from here."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir("/")
    base(tmp_path / "bases" / "one")
    folder = adapter(tmp_path / "adapter", name.format(tmp_path))
    found = adapter_base.named_base(read_adapter(folder))
    assert Path(found).resolve() == tmp_path / "bases" / "one"
    loaded = open_model(config.build(AnswerSettings, {"adapter": folder, "template": "alpaca"}))
    assert loaded.adapters
    assert isinstance(config.build(MergeSettings, {"adapter": folder}).adapter, list)
