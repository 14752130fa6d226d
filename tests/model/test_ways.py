"""A base is tried before it is trusted: who only looks like one of the family is not computed as
one, layers with a state get one example at a time, and a resumed run goes on in the same way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from run_kit import events, same, save_tiny_model, train, weights, write_data

from architectures_kit import build
from parity_kit import CPU, SHAPE, adapted, by_the_book, furthest, make_examples, packed
from vicuna.errors import UserError
from vicuna.memory import devices, plan
from vicuna.model import forward_choice, llama, lora_targets, self_check
from vicuna.model.adapter import LoraSettings, attach
from vicuna.model.trainable import TrainableModel
from vicuna.train import checkpoint as checkpoints

EXAMPLES = make_examples()


def model_of(kind: str, **changes: Any) -> Any:
    """A random frozen model of a config's name."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**SHAPE, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.requires_grad_(False)


FAR = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "llama_4_scaling_beta": 0.1,
}
# The multipliers and layers that their published models have.
ALIKE: dict[str, tuple[str, dict[str, Any]]] = {
    "granite": (
        "GraniteConfig",
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.0156,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
    ),
    "ministral3": ("Ministral3Config", {"rope_parameters": FAR, "max_position_embeddings": 262144}),
    "smollm3": ("SmolLM3Config", {"num_hidden_layers": 4}),
    "ernie4_5": ("Ernie4_5Config", {}),
    "helium": ("HeliumConfig", {"head_dim": 12}),
    "hunyuan_v1_dense": ("HunYuanDenseV1Config", {"head_dim": 12}),
}


