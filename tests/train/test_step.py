"""A packed step equals its examples run one by one through plain transformers and PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kit import END, FAMILIES, VOCAB, random_examples, tiny_model, with_adapter
from vicuna.data.encode import Example
from vicuna.data.pack import build_packs, targets_of
from vicuna.model import dropout, fused
from vicuna.train.step import Learner

Gradients = dict[str, torch.Tensor]
CPU = torch.device("cpu")
CUTS = [(10_000, 0), (200, 0), (90, 3), (10_000, 1), (10_000, 8)]


def supervised(examples: Sequence[Example]) -> int:
    return sum(len(targets_of(e, END)[0]) for e in examples)


def gradients(learner: Learner) -> Gradients:
    found = {}
    for name, p in learner.parameters.items():
        assert p.grad is not None, name
        found[name] = p.grad.detach().clone()
        p.grad = None
    return found


def one_by_one(learner: Learner, examples: Sequence[Example]) -> tuple[float, Gradients]:
    """The mean loss and its gradients, each example through the whole model by itself."""
    learner.decoder.config._attn_implementation = "eager"
    n, total = supervised(examples), 0.0
    for e in examples:
        where, wanted = targets_of(e, END)
        ids = torch.from_numpy(e.ids.astype(np.int64))[None]
        logits = learner.model(input_ids=ids).logits[0, torch.from_numpy(where)]
        loss = F.cross_entropy(logits.double(), torch.from_numpy(wanted), reduction="sum") / n
        loss.backward()
        total += loss.item()
    return total, gradients(learner)


def packed(
    learner: Learner, examples: Sequence[Example], budget: int, most: int, share: bool
) -> tuple[float, Gradients]:
    learner.packed_attention()
    packs = build_packs(examples, END, budget, most, share)
    n = sum(p.supervised for p in packs)
    assert n == supervised(examples)
    return learner.backward(packs, n), gradients(learner)


def worst(found: Gradients, wanted: Gradients) -> float:
    """The largest relative difference of any parameter's gradient."""
    assert found.keys() == wanted.keys()
    return max(((found[k] - wanted[k]).norm() / wanted[k].norm()).item() for k in wanted)


