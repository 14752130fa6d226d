"""GGUF files: llama.cpp computes from them what transformers computes from the folder."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gguf_kit import save_base, scores_after, tiny_base, tiny_gguf
from kit import save_tokenizer, tiny_model
from vicuna.data.tokenizer import Tokenizer
from vicuna.errors import UserError
from vicuna.export.gguf_names import Names, Shape
from vicuna.export.gguf_types import PLAIN
from vicuna.export.gguf_writer import write_base
from vicuna.gguf.read import read_fields
from vicuna.model.vocabulary import load_vocabulary
from vicuna.weights.chunks import Pieces

needs_llamacpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="needs the extra cpp (xllamacpp)"
)
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
YARN = {
    "rope_type": "yarn", "rope_theta": 5000.0, "factor": 2.0,
    "original_max_position_embeddings": 256,
}  # fmt: skip


def engine_of(path: Path) -> Any:
    from vicuna.generate.engines.llamacpp import LlamaCppEngine

    return LlamaCppEngine(path, context_length=256, threads=1, cache_type="f32")


# -- weights ----


@needs_llamacpp
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama-gqa-tied", {}),
        ("llama", {"attention_bias": True, "head_dim": 16}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": LINEAR}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("qwen2", {"rope_parameters": YARN}),
        ("qwen3", {}),
    ],
)
def test_scores_are_those_of_transformers(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    model, path = tiny_gguf(tmp_path, family, **changes)
    ids = torch.randint(5, 340, (120,), generator=torch.Generator().manual_seed(1)).tolist()
    with engine_of(path) as engine:
        assert (engine.prefill(ids) - scores_after(model, ids)).abs().max() < 1e-4


@needs_llamacpp
@pytest.mark.parametrize("kind", PLAIN)
def test_every_type_is_near_the_original(tmp_path: Path, kind: str) -> None:
    model, path = tiny_gguf(tmp_path, "qwen3", kind)
    within = {"f32": 1e-4, "f16": 0.05, "bf16": 0.3, "q8_0": 0.4}.get(kind, 6.0)
    ids = list(range(20, 60))
    with engine_of(path) as engine:
        scores, wanted = engine.prefill(ids), scores_after(model, ids)
        assert (scores - wanted).abs().max() < within
        # Random weights have no redundancy: 4 bits cost much, but not the direction.
        assert torch.cosine_similarity(scores, wanted, dim=0) > 0.9


def test_tensors_are_of_the_type_asked_for(tmp_path: Path) -> None:
    from gguf import GGUFReader

    _, path = tiny_gguf(tmp_path, "qwen2", "q4_0")
    types = {t.name: t.tensor_type.name for t in GGUFReader(str(path)).tensors}
    assert types["blk.0.attn_q.weight"] == "Q4_0"
    assert types["token_embd.weight"] == types["output.weight"] == "Q8_0"
    assert types["blk.0.attn_q.bias"] == types["output_norm.weight"] == "F32"


def test_a_matrix_that_has_no_whole_blocks_stays_f16(tmp_path: Path) -> None:
    from gguf import GGUFReader

    _, path = tiny_gguf(tmp_path, "llama", "q8_0", hidden_size=40)
    types = {t.name: t.tensor_type.name for t in GGUFReader(str(path)).tensors}
    assert types["blk.0.ffn_up.weight"] == "F16"


def test_q_and_k_are_laid_out_as_llamacpp_rotates_them() -> None:
    """Row 2i and 2i+1 of a head are the pair that Hugging Face has at i and i + head_dim/2."""
    config = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2,
              "num_key_value_heads": 1, "num_hidden_layers": 1}  # fmt: skip
    names = Names(Shape.of(config, "here"))
    rows = torch.arange(8.0)[:, None]
    assert names.reorder("blk.0.attn_q.weight", rows)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert names.reorder("blk.0.attn_k.weight", rows[:4])[:, 0].tolist() == [0, 2, 1, 3]
    assert names.reorder("blk.0.attn_v.weight", rows)[:, 0].tolist() == list(range(8))
    qwen = Names(Shape.of({**config, "model_type": "qwen2"}, "here"))
    assert qwen.reorder("blk.0.attn_q.weight", rows)[:, 0].tolist() == list(range(8))


def test_shards_are_written_as_one_file(tmp_path: Path) -> None:
    model = tiny_base(tmp_path / "one", "llama")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    save_tokenizer(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    for folder in ("one", "many"):
        write_base(tmp_path / folder, tmp_path / f"{folder}.gguf", "f16", name="same")
    from gguf import GGUFReader

    tensors = [
        {t.name: bytes(t.data.tobytes()) for t in GGUFReader(str(tmp_path / f)).tensors}
        for f in ("one.gguf", "many.gguf")
    ]
    assert tensors[0] == tensors[1]


def test_a_sliding_window_limits_the_context(tmp_path: Path) -> None:
    _, path = tiny_gguf(tmp_path, "mistral")
    assert read_fields(path)["llama.context_length"] == 16


# -- what cannot be written ----


def test_another_architecture_is_refused_and_the_supported_named(tmp_path: Path) -> None:
    save_base(tmp_path, tiny_model("gemma2"))
    with pytest.raises(UserError, match="type gemma2 cannot") as e:
        write_base(tmp_path, tmp_path / "x.gguf")
    assert "llama, mistral, qwen2, qwen3" in str(e.value)


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny_base(tmp_path, "llama")
    path = tmp_path / "model.safetensors"
    save_file({**load_file(path), "model.extra.weight": torch.ones(3)}, path)
    with pytest.raises(UserError, match=r"model\.extra\.weight"):
        write_base(tmp_path, tmp_path / "x.gguf")


def test_scaled_positions_that_llamacpp_does_not_know_are_refused(tmp_path: Path) -> None:
    tiny_base(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="'dynamic'"):
        write_base(tmp_path, tmp_path / "x.gguf")


def test_old_and_new_settings_of_positions_mean_the_same() -> None:
    from vicuna.export.gguf_names import rope_settings

    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}}
    for key in ("rope_theta", "rope_type", "factor"):
        assert rope_settings(old)[key] == rope_settings(new)[key]


def test_values_beyond_f16_are_refused_not_made_infinite(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=352)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    save_base(tmp_path, model)
    with pytest.raises(UserError, match=r"ffn_up.* beyond the range of f16"):
        write_base(tmp_path, tmp_path / "x.gguf", "f16")


def test_an_interrupted_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_base(tmp_path / "base", "llama")
    target = tmp_path / "out" / "x.gguf"
    write_base(tmp_path / "base", target, "f32")
    before = target.read_bytes()
    real, written = Pieces._write, []

    def failing(self: Any, *args: Any) -> None:
        written.append(1)
        if len(written) > 3:
            raise OSError(28, "No space left on device")
        real(self, *args)

    monkeypatch.setattr(Pieces, "_write", failing)
    with pytest.raises(UserError, match="cannot write: the disk is full"):
        write_base(tmp_path / "base", target, "f16")
    assert target.read_bytes() == before
    assert [p.name for p in target.parent.iterdir()] == ["x.gguf"]


# -- the embedded base ----


@needs_llamacpp
@pytest.mark.slow
def test_the_embedded_base_answers_as_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from vicuna.data.conversation import Turn
    from vicuna.data.templates.registry import find_template
    from vicuna.data.templates.renderer import Renderer
    from vicuna.model.base import EMBEDDED, locate, locate_vocabulary

    folder = locate(EMBEDDED)
    write_base(folder, tmp_path / "f16.gguf", "f16")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    vocabulary = load_vocabulary(folder)
    assert load_vocabulary(locate_vocabulary(EMBEDDED)) == vocabulary
    renderer = Renderer(find_template("auto", vocabulary), Tokenizer(vocabulary))
    with engine_of(tmp_path / "f16.gguf") as engine:
        for question in ("What is the capital of France?", "用一句话介绍北京。", "Count: 1, 2, 3"):
            prompt = renderer.prompt([Turn("user", question)])
            assert engine.tokenize(question) == renderer.tokenizer.text(question, first=True)
            wanted = scores_after(model, prompt)
            scores = engine.prefill(prompt)
            assert (scores - wanted).abs().max() < 0.1
            said: list[int] = []
            for _ in range(6):
                said.append(int(scores.argmax()))
                if said[-1] in renderer.stop_ids:
                    break
                scores = engine.step([said[-1]], [0])[0]
            ids = torch.tensor([prompt])
            kept = model.generate(ids, max_new_tokens=len(said), do_sample=False)
            assert said == kept[0, len(prompt) :].tolist()


def test_an_unknown_type_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no GGUF type 'q9_z'"):
        write_base(tmp_path, tmp_path / "b.gguf", "q9_z")
