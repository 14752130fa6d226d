"""A packed step has the loss and gradients of its examples run one by one through plain PEFT."""

from __future__ import annotations

import pytest
import torch

from parity_kit import (
    END,
    by_the_book,
    furthest,
    make,
    make_examples,
    packed,
    taken,
)
from vicuna.data.loss_mask import Example, targets_of
from vicuna.data.pack import build_packs, padded
from vicuna.model import dropout

CUTS = [(10_000, 0, True), (150, 0, True), (90, 3, True), (10_000, 8, False), (10_000, 1, True)]


@pytest.mark.parametrize("family", ["llama, grouped, tied", "gemma2, capped scores"])
def test_packing_is_exact_however_it_is_cut(family: str) -> None:
    """Ours and transformers' forward; every family and path is in tests/model/test_parity.py."""
    trainable, examples = make(family), make_examples()
    loss, wanted = by_the_book(trainable.model, examples)
    for cut in CUTS:
        packed_loss, found = packed(trainable, examples, *cut)
        assert packed_loss == pytest.approx(loss, rel=1e-5)
        assert furthest(found, wanted) < 1e-5


@pytest.mark.parametrize("family", ["llama, grouped, tied", "gemma2, capped scores"])
def test_what_packs_are_filled_up_with_teaches_nothing(family: str) -> None:
    trainable, examples = make(family), make_examples()
    loss, wanted = packed(trainable, examples, 150)
    packs = [padded(p, 64) for p in build_packs(examples, END, 150)]
    assert all(len(p.ids) % 64 == len(p.target_rows) % 64 == 0 for p in packs)
    found = trainable.backward(packs, sum(p.supervised for p in packs))
    assert found == pytest.approx(loss, rel=1e-6)
    assert furthest(taken(trainable.model), wanted) < 1e-5


def test_prefix_dropout_does_not_depend_on_the_packing() -> None:
    trainable, examples = make("llama, grouped, tied"), make_examples()
    trainable.dropout.seed, trainable.dropout.step = 3, 5
    dropout.install(trainable.model, 0.3, trainable.dropout)
    trainable.model.train()
    loss, wanted = packed(trainable, examples, 10_000, 1, False)
    for cut in CUTS:
        packed_loss, found = packed(trainable, examples, *cut)
        assert packed_loss == pytest.approx(loss, rel=1e-5)
        assert furthest(found, wanted) < 1e-5
    trainable.dropout.step = 6
    _, other = packed(trainable, examples, 10_000)
    assert furthest(other, wanted) > 1e-2


def test_dropout_keeps_the_share_it_should() -> None:
    state = dropout.DropoutState(seed=1, step=2, rows=torch.arange(400)[None])
    layer = dropout.PrefixDropout(0.3, 0, state).train()
    kept = layer(torch.ones(1, 400, 256))
    assert float((kept > 0).float().mean()) == pytest.approx(0.7, abs=0.01)
    assert float(kept.mean()) == pytest.approx(1.0, abs=0.02)
    assert torch.equal(layer.eval()(torch.ones(1, 400, 4)), torch.ones(1, 400, 4))


def test_evaluation_has_the_loss_of_training() -> None:
    trainable, examples = make("llama, grouped, tied"), make_examples()
    loss, _ = by_the_book(trainable.model, examples)
    trainable.packed_attention()
    found, count = trainable.mean_loss(build_packs(examples, END, 200))
    assert found == pytest.approx(loss, rel=1e-5)
    assert count == sum(len(targets_of(e, END)[0]) for e in examples)


@pytest.mark.parametrize("family", ["llama, grouped, tied", "mistral, sliding window", "gemma3"])
def test_a_changed_example_changes_no_others_gradient_behind_a_shared_prefix(family: str) -> None:
    trainable, examples = make(family), make_examples()
    changed = Example(examples[0].ids.copy(), examples[0].labels)
    changed.ids[25:] = (changed.ids[25:] + 7) % 190 + 3
    rest = []
    for first in (examples[0], changed):
        together = packed(trainable, [first, *examples[1:]], 10_000)[1]
        alone = packed(trainable, [first], 10_000)[1]
        counts = [sum(len(targets_of(e, END)[0]) for e in es) for es in ([first], examples)]
        rest.append({k: together[k] - alone[k] * (counts[0] / counts[1]) for k in together})
    assert furthest(rest[0], rest[1]) < 1e-4


def test_a_loss_scale_only_scales_the_gradient() -> None:
    trainable, examples = make("llama, grouped, tied"), make_examples()
    loss, wanted = packed(trainable, examples, 10_000)
    packs = build_packs(examples, END, 10_000)
    assert trainable.backward(packs, sum(p.supervised for p in packs), 8.0) == pytest.approx(loss)
    assert furthest({k: g / 8 for k, g in taken(trainable.model).items()}, wanted) < 1e-6


@pytest.mark.parametrize("family", ["llama, grouped, tied", "gemma2, capped scores"])
def test_plain_attention_is_what_the_model_was_loaded_with(family: str) -> None:
    trainable = make(family)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        before = trainable.model(ids).logits
        trainable.packed_attention()
        trainable.plain_attention()
        assert torch.equal(trainable.model(ids).logits, before)