@pytest.mark.parametrize("share", [True, False], ids=["shared", "unshared"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_step_equals_single_examples(family: str, share: bool) -> None:
    learner = Learner(with_adapter(tiny_model(family)), CPU)
    examples = random_examples()
    loss, wanted = one_by_one(learner, examples)
    for budget, most in CUTS:
        found_loss, found = packed(learner, examples, budget, most, share)
        assert found_loss == pytest.approx(loss, rel=1e-5)
        assert worst(found, wanted) < 1e-5, (budget, most)


@pytest.mark.parametrize("family", FAMILIES)
def test_so_does_the_fused_layer(family: str) -> None:
    learner = Learner(with_adapter(tiny_model(family)), CPU)
    examples = random_examples(1)
    loss, wanted = one_by_one(learner, examples)
    assert fused.install(learner.model)[1] == 0
    for budget, most in [(10_000, 0), (90, 3)]:
        found_loss, found = packed(learner, examples, budget, most, share=True)
        assert found_loss == pytest.approx(loss, rel=1e-5)
        assert worst(found, wanted) < 1e-5


@pytest.mark.parametrize("fuse", [False, True], ids=["peft", "fused"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_so_does_gradient_checkpointing(family: str, fuse: bool) -> None:
    learner = Learner(with_adapter(tiny_model(family)), CPU)
    examples = random_examples(2)
    loss, wanted = one_by_one(learner, examples)
    learner.model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    learner.model.train()
    if fuse:
        fused.install(learner.model)
    found_loss, found = packed(learner, examples, 200, 0, share=True)
    assert found_loss == pytest.approx(loss, rel=1e-5)
    assert worst(found, wanted) < 1e-5


@pytest.mark.parametrize("fuse", [False, True], ids=["peft", "fused"])
@pytest.mark.parametrize("family", ["llama-gqa-tied", "qwen2"])
def test_a_bf16_base_agrees_to_its_precision(family: str, fuse: bool) -> None:
    exact = Learner(with_adapter(tiny_model(family).bfloat16().float()), CPU)
    examples = random_examples(3)
    loss, wanted = one_by_one(exact, examples)
    learner = Learner(with_adapter(tiny_model(family).bfloat16()), CPU)
    assert all(p.dtype == torch.float32 for p in learner.parameters.values())
    if fuse:
        fused.install(learner.model)
    found_loss, found = packed(learner, examples, 200, 0, share=True)
    assert found_loss == pytest.approx(loss, rel=1e-2)
    assert worst(found, wanted) < 4e-2


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_no_example_sees_another(family: str) -> None:
    learner = Learner(with_adapter(tiny_model(family)), CPU)
    examples = random_examples(4)
    _, before = packed(learner, examples, 10_000, 0, share=True)
    alone_before = packed(learner, examples[:1], 10_000, 0, True)[1]
    other = Example(examples[0].ids.copy(), examples[0].labels)
    other.ids[30:] = (other.ids[30:] - 3 + 17) % (VOCAB - 3) + 3
    changed = [other, *examples[1:]]
    _, after = packed(learner, changed, 10_000, 0, share=True)
    alone_after = packed(learner, changed[:1], 10_000, 0, True)[1]
    share = supervised(examples[:1]) / supervised(examples)
    for name in before:
        rest_before = before[name] - alone_before[name] * share
        rest_after = after[name] - alone_after[name] * share
        torch.testing.assert_close(rest_before, rest_after, rtol=1e-4, atol=1e-6)


def test_a_changed_neighbour_changes_no_loss() -> None:
    learner = Learner(with_adapter(tiny_model("llama")), CPU)
    learner.packed_attention()
    first, second = random_examples(4)[:2]
    silent = Example(second.ids.copy(), second.labels.copy())
    silent.labels[:-5] = 0
    noisy = Example(silent.ids.copy(), silent.labels)
    noisy.ids[20:-5] = noisy.ids[20:-5][::-1]
    with torch.no_grad():
        sums = [
            learner.loss_sum(build_packs(pair, END, 10_000)[0]).item()
            - learner.loss_sum(build_packs(pair[1:], END, 10_000)[0]).item()
            for pair in ([first, silent], [first, noisy])
        ]
        alone = learner.loss_sum(build_packs([first], END, 10_000)[0]).item()
    assert sums == pytest.approx([alone, alone], rel=1e-5)


# -- dropout ----


def dropping(p: float = 0.3, seed: int = 5, step: int = 2) -> Learner:
    learner = Learner(with_adapter(tiny_model("llama")), CPU)
    dropout.install(learner.model, p, learner.dropout)
    fused.install(learner.model)
    learner.dropout.seed, learner.dropout.step = seed, step
    learner.model.train()
    return learner


@pytest.mark.parametrize(("budget", "most", "share"), [(10_000, 0, True), (90, 3, True)])
def test_dropout_does_not_depend_on_packing(budget: int, most: int, share: bool) -> None:
    learner = dropping()
    examples = random_examples(5)
    loss, wanted = packed(learner, examples, 10_000, 1, share=False)
    found_loss, found = packed(learner, examples, budget, most, share)
    assert found_loss == pytest.approx(loss, rel=1e-5)
    assert worst(found, wanted) < 1e-5


def test_dropout_differs_from_none_and_by_step_and_seed() -> None:
    examples = random_examples(5)
    changes: list[dict[str, Any]] = [{}, {"step": 3}, {"seed": 6}, {"p": 0.0}]
    losses = [packed(dropping(**c), examples, 10_000, 0, True)[0] for c in changes]
    assert len(set(losses)) == len(losses)
    assert losses[0] == packed(dropping(), examples, 10_000, 0, True)[0]


# -- evaluation ----


def test_mean_loss_is_the_steps_loss_without_dropout_or_gradient() -> None:
    examples = random_examples(6)
    learner = Learner(with_adapter(tiny_model("qwen3")), CPU)
    loss, _ = one_by_one(learner, examples)
    dropout.install(learner.model, 0.5, learner.dropout)
    learner.packed_attention()
    learner.model.train()
    mean, count = learner.mean_loss(build_packs(examples, END, 200))
    assert mean == pytest.approx(loss, rel=1e-5)
    assert count == supervised(examples)
    assert learner.model.training
    assert all(p.grad is None for p in learner.parameters.values())


def test_mean_loss_of_nothing_is_zero() -> None:
    assert Learner(with_adapter(tiny_model("llama")), CPU).mean_loss([]) == (0.0, 0)


def test_a_loss_scale_only_scales_the_gradient() -> None:
    learner = Learner(with_adapter(tiny_model("llama")), CPU)
    examples = random_examples(7)
    loss, wanted = packed(learner, examples, 10_000, 0, True)
    packs = build_packs(examples, END, 10_000)
    assert learner.backward(packs, supervised(examples), loss_scale=8.0) == pytest.approx(loss)
    found = {k: g / 8.0 for k, g in gradients(learner).items()}
    assert worst(found, wanted) < 1e-6


def test_parameters_are_the_adapters_alone_in_a_fixed_order() -> None:
    names = list(Learner(with_adapter(tiny_model("llama")), CPU).parameters)
    assert names == sorted(names)
    assert all("lora_" in n for n in names)
