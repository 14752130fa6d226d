"""Every field of PEFT's LoraConfig: answers as PEFT's own, on the base as it is, or a refusal."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import KasaConfig, VeloraConfig
from safetensors.torch import load_file, save_file

from kit import tiny_model
from vicuna.errors import UserError
from vicuna.model import lora_config
from vicuna.model.adapter import attach_saved, even, read_adapter, save_files
from vicuna.model.adapter_files import AdapterFiles
from vicuna.model.adapter_fit import notes_on
from vicuna.model.lora_delta import LoraDelta

IDS = torch.arange(3, 40)[None]
TARGET = ["q_proj", "v_proj", "down_proj"]
ALL = [f.name for f in dataclasses.fields(LoraConfig)]
FAMILY = "qwen2"  # with biases

# What each field is set to: in LoraConfig where PEFT can make such an adapter here, else in the
# file. A list: several settings of it.
Setting = dict[str, Any]
BY_PEFT: dict[str, list[Setting]] = {
    "task_type": [{"task_type": None}],
    "r": [{"r": 3}, {"r": 16, "lora_alpha": 1}],
    "target_modules": [
        {"target_modules": ["q_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": r"model\.layers\.[1]\.(self_attn|mlp)\.(q|v|down)_proj"},
        {"target_modules": ["layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
    "exclude_modules": [
        {"exclude_modules": ["v_proj"]},
        {"exclude_modules": r".*layers\.0\..*"},
        {"target_modules": "all-linear", "exclude_modules": ["layers.1.mlp.up_proj"]},
    ],
    "lora_alpha": [{"lora_alpha": 3}, {"lora_alpha": 2.5}],
    "lora_dropout": [{"lora_dropout": 0.3}],
    "fan_in_fan_out": [{"fan_in_fan_out": True}],
    "bias": [{"bias": "all"}, {"bias": "lora_only"}],
    "use_rslora": [
        {"use_rslora": True},
        {"use_rslora": True, "rank_pattern": {"v_proj": 9}, "alpha_pattern": {"q_proj": 5}},
    ],
    "modules_to_save": [{"modules_to_save": ["lm_head"]}, {"modules_to_save": ["norm"]}],
    "init_lora_weights": [
        {"init_lora_weights": kind}
        for kind in (False, "gaussian", "eva", "orthogonal", "pissa", "pissa_niter_4", "olora",
                     "mica")
    ],
    "layers_to_transform": [{"layers_to_transform": [1]}, {"layers_to_transform": 0}],
    "layers_pattern": [{"layers_to_transform": [1], "layers_pattern": "layers"}],
    "rank_pattern": [
        {"rank_pattern": {"v_proj": 8}},
        {"rank_pattern": {r"layers\.1\..*q_proj": 2, "q_proj": 5}},
        {"rank_pattern": {"^model.layers.0.mlp.down_proj": 7}, "alpha_pattern": {"down_proj": 3}},
        {"rank_pattern": {f"model.layers.{i}.self_attn.{m}": i + j + 1
                          for i in (0, 1) for j, m in enumerate(("q_proj", "v_proj"))}},
    ],
    "alpha_pattern": [
        {"alpha_pattern": {"q_proj": 3}},
        {"alpha_pattern": {"layers.1.self_attn.v_proj": 1, "v_proj": 32}},
        {"alpha_pattern": {"(q|v)_proj": 3, "q_proj": 99}},
        {"alpha_pattern": {"q_proj": 8}},
    ],
    "trainable_token_indices": [{"trainable_token_indices": [5, 6]}],
    "use_dora": [{"use_dora": True}],
    "alora_invocation_tokens": [{"alora_invocation_tokens": [7, 8]}],
    "layer_replication": [{"layer_replication": [[0, 2], [1, 2]]}],
    "lora_bias": [{"lora_bias": True, "target_modules": ["q_proj"]}],
    "target_parameters": [{"target_parameters": ["mlp.up_proj.weight"]}],
    "ensure_weight_tying": [{"ensure_weight_tying": True}],
    "velora_config": [{"velora_config": {}}],
    "qalora_group_size": [{"qalora_group_size": 4}],
    "megatron_core": [{"megatron_core": "another.core"}],
    "kasa_config": [{"kasa_config": {}}],
}  # fmt: skip
PATCHED: dict[str, list[Setting]] = {
    "task_type": [{"task_type": t} for t in ("SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS")],
    "peft_type": [{"peft_type": t} for t in ("IA3", "VERA", "LOHA", "ADALORA", "PREFIX_TUNING")],
    "auto_mapping": [{"auto_mapping": {"base_model_class": "X", "parent_library": "x"}}],
    "peft_version": [{"peft_version": "9.0.0"}],
    "base_model_name_or_path": [{"base_model_name_or_path": "x/y"}],
    "revision": [{"revision": "abc123"}],
    "inference_mode": [{"inference_mode": False}],
    "layers_to_transform": [{"layers_to_transform": [1]}],
    "exclude_modules": [{"exclude_modules": ["q_proj"]}, {"exclude_modules": ".*q_proj"}],
    "target_modules": [
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": "nothing.like.it"},
    ],
    "fan_in_fan_out": [{"fan_in_fan_out": True}],
    "init_lora_weights": [{"init_lora_weights": k} for k in ("corda", "loftq", "lora_ga", "new")],
    "megatron_config": [{"megatron_config": {"tensor_model_parallel_size": 1}}],
    "loftq_config": [{"loftq_config": {"loftq_bits": 4}}],
    "eva_config": [{"eva_config": {"rho": 1.0}}],
    "corda_config": [{"corda_config": {"corda_method": "kpm"}}],
    "lora_ga_config": [{"lora_ga_config": {"direction": "random"}}],
    "use_qalora": [{"use_qalora": True}],
    "monteclora_config": [{"monteclora_config": {"num_samples": 2}}],
    "runtime_config": [{"runtime_config": {"ephemeral_gpu_offload": True}}],
    "use_bdlora": [{"use_bdlora": {"nblocks": 2}}],
    "arrow_config": [{"arrow_config": {"top_k": 2}}],
}
CASES = [
    pytest.param(name, setting, made, id=f"{name}-{i}{'' if made else '-patched'}")
    for table, made in ((BY_PEFT, True), (PATCHED, False))
    for name, settings in table.items()
    for i, setting in enumerate(settings)
]


def base() -> Any:
    return tiny_model(FAMILY)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=IDS, use_cache=False).logits
    return result


def shaken(peft: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    for name, p in peft.named_parameters():
        if "lora_" in name or (p.requires_grad and p.is_floating_point()):
            p.data += torch.randn(p.shape, generator=generator) * 0.1
    return peft


def made_by_peft(folder: Path, **setting: Any) -> None:
    torch.manual_seed(0)
    shape = {"r": 4, "lora_alpha": 8, "target_modules": TARGET, "task_type": "CAUSAL_LM"}
    given = {**shape, **setting}
    for name, kind in (("velora_config", VeloraConfig), ("kasa_config", KasaConfig)):
        if name in given:
            given[name] = kind(**given[name])
    shaken(get_peft_model(base(), LoraConfig(**given))).save_pretrained(str(folder))


def patch(folder: Path, **setting: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))


def merged(files: AdapterFiles) -> torch.Tensor:
    """The logits of a base with the adapter in its weights, as merge and export compute them."""
    model = base()
    delta = LoraDelta(files)
    held = {n: p for n, p in model.state_dict().items() if n.endswith(".weight")}
    delta.check({n: tuple(p.shape) for n, p in held.items()}, tied=False)
    model.load_state_dict({n: delta.apply(n, p) for n, p in held.items()}, strict=False)
    return logits(model)


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("name", "setting", "by_peft"), CASES)
def test_as_peft_or_refused_by_name(
    tmp_path: Path, name: str, setting: Setting, by_peft: bool
) -> None:
    made_by_peft(tmp_path, **(setting if by_peft else {}))
    patch(tmp_path, **({} if by_peft else setting))
    try:
        wanted = logits(PeftModel.from_pretrained(base(), str(tmp_path)))
    except Exception:  # what PEFT itself cannot load must be refused
        wanted = None
    files = opened(tmp_path)
    if isinstance(files, UserError):
        assert name in str(files)
        assert files.fix
        return
    assert name not in lora_config.REFUSED
    assert wanted is not None, "PEFT refuses this"
    assert near(logits(attach_saved(base(), files)), wanted)
    assert near(logits(attach_saved(base(), even(files))), wanted)
    if not files.config.get("fan_in_fan_out"):
        assert near(merged(files), wanted)
    # Written anew it is the same for PEFT.
    (tmp_path / "new").mkdir()
    save_files(files, tmp_path / "new")
    again = logits(PeftModel.from_pretrained(base(), str(tmp_path / "new")))
    assert near(again, wanted)


def opened(folder: Path) -> AdapterFiles | UserError:
    """An adapter as every command opens it, or why not."""
    try:
        files = read_adapter(str(folder))
        if files.copies:
            save_base(folder / "base")
            notes_on(files, folder / "base")
    except UserError as e:
        return e
    return files


def save_base(folder: Path) -> None:
    base().save_pretrained(str(folder))


def test_every_field_of_peft_is_decided_and_tried() -> None:
    tables = (lora_config.HONOURED, lora_config.WITHOUT_EFFECT, lora_config.REFUSED)
    decided = [name for table in tables for name in table]
    assert sorted(decided) == sorted(set(decided)), "a field stands in two tables"
    assert set(ALL) == set(decided), "decide on it, in vicuna.model.lora_config"
    assert set(ALL) == set(BY_PEFT) | set(PATCHED), "try it, above"


@pytest.mark.parametrize("name", ["pissa", "olora", "dora", "alora"])
def test_a_silent_one_would_have_been_wrong(tmp_path: Path, name: str) -> None:
    """What is refused is not refused for nothing: taken as a plain LoRA it answers otherwise."""
    setting = {
        "pissa": {"init_lora_weights": "pissa"}, "olora": {"init_lora_weights": "olora"},
        "dora": {"use_dora": True}, "alora": {"alora_invocation_tokens": [7, 8]},
    }[name]  # fmt: skip
    made_by_peft(tmp_path, **setting)
    wanted = logits(PeftModel.from_pretrained(base(), str(tmp_path)))
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    config |= {"init_lora_weights": True, "use_dora": False, "alora_invocation_tokens": None}
    path.write_text(json.dumps(config))
    weights = load_file(tmp_path / "adapter_model.safetensors")
    weights = {k: v for k, v in weights.items() if "magnitude" not in k}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    files = read_adapter(str(tmp_path))
    assert not near(logits(attach_saved(base(), files)), wanted)


def test_settings_of_a_newer_peft_are_named(tmp_path: Path) -> None:
    made_by_peft(tmp_path)
    patch(tmp_path, brand_new_option={"x": 1}, another_new=False)
    files = read_adapter(str(tmp_path))
    assert any("brand_new_option" in n for n in files.notes)
    assert not any("another_new" in n for n in files.notes)
    wanted = logits(PeftModel.from_pretrained(base(), str(tmp_path)))
    assert near(logits(attach_saved(base(), files)), wanted)


BROKEN: list[Setting] = [
    {"rank_pattern": ["q_proj"]},
    {"target_modules": 5},
    {"target_modules": {"q_proj": 1}},
    {"exclude_modules": [1, 2]},
    {"layers_to_transform": [1], "layers_pattern": [None]},
    {"rank_pattern": {"(": 3}},
    {"alpha_pattern": {"q_proj": "much"}},
    {"alpha_pattern": {"q_proj": 0}},
    {"lora_alpha": float("inf")},
    {"target_modules": "("},
    {"exclude_modules": TARGET},
    {"layers_to_transform": ["first"]},
    {"layers_to_transform": [9]},
    {"exclude_modules": "(.*.*)*.*x(.*)*y"},
]


@pytest.mark.parametrize("setting", BROKEN, ids=str)
def test_broken_settings_are_an_answer(
    tmp_path: Path, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora_config, "_PATTERN_SECONDS", 3.0)
    made_by_peft(tmp_path)
    patch(tmp_path, **setting)
    with pytest.raises(UserError):
        read_adapter(str(tmp_path))


# -- layers that the weights lack ----


def test_layers_that_the_file_lacks_get_nothing_as_in_peft(tmp_path: Path) -> None:
    made_by_peft(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "layers.0.mlp" not in k}, path)
    wanted = logits(PeftModel.from_pretrained(base(), str(tmp_path)))
    files = read_adapter(str(tmp_path))
    assert near(logits(attach_saved(base(), files)), wanted)
    assert near(merged(files), wanted)
    save_base(tmp_path / "base")
    assert any("model.layers.0.mlp.down_proj" in n for n in notes_on(files, tmp_path / "base"))


# -- copies of the base beside it ----


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_copy_of_the_head_is_compared_with_the_base(
    tmp_path: Path, tied: bool, suffix: str
) -> None:
    def small() -> Any:
        return tiny_model(FAMILY, tie_word_embeddings=tied)

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    peft = shaken(get_peft_model(small(), config))
    peft.save_pretrained(str(tmp_path), safe_serialization=suffix == "safetensors")
    small().save_pretrained(str(tmp_path / "base"))
    files = read_adapter(str(tmp_path))
    assert set(files.copies) == {"lm_head.weight"}
    assert notes_on(files, tmp_path / "base") == []
    wanted = logits(PeftModel.from_pretrained(small(), str(tmp_path)))
    assert near(logits(attach_saved(small(), files)), wanted)
    other = tiny_model(FAMILY, seed=5, tie_word_embeddings=tied)
    other.save_pretrained(str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"lm_head.base_layer.weight.*not what the base has"):
        notes_on(files, tmp_path / "other")


def test_weights_that_no_base_has_are_refused(tmp_path: Path) -> None:
    made_by_peft(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    more = {"base_model.model.score.weight": torch.ones(2, 32)}
    save_file({**load_file(path), **more}, path)
    save_base(tmp_path / "base")
    with pytest.raises(UserError, match=r"score.weight.*neither a LoRA"):
        notes_on(read_adapter(str(tmp_path)), tmp_path / "base")
