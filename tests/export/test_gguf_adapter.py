"""GGUF LoRA files: llama.cpp adds the same as PEFT, and what does not fit is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from gguf_kit import scores_after, tiny_base
from kit import shake, with_adapter
from vicuna.errors import UserError
from vicuna.export.gguf_writer import write_adapter, write_base
from vicuna.gguf.read import read_fields
from vicuna.model.adapter import AdapterFiles, read_adapter, save

needs_llamacpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="needs the extra cpp (xllamacpp)"
)


def saved(folder: Path, family: str, **lora: Any) -> tuple[Any, AdapterFiles, dict[str, Any]]:
    """(PEFT model, its adapter as read from disk, the base's config)."""
    model = tiny_base(folder, family)
    peft = with_adapter(model, **lora)
    (folder / "adapter").mkdir()
    save(peft, folder / "adapter", {})
    return peft, read_adapter(str(folder / "adapter")), model.config.to_dict()


@needs_llamacpp
@pytest.mark.parametrize("family", ["llama", "llama-gqa-tied", "qwen2", "qwen3"])
@pytest.mark.parametrize("rslora", [False, True])
def test_scores_with_an_adapter_are_those_of_peft(
    tmp_path: Path, family: str, rslora: bool
) -> None:
    from vicuna.generate.engines.llamacpp import LlamaCppEngine

    peft, files, config = saved(tmp_path, family, rank=4, alpha=6, rslora=rslora)
    write_base(tmp_path, tmp_path / "base.gguf", "f32")
    write_adapter(files, config, tmp_path / "lora.gguf")
    prompt = list(range(20, 60))
    with LlamaCppEngine(
        tmp_path / "base.gguf", context_length=256, threads=1, cache_type="f32"
    ) as engine:
        engine.load_adapter("mine", tmp_path / "lora.gguf")
        engine.use_adapters({"mine": 1.0})
        scores = engine.prefill(prompt)
        assert (scores - scores_after(peft, prompt)).abs().max() < 1e-3
        with peft.disable_adapter():
            assert (scores - scores_after(peft, prompt)).abs().max() > 0.1


@needs_llamacpp
def test_ranks_and_alphas_of_their_own(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from vicuna.generate.engines.llamacpp import LlamaCppEngine

    model = tiny_base(tmp_path, "llama")
    config = model.config.to_dict()
    shape = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"v_proj": 7, "layers.1.mlp.down_proj": 2},
        alpha_pattern={"layers.0.self_attn.q_proj": 1},
        task_type="CAUSAL_LM",
    )
    peft = get_peft_model(model, shape)
    shake(peft)
    peft.save_pretrained(str(tmp_path / "adapter"))
    files = read_adapter(str(tmp_path / "adapter"))
    write_base(tmp_path, tmp_path / "base.gguf", "f32")
    write_adapter(files, config, tmp_path / "lora.gguf")
    write_base(tmp_path, tmp_path / "merged.gguf", "f32", adapter=files)
    prompt = list(range(20, 60))
    for base, adapter in (("base", "lora"), ("merged", "")):
        with LlamaCppEngine(
            tmp_path / f"{base}.gguf", context_length=256, threads=1, cache_type="f32"
        ) as engine:
            if adapter:
                engine.load_adapter("mine", tmp_path / f"{adapter}.gguf")
                engine.use_adapters({"mine": 1.0})
            scores = engine.prefill(prompt)
            assert (scores - scores_after(peft, prompt)).abs().max() < 1e-3


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    _, files, config = saved(tmp_path, "qwen2", rank=4, alpha=6, rslora=True)
    write_adapter(files, config, tmp_path / "lora.gguf", "f16")
    fields = read_fields(tmp_path / "lora.gguf")
    assert fields["general.architecture"] == "qwen2"
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert fields["adapter.lora.alpha"] == 6 * 2  # over the rank 4 this is alpha over its root


def test_types_that_would_spoil_an_adapter_are_refused(tmp_path: Path) -> None:
    _, files, config = saved(tmp_path, "llama")
    with pytest.raises(UserError, match="cannot be written as q4_0"):
        write_adapter(files, config, tmp_path / "lora.gguf", "q4_0")


def test_an_adapter_of_the_shared_output_matrix_is_refused(tmp_path: Path) -> None:
    _, files, config = saved(tmp_path, "llama")
    files.tensors = {
        key.replace("model.layers.0.mlp.up_proj", "lm_head"): t
        for key, t in files.tensors.items()
        if "layers.0.mlp.up_proj" in key
    }
    config["tie_word_embeddings"] = True
    with pytest.raises(UserError, match="shares with its embedding"):
        write_adapter(files, config, tmp_path / "lora.gguf")


def test_an_adapter_of_other_heads_is_refused(tmp_path: Path) -> None:
    _, files, config = saved(tmp_path, "llama")
    with pytest.raises(UserError, match="2 heads of 8 need 16"):
        write_adapter(files, {**config, "num_key_value_heads": 2}, tmp_path / "lora.gguf")
    assert not (tmp_path / "lora.gguf").exists()
