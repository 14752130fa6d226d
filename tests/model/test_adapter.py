"""Adapters are plug and play: ours in plain PEFT, plain PEFT's here, and those of 2023."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kit import shake, tiny_model, with_adapter
from vicuna.errors import UserError
from vicuna.model.adapter import (
    LoraSettings,
    attach,
    attach_saved,
    check_base,
    identify,
    read_adapter,
    save,
)

IDS = torch.arange(3, 40)[None]
MODULES = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
Old = Callable[[Path], None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(IDS).logits
    return result


def by_peft(folder: Path, **config: Any) -> torch.Tensor:
    """An adapter saved by plain PEFT; the logits it gives."""
    from peft import LoraConfig, get_peft_model

    shape = {"r": 4, "lora_alpha": 8, "target_modules": MODULES, "task_type": "CAUSAL_LM"}
    peft = get_peft_model(tiny_model("llama"), LoraConfig(**{**shape, **config}))
    shake(peft)
    peft.save_pretrained(str(folder))
    return logits(peft)


def opened(folder: Path) -> torch.Tensor:
    return logits(attach_saved(tiny_model("llama"), read_adapter(str(folder))))


def content(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# -- both ways ----


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("target", [("all",), ("q_proj", "v_proj")])
def test_ours_opens_in_plain_peft(tmp_path: Path, rslora: bool, target: tuple[str, ...]) -> None:
    from peft import PeftModel

    peft = with_adapter(tiny_model("llama"), rslora=rslora, target=target, alpha=12)
    save(peft, tmp_path, {})
    theirs = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path))
    assert torch.equal(logits(theirs), logits(peft))
    assert torch.equal(opened(tmp_path), logits(peft))


@pytest.mark.parametrize(
    "config", [{}, {"use_rslora": True}, {"target_modules": ["q_proj"]}], ids=str
)
def test_plain_pefts_opens_here(tmp_path: Path, config: dict[str, Any]) -> None:
    wanted = by_peft(tmp_path, **config)
    assert torch.equal(opened(tmp_path), wanted)
    assert read_adapter(str(tmp_path)).notes == []


def test_the_meta_comes_back(tmp_path: Path) -> None:
    meta = {"template": {"kind": "literal", "name": "问答"}, "base": {"name": "甲"}}
    save(with_adapter(tiny_model("llama")), tmp_path, meta)
    assert read_adapter(str(tmp_path)).meta == meta


def test_a_run_folder_stands_for_its_adapter(tmp_path: Path) -> None:
    wanted = by_peft(tmp_path / "adapter")
    assert torch.equal(opened(tmp_path), wanted)


def test_a_fresh_adapter_depends_on_the_seed_alone() -> None:
    def weights(seed: int, noise: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(noise)
        peft = attach(tiny_model("llama"), LoraSettings(rank=4), seed)
        return {n: p for n, p in peft.named_parameters() if p.requires_grad}

    a, b, c = weights(1, 1), weights(1, 2), weights(2, 1)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


def test_a_fresh_adapter_changes_nothing_yet() -> None:
    assert torch.equal(
        logits(attach(tiny_model("llama"), LoraSettings(), 0)), logits(tiny_model("llama"))
    )


def test_unknown_layer_names_are_refused_and_the_known_ones_named() -> None:
    with pytest.raises(UserError, match="q_proj"):
        attach(tiny_model("llama"), LoraSettings(target=("query",)), 0)


# -- of 2023 ----


def rewritten(folder: Path, name: str, key: Callable[[str], str]) -> None:
    path = folder / "adapter_model.safetensors"
    torch.save({key(k): v for k, v in load_file(path).items()}, folder / name)
    path.unlink()


def bin_file(folder: Path) -> None:
    rewritten(folder, "adapter_model.bin", lambda k: k)


def no_config(folder: Path) -> None:
    rewritten(folder, "pytorch_model.bin", lambda k: k)
    (folder / "adapter_config.json").unlink()


def default_keys(folder: Path) -> None:
    rewritten(folder, "adapter_model.bin", lambda k: k.replace(".weight", ".default.weight"))


def no_prefix(folder: Path) -> None:
    rewritten(folder, "adapter_model.bin", lambda k: k.removeprefix("base_model.model."))


def forgetful_config(folder: Path) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "target_modules": ["q_proj", "v_proj"]}))


def old_config(folder: Path) -> None:
    bin_file(folder)
    old = {
        "base_model_name_or_path": "decapoda-research/llama-7b-hf",
        "bias": "none",
        "enable_lora": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 8,
        "lora_dropout": 0.05,
        "merge_weights": False,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "target_modules": MODULES,
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(old))


@pytest.mark.parametrize(
    "old", [bin_file, no_config, default_keys, no_prefix, forgetful_config, old_config]
)
def test_old_formats_open_and_stay_as_they_are(tmp_path: Path, old: Old) -> None:
    wanted = by_peft(tmp_path)
    old(tmp_path)
    before = content(tmp_path)
    assert torch.equal(opened(tmp_path), wanted)
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("old", "said"), [(no_config, "alpha 8 assumed"), (forgetful_config, "gate_proj")]
)
def test_what_was_guessed_is_said(tmp_path: Path, old: Old, said: str) -> None:
    by_peft(tmp_path)
    old(tmp_path)
    assert any(said in note for note in read_adapter(str(tmp_path)).notes)


# -- refused ----


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path, name: str) -> None:
    harm = tmp_path / "harm"
    torch.save({"q_proj.lora_A.weight": Evil(harm)}, tmp_path / name)
    with pytest.raises(UserError, match=name):
        read_adapter(str(tmp_path))
    assert not harm.exists()


@pytest.mark.parametrize(
    "damage", [b"", b"\x00" * 40, b"version https://git-lfs.github.com/spec/v1\n"]
)
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_a_damaged_file_is_refused(tmp_path: Path, name: str, damage: bytes) -> None:
    (tmp_path / name).write_bytes(damage)
    with pytest.raises(UserError, match=r"cannot read the weights|the file is damaged|Git LFS"):
        read_adapter(str(tmp_path))


def test_a_file_without_lora_weights_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="no LoRA weights"):
        read_adapter(str(tmp_path))


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        read_adapter(str(tmp_path))


def test_a_missing_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such adapter"):
        read_adapter(str(tmp_path / "none"))


def test_a_broken_config_is_refused(tmp_path: Path) -> None:
    by_peft(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="broken"):
        read_adapter(str(tmp_path))


def test_another_kind_of_adapter_is_refused(tmp_path: Path) -> None:
    by_peft(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(UserError, match="IA3"):
        read_adapter(str(tmp_path))


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 48}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}]
)
def test_an_adapter_of_another_shape_is_refused(tmp_path: Path, changes: dict[str, int]) -> None:
    by_peft(tmp_path)
    with pytest.raises(UserError, match="does not fit this base"):
        attach_saved(tiny_model("llama", **changes), read_adapter(str(tmp_path)))


# -- the base it belongs to ----


def saved_base(folder: Path, seed: int = 0, **changes: Any) -> dict[str, Any]:
    tiny_model("llama", seed, **changes).save_pretrained(folder)
    return identify(folder)


@pytest.fixture
def belonging(tmp_path: Path) -> Any:
    base = saved_base(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    save(with_adapter(tiny_model("llama")), tmp_path / "adapter", {"base": {"name": "甲", **base}})
    return read_adapter(str(tmp_path / "adapter"))


def test_its_own_base_is_taken(belonging: Any, tmp_path: Path) -> None:
    assert check_base(belonging, saved_base(tmp_path / "again"), allow_other=False) is None


def test_other_weights_are_refused_unless_allowed(belonging: Any, tmp_path: Path) -> None:
    other = saved_base(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="--allow_other_base"):
        check_base(belonging, other, allow_other=False)
    assert "甲" in (check_base(belonging, other, allow_other=True) or "")


@pytest.mark.parametrize("allow", [False, True])
def test_another_shape_is_always_refused(belonging: Any, tmp_path: Path, allow: bool) -> None:
    other = saved_base(tmp_path / "other", hidden_size=48)
    with pytest.raises(UserError, match="hidden_size 32 there, 48 here"):
        check_base(belonging, other, allow)


def test_an_adapter_of_other_origin_is_not_asked(tmp_path: Path) -> None:
    by_peft(tmp_path)
    assert check_base(read_adapter(str(tmp_path)), {"hidden_size": 1}, False) is None
