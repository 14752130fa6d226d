"""A packed step has the loss and gradients of its examples run one by one through plain PEFT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vicuna.data.encode import END_TOKEN, NEXT_TOKEN, Example
from vicuna.data.pack import build_packs, targets_of
from vicuna.model import dropout, fused
from vicuna.model.adapter import LoraSettings, attach
from vicuna.train.step import Learner

END = 1
SHAPE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
    "pad_token_id": 0,
}
GEMMA = {"head_dim": 12, "sliding_window": 16, "query_pre_attn_scalar": 12, "num_hidden_layers": 4}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, every head its own": ("LlamaConfig", {"num_key_value_heads": 4}),
    "llama, grouped, tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2, biases": ("Qwen2Config", {}),
    "qwen3, norms of q and k": ("Qwen3Config", {"head_dim": 12}),
    "mistral, sliding window": ("MistralConfig", {"sliding_window": 16}),
    "gemma2, capped scores": ("Gemma2Config", GEMMA),
    "gemma3": ("Gemma3TextConfig", {**GEMMA, "num_hidden_layers": 6}),
}


def make(family: str, dtype: torch.dtype = torch.float32, rank: int = 4) -> Learner:
    import transformers

    name, changes = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**SHAPE, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    model.requires_grad_(False)
    peft = attach(model, LoraSettings(rank=rank), seed=1)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return Learner(peft, torch.device("cpu"))


def make_examples(seed: int = 0) -> list[Example]:
    """Examples that share a preamble, some more than that, one twice, one with a silent end."""
    rng = np.random.default_rng(seed)
    preamble = rng.integers(3, 200, 20)
    examples: list[Example] = []
    for i in range(7):
        middle = examples[-1].ids[20:45] if i in (3, 5) else rng.integers(3, 200, 5 + 4 * i)
        tail = rng.integers(3, 200, rng.integers(5, 30))
        ids = np.concatenate([preamble, middle, tail]).astype(np.int32)
        labels = np.where(rng.random(len(ids)) < 0.5, NEXT_TOKEN, 0).astype(np.uint8)
        labels[:22] = 0
        labels[-1] = 0
        labels[-3] = END_TOKEN
        examples.append(Example(ids, labels))
    return [*examples, examples[2]]


def one_by_one(learner: Learner, examples: list[Example]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients by the book: plain forward, full logits, cross-entropy in fp64."""
    learner.decoder.config._attn_implementation = "eager"
    total: Any = 0.0
    count = 0
    for example in examples:
        where, wanted = targets_of(example, END)
        ids = torch.from_numpy(example.ids.astype(np.int64))[None]
        logits = learner.model(input_ids=ids).logits[0, torch.from_numpy(where)]
        total = total + F.cross_entropy(logits.double(), torch.from_numpy(wanted), reduction="sum")
        count += len(where)
    (total / count).backward()
    return float(total.detach() / count), gradients(learner)


def packed(learner: Learner, examples: list[Example], *cut: Any) -> tuple[float, dict[str, Any]]:
    learner.packed_attention()
    packs = build_packs(examples, END, *cut)
    supervised = sum(p.supervised for p in packs)
    return learner.backward(packs, supervised), gradients(learner)


def gradients(learner: Learner) -> dict[str, torch.Tensor]:
    taken = {}
    for name, parameter in learner.parameters.items():
        assert parameter.grad is not None
        taken[name], parameter.grad = parameter.grad, None
    return taken


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest relative error of any parameter's gradient."""
    return max(float((a[k] - b[k]).norm() / b[k].norm()) for k in b)


# Six layers of large normalised activations: fp32 itself is off by more here, packed or not.
TOLERANCE = {"gemma3": 3e-5}
CUTS = [(10_000, 0, True), (150, 0, True), (90, 3, True), (10_000, 8, False), (10_000, 1, True)]


