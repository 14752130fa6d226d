"""The tracker counts what is alive, and the plan's tensors without data count as real ones do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kit import config_of
from vicuna.data.pack import PackSegment
from vicuna.memory import devices
from vicuna.memory.traced_step import Step, StepSpec, begin, pack_of, run, worst_pack
from vicuna.memory.tracker import KINDS, Tracker, full_peak, without_collection
from vicuna.model import dropout
from vicuna.model.adapter import LoraSettings, attach
from vicuna.model.trainable import TrainableModel

CPU = devices.cpu(8 * devices.GIB)
JOB = StepSpec("fp32", "none", tokens=96, longest=40)


def live(tracker: Tracker) -> int:
    return sum(nbytes for _, nbytes, _ in tracker.trace.events)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_storages_are_counted_once_and_until_they_are_freed(device: str) -> None:
    tracker = Tracker(device)
    with tracker:
        a = torch.empty(100, device=device)
        view = a[10:]
        assert live(tracker) == 400
        b = a + 1
        a.mul_(2)
        torch.add(a, 1, out=b)
        assert live(tracker) == 800
        del a
        assert live(tracker) == 800, "a view keeps the storage"
        del view, b
    assert live(tracker) == 0
    assert max(np.cumsum([n for _, n, _ in tracker.trace.events])) == 800


def test_scores_over_the_vocabulary_are_the_losss() -> None:
    tracker = Tracker("meta", vocabulary=300)
    with tracker:
        kept = [torch.empty(5, 300, device="meta"), torch.empty(5, 299, device="meta")]
    assert [KINDS[k] for _, _, k in tracker.trace.events] == ["loss", "activations"]
    del kept


def test_values_of_nothing_are_zeros_and_leave_the_device() -> None:
    with Tracker("meta"):
        x = torch.empty(3, device="meta")
        assert x.sum().item() == 0
        assert x.cpu().device.type == "cpu"
        host = torch.empty(3)
        host.copy_(x)


def real_peak(config: Any, job: StepSpec, pack: Any) -> Any:
    """The same step with real tensors on the CPU."""
    from transformers import AutoModelForCausalLM

    tracker = Tracker("cpu", config.vocab_size)
    with without_collection(), tracker:
        model = AutoModelForCausalLM.from_config(config, dtype=job.dtype(CPU))
        model.requires_grad_(False)
        peft = attach(model, LoraSettings(job.rank, dropout=job.dropout, target=job.target), seed=0)
        trainable = TrainableModel(peft, torch.device("cpu"), checkpointing=job.checkpointing)  # type: ignore[arg-type]
        if job.dropout:
            dropout.install(peft, job.dropout, trainable.dropout)
        trainable.packed_attention()
        peft.train()
        parameters = list(trainable.parameters.values())
        optimizer = torch.optim.AdamW(parameters, foreach=False)
        for p in parameters:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        run(trainable, pack, optimizer, tracker.trace)  # buffers that only a first step makes
        begin(tracker, parameters, optimizer)
        run(trainable, pack, optimizer, tracker.trace)
    return full_peak(tracker.trace, "cpu")


SHARED = [PackSegment(0, 24), PackSegment(24, 60, ((0, 24),)), PackSegment(60, 96, ((0, 24),))]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"checkpointing": "selective", "rank": 3}),
        ("qwen2", {"checkpointing": "full"}),
        ("qwen3", {"target": ("q_proj", "v_proj")}),
        ("mistral", {"checkpointing": "full", "longest": 96}),
        ("llama-gqa-tied", {"precision": "bf16"}),
        ("llama", {"dropout": 0.1}),
        ("gemma2", {}),
    ],
)
def test_the_plan_is_what_real_tensors_take(family: str, changes: dict[str, Any]) -> None:
    job = replace(JOB, **changes)
    config = config_of(family)
    pack = worst_pack(job)
    planned = full_peak(Step(config, job, CPU).trace(pack), "cpu")
    real = real_peak(config, job, pack)
    assert planned.sum() == pytest.approx(real.sum(), rel=0.02)
    static = [KINDS.index(k) for k in ("gradients", "adapters")]
    assert list(planned[static]) == list(real[static])
    # The optimiser's counters of steps lie on the CPU, four bytes each.
    state = KINDS.index("optimizer")
    assert planned[state] == pytest.approx(real[state], rel=0.01)


def test_a_pack_with_shared_prefixes_needs_what_it_really_takes(tiny: Any) -> None:
    pack = pack_of(SHARED, np.arange(24, 96, 2))
    planned = full_peak(Step(tiny, JOB, CPU).trace(pack), "cpu")
    assert planned.sum() == pytest.approx(real_peak(tiny, JOB, pack).sum(), rel=0.02)


def test_a_step_can_be_traced_again_and_is_the_same(tiny: Any) -> None:
    step = Step(tiny, JOB, CPU)
    pack = worst_pack(JOB)
    first = step.trace(pack)
    second = step.trace(pack)
    assert [e[1:] for e in first.events[first.marks["begin"] :]] == [
        e[1:] for e in second.events[second.marks["begin"] :]
    ]