@pytest.mark.parametrize("name", ALIKE)
def test_who_only_looks_alike_is_left_to_transformers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the name keeps it out or, the name let in, what it says."""
    assert name not in llama.MODEL_TYPES
    peft = adapted(model_of(ALIKE[name][0], **ALIKE[name][1]))
    assert TrainableModel(peft, CPU).llama is None
    monkeypatch.setattr(llama, "MODEL_TYPES", (*llama.MODEL_TYPES, name))
    loss, wanted = by_the_book(peft, EXAMPLES)
    trainable = TrainableModel(peft, CPU)
    said = forward_choice.settle(trainable)
    assert trainable.llama is None
    assert "transformers' own forward is used" in said[0]
    found_loss, found = packed(trainable, EXAMPLES, 10_000)
    assert found_loss == pytest.approx(loss, rel=1e-5)
    assert furthest(found, wanted) < 1e-4


def test_answers_of_who_only_looks_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    from vicuna.generate.engines.torch import open_engine
    from vicuna.generate.engines.transformers import PlainEngine

    monkeypatch.setattr(llama, "MODEL_TYPES", (*llama.MODEL_TYPES, "smollm3"))
    model = model_of("SmolLM3Config", num_hidden_layers=4)
    assert not isinstance(llama.view_of(model, training=False), str)
    assert isinstance(open_engine(model, 100), PlainEngine)


@pytest.mark.parametrize("longest", [100, 5000])
def test_angles_that_depend_on_length_do_so_beyond_what_the_base_was_made_for(longest: int) -> None:
    """InternLM3 as it was published: the same angles as ever up to its context."""
    rope = {"rope_type": "dynamic", "factor": 6.0, "rope_theta": 5e7}
    model = model_of("InternLM3Config", rope_parameters=rope, max_position_embeddings=4096)
    peft = adapted(model)
    loss, wanted = by_the_book(peft, EXAMPLES)
    trainable = TrainableModel(peft, CPU, longest=longest)
    forward_choice.settle(trainable)
    assert (trainable.llama is not None) == (longest == 100)
    assert (trainable.way == "packed") == (longest == 100)
    if longest == 100:
        found_loss, found = packed(trainable, EXAMPLES, 10_000)
        assert found_loss == pytest.approx(loss, rel=1e-5)
        assert furthest(found, wanted) < 1e-5


@pytest.mark.parametrize("name", ["qwen3_5_text", "lfm2", "falcon_h1"])
def test_a_state_is_seen_by_the_build_and_by_what_it_does(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name)
    assert self_check.state_of(model)
    monkeypatch.setattr(self_check, "state_of", lambda _: "")
    trainable = TrainableModel(model, CPU)
    (_, line) = forward_choice.settle(trainable)
    assert trainable.way == "alone"
    assert forward_choice.ONE_BY_ONE in line
    assert "differ from each alone" in line


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "qwen3", "glm4", "olmoe", "qwen3_5_text", "gpt_oss"])
def test_short_types_change_no_decision(name: str, dtype: torch.dtype) -> None:
    trainables = [TrainableModel(build(name).to(kind), CPU) for kind in (torch.float32, dtype)]
    for trainable in trainables:
        forward_choice.settle(trainable)
    assert len({(trainable.way, trainable.llama is None) for trainable in trainables}) == 1


def test_trying_changes_no_random_state_and_no_mode() -> None:
    peft = attach(build("qwen3_5_text"), LoraSettings(rank=4, dropout=0.5), seed=1)
    peft.train()
    before, modes = torch.get_rng_state(), [m.training for m in peft.modules()]
    trainable = TrainableModel(peft, CPU)
    first = forward_choice.settle(trainable)
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in peft.modules()] == modes
    assert forward_choice.settle(trainable) == first


def test_what_a_base_draws_at_random_in_training_is_off() -> None:
    peft = attach(build("gpt2"), LoraSettings(rank=4), seed=1)
    peft.train()
    trainable = TrainableModel(peft, CPU)
    forward_choice.settle(trainable)
    losses = {packed(trainable, _short(), 1000)[0] for _ in range(3)}
    assert len(losses) == 1


def _short() -> Any:
    from vicuna.data.loss_mask import Example

    return [Example(e.ids % 60, e.labels) for e in EXAMPLES[:3]]


# -- whole runs ----


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoTokenizer

    folder = save_tiny_model(tmp_path_factory.mktemp("hybrid"))
    size = len(AutoTokenizer.from_pretrained(folder))
    from transformers import AutoModelForCausalLM

    from architectures_kit import config_of

    config = config_of("qwen3_5_text")
    config.vocab_size, config.max_position_embeddings = size, 512
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = 3
    model.save_pretrained(folder)
    return folder


def test_a_run_says_so_and_goes_on_so(hybrid: Path, tmp_path: Path, capsys: Any) -> None:
    data = write_data(tmp_path / "data.jsonl", 12)
    words = f"--model {hybrid} --dataset {data} --batch_size 4 --max_steps 4 --save_steps 2"
    words += " --val_size 2 --lora_dropout 0.1 --micro_batch_size 3"
    whole = tmp_path / "whole"
    assert train(*words.split(), "--output_dir", str(whole)) == 0
    assert forward_choice.ONE_BY_ONE in " ".join(capsys.readouterr().out.split())
    state = json.loads((whole / "checkpoints" / "step-000002" / "state.json").read_text())
    assert (state["cut"]["examples"], state["cut"]["share"]) == (1, 0)
    steps = events(whole, "step")
    assert all(e["computed_tokens"] >= e["tokens"] - 4 * 3 for e in steps)  # nothing is shared
    # From the middle, and from a checkpoint of before, which packed.
    for cut in ({}, {"examples": 0, "share": 1}):
        again = tmp_path / f"again{len(cut)}"
        assert train(*words.split(), "--output_dir", str(again)) == 0
        later = checkpoints.all_of(again / "checkpoints")[-1]
        _forget(later)
        _rewrite(again / "checkpoints" / "step-000002", cut)
        assert train("--resume", str(again)) == 0
        assert same(weights(again), weights(whole))


def _forget(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder)


def _rewrite(checkpoint: Path, cut: dict[str, int]) -> None:
    path = checkpoint / "state.json"
    state = json.loads(path.read_text())
    state["cut"] |= cut
    path.write_text(json.dumps(state))


def test_the_plan_knows() -> None:
    from architectures_kit import config_of
    from vicuna.config import PlanSettings
    from vicuna.config import build as settings_of

    settings = settings_of(PlanSettings, {"model": "x", "cutoff_len": 64})
    device = devices.by_memory(4 << 30)
    for name, rows in (("qwen3_5_text", 64), ("glm4", 4096)):
        found = plan.make(settings, config_of(name), device)
        assert found.spec.tokens == rows
        assert ("one example at a time" in found.reason) == (rows == 64)


# -- mixtures of experts ----


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "phimoe"])
def test_all_on_a_mixture_is_a_plain_lora(name: str, tmp_path: Path) -> None:
    from vicuna.model.adapter import attach_saved, read_adapter, save

    model = build(name)
    assert "experts" in lora_targets.words(model)
    peft = attach(model, LoraSettings(rank=4), seed=1)
    config = peft.peft_config["default"]
    assert not config.target_parameters
    save(peft, tmp_path, {})
    attach_saved(build(name), read_adapter(str(tmp_path)))
    for refused in lora_targets.left_out(build(name)):
        with pytest.raises(UserError, match=r"cannot have an adapter|no layer of this model"):
            attach(build(name), LoraSettings(rank=4, target=(refused,)), seed=1)