@pytest.mark.parametrize("use_fused", [False, True], ids=["peft layers", "fused layers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packing_is_exact(family: str, use_fused: bool) -> None:
    learner, examples = make(family), make_examples()
    loss, wanted = one_by_one(learner, examples)
    if use_fused:
        count, others = fused.install(learner.model)
        assert count == len(wanted) // 2
        assert not others
    for cut in CUTS:
        packed_loss, found = packed(learner, examples, *cut)
        assert packed_loss == pytest.approx(loss, rel=1e-5)
        assert furthest(found, wanted) < TOLERANCE.get(family, 1e-5)


def test_gradient_checkpointing_changes_nothing() -> None:
    learner, examples = make("llama, grouped, tied"), make_examples()
    _, wanted = one_by_one(learner, examples)
    learner.model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    learner.model.train()
    assert furthest(packed(learner, examples, 10_000)[1], wanted) < 1e-5


def test_a_bf16_base_agrees_with_itself() -> None:
    learner, examples = make("llama, grouped, tied", torch.bfloat16), make_examples()
    loss, wanted = one_by_one(learner, examples)
    fused.install(learner.model)
    packed_loss, found = packed(learner, examples, 10_000)
    assert packed_loss == pytest.approx(loss, rel=1e-2)
    assert furthest(found, wanted) < 0.1


@pytest.mark.parametrize("family", ["llama, grouped, tied", "mistral, sliding window"])
def test_no_example_sees_another(family: str) -> None:
    """Changing one example changes no hidden state of any other, to the bit."""
    learner, examples = make(family), make_examples()
    learner.packed_attention()

    def rows_of_others(changed: Callable[[Example], Example]) -> torch.Tensor:
        packs = build_packs([*examples[:6], changed(examples[6])], END, 10_000, 0, False)
        (pack,) = packs
        from vicuna.model.attention import Layout

        hidden = learner.decoder(
            input_ids=torch.from_numpy(pack.ids)[None],
            position_ids=torch.from_numpy(pack.positions)[None],
            use_cache=False,
            packed=Layout(pack.segments),
        ).last_hidden_state[0]
        kept = [
            hidden[s.start : s.stop]
            for s in pack.segments
            if not np.array_equal(pack.ids[s.start : s.stop][:40], changed(examples[6]).ids[:40])
        ]
        return torch.cat(kept)

    def other(example: Example) -> Example:
        ids = example.ids.copy()
        ids[20:] = (ids[20:] + 7) % 190 + 3
        return Example(ids, example.labels)

    with torch.no_grad():
        before, after = rows_of_others(lambda e: e), rows_of_others(other)
    # The order of segments in a pack may change with the content; as sets they must be equal.
    assert sorted(before.sum(1).tolist()) == pytest.approx(sorted(after.sum(1).tolist()), abs=1e-5)


def test_prefix_dropout_does_not_depend_on_the_packing() -> None:
    learner, examples = make("llama, grouped, tied"), make_examples()
    learner.dropout.seed, learner.dropout.step = 3, 5
    dropout.install(learner.model, 0.3, learner.dropout)
    learner.model.train()
    loss, wanted = packed(learner, examples, 10_000, 1, False)
    for cut in CUTS:
        packed_loss, found = packed(learner, examples, *cut)
        assert packed_loss == pytest.approx(loss, rel=1e-5)
        assert furthest(found, wanted) < 1e-5
    learner.dropout.step = 6
    assert packed(learner, examples, 10_000)[0] != pytest.approx(loss, rel=1e-4)


def test_dropout_keeps_the_share_it_should() -> None:
    state = dropout.DropoutState(seed=1, step=2, rows=torch.arange(400)[None])
    layer = dropout.PrefixDropout(0.3, 0, state).train()
    kept = layer(torch.ones(1, 400, 256))
    assert float((kept > 0).float().mean()) == pytest.approx(0.7, abs=0.01)
    assert float(kept.mean()) == pytest.approx(1.0, abs=0.02)
    assert torch.equal(layer.eval()(torch.ones(1, 400, 4)), torch.ones(1, 400, 4))


def test_evaluation_has_the_loss_of_training() -> None:
    learner, examples = make("llama, grouped, tied"), make_examples()
    loss, _ = one_by_one(learner, examples)
    learner.packed_attention()
    found, count = learner.mean_loss(build_packs(examples, END, 200))
    assert found == pytest.approx(loss, rel=1e-5)
    assert count == sum(len(targets_of(e, END)[0]) for e in examples)


@pytest.mark.parametrize("family", ["llama, grouped, tied", "mistral, sliding window", "gemma3"])
def test_a_changed_example_changes_no_others_gradient_behind_a_shared_prefix(family: str) -> None:
    learner, examples = make(family), make_examples()
    changed = Example(examples[0].ids.copy(), examples[0].labels)
    changed.ids[25:] = (changed.ids[25:] + 7) % 190 + 3
    rest = []
    for first in (examples[0], changed):
        together = packed(learner, [first, *examples[1:]], 10_000)[1]
        alone = packed(learner, [first], 10_000)[1]
        counts = [sum(len(targets_of(e, END)[0]) for e in es) for es in ([first], examples)]
        rest.append({k: together[k] - alone[k] * (counts[0] / counts[1]) for k in together})
    assert furthest(rest[0], rest[1]) < 1e-4


@pytest.mark.parametrize("family", ["llama, grouped, tied", "gemma2, capped scores"])
@pytest.mark.parametrize("use_fused", [False, True], ids=["peft layers", "fused layers"])
def test_checkpointing_goes_with_every_layer_and_family(family: str, use_fused: bool) -> None:
    learner, examples = make(family), make_examples(2)
    loss, wanted = one_by_one(learner, examples)
    learner.model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    learner.model.train()
    if use_fused:
        fused.install(learner.model)
    packed_loss, found = packed(learner, examples, 200)
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    assert furthest(found, wanted) < 1e-5


def test_a_loss_scale_only_scales_the_gradient() -> None:
    learner, examples = make("llama, grouped, tied"), make_examples()
    loss, wanted = packed(learner, examples, 10_000)
    packs = build_packs(examples, END, 10_000)
    assert learner.backward(packs, sum(p.supervised for p in packs), 8.0) == pytest.approx(loss)
    assert furthest({k: g / 8 for k, g in gradients(learner).items()}, wanted) < 1e-6


@pytest.mark.parametrize("family", ["llama, grouped, tied", "gemma2, capped scores"])
def test_plain_attention_is_what_the_model_was_loaded_with(family: str) -> None:
    learner = make(family)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        before = learner.model(ids).logits
        learner.packed_attention()
        learner.plain_attention()
        assert torch.equal(learner.model(ids).logits, before)
