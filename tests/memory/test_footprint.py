"""Few layers tell of many, exactly; quantised bases, attention kernels and allocators as they are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kit import config_of
from vicuna.config.checkpointing import LEVELS, CheckpointingLevel
from vicuna.memory import devices
from vicuna.memory.allocator import CachingAllocator, rounded
from vicuna.memory.emulate_device import EmulatedAttention, QuantizedStandIn, kernel_of
from vicuna.memory.footprint import PARTS, Planner
from vicuna.memory.model_shapes import config_of as shape
from vicuna.memory.traced_step import Step, StepSpec, shortened, worst_pack
from vicuna.memory.tracker import Tracker, full_peak

MIB = devices.MIB
JOB = StepSpec("bf16", "none", tokens=600, longest=256)


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("checkpointing", "device", "precision", "layers"),
    [
        ("none", "RTX 3090", "bf16", 12),
        ("selective", "RTX 2080 Ti", "nf4", 6),
        ("full", "cpu", "fp32", 12),
        ("offload", "RTX 3090", "bf16", 6),
    ],
)
def test_few_layers_tell_of_many(
    checkpointing: str, device: str, precision: str, layers: int
) -> None:
    config = config_of("qwen2", num_hidden_layers=layers)
    job = replace(JOB, checkpointing=checkpointing, precision=precision)
    planner = Planner(config, devices.by_name(device))
    footprint = planner.footprint(job)
    assert max(depth for *_, depth in planner._steps) <= 4, "the whole depth was traced"
    whole = Step(config, job, planner.device).trace(worst_pack(job))
    assert footprint.allocated == full_peak(whole, planner.device.kind).sum()


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])  # our forward, and transformers' own
@pytest.mark.parametrize("device", ["P40", "RTX 2080 Ti", "RTX 3090", "cpu"])
@pytest.mark.parametrize("checkpointing", LEVELS)
def test_every_level_is_planned_for_every_generation(
    checkpointing: CheckpointingLevel, device: str, family: str
) -> None:
    """What backward computes again must take the kernels that forward took."""
    job = StepSpec("fp32" if device == "cpu" else "fp16", checkpointing, tokens=96, longest=64)
    planner = Planner(config_of(family, num_hidden_layers=3), devices.by_name(device))
    assert planner.footprint(job).peak > 0


def test_on_a_cpu_nothing_is_won_by_the_hosts_memory() -> None:
    planner = Planner(config_of("llama", num_hidden_layers=4), devices.cpu(1 << 30))
    job = StepSpec("fp32", "full", tokens=64, longest=64)
    assert planner.footprint(replace(job, checkpointing="offload")) == planner.footprint(job)


def test_layers_of_several_kinds_are_all_traced() -> None:
    config = config_of("gemma3")
    planner = Planner(config, devices.by_name("T4"))
    planner.footprint(replace(JOB, precision="fp16", tokens=64, longest=64))
    assert [layers for *_, layers in planner._steps] == [6]


def test_parts_add_up_and_weights_are_the_models() -> None:
    config = shortened(shape("llama-7b"), 6)
    footprint = Planner(config, devices.by_name("A100 80GB")).footprint(replace(JOB, tokens=256))
    assert tuple(footprint.parts) == PARTS
    assert sum(footprint.parts.values()) == footprint.peak
    layer = 4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096
    weights = 2 * (6 * layer + 2 * 32000 * 4096 + 4096)
    assert footprint.parts["base"] == pytest.approx(weights, rel=1e-4)
    lora = 4 * 8 * 6 * (4 * 8192 + 3 * (4096 + 11008))
    assert footprint.parts["adapters"] == footprint.parts["gradients"] == lora
    assert footprint.parts["optimizer"] == pytest.approx(2 * lora, rel=1e-3)


def test_more_tokens_need_more_and_checkpointing_less() -> None:
    planner = Planner(shortened(shape("llama-2-7b"), 5), devices.by_name("4090"))
    peaks = [
        planner.footprint(replace(JOB, tokens=1024, longest=512, checkpointing=c)).peak
        for c in ("none", "selective", "full", "offload")
    ]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 4
    assert planner.footprint(replace(JOB, tokens=2048, longest=512)).peak > peaks[0]


# -- quantised bases -----------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_stand_ins_have_the_sizes_of_bitsandbytes(precision: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    if precision == "nf4":
        real = bnb.nn.Linear4bit(640, 256, False, torch.float32, True, "nf4")
        real.load_state_dict({"weight": torch.randn(256, 640)})
        real.to("cpu")
        state = real.weight.quant_state
        wanted = [real.weight, state.absmax, state.state2.absmax, state.code, state.state2.code]
        wanted.append(state.offset)
    else:
        real = bnb.nn.Linear8bitLt(640, 256, False, has_fp16_weights=False)
        real.load_state_dict({"weight": torch.randn(256, 640)})
        real.to("cpu")
        wanted = [real.weight.CB, real.weight.SCB]
    stand_in = QuantizedStandIn(640, 256, None, precision)
    tensors = [*stand_in.parameters(), *stand_in.buffers()]
    sizes = sorted(t.untyped_storage().nbytes() for t in tensors)
    assert sizes == sorted(t.untyped_storage().nbytes() for t in wanted)


def test_8_bit_moments_are_a_quarter() -> None:
    planner = Planner(shortened(shape("llama-7b"), 3), devices.by_name("3090"))
    job = replace(JOB, tokens=64, longest=64)
    plain = planner.footprint(job).parts
    small = planner.footprint(replace(job, optimizer="paged_adamw_8bit")).parts
    assert small["optimizer"] == pytest.approx(plain["optimizer"] * (1 + 4 / 256) / 4, rel=0.02)
    assert small["adapters"] == plain["adapters"]


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_a_stand_in_keeps_no_dense_weight_and_gives_a_gradient(precision: str) -> None:
    layer = QuantizedStandIn(512, 1024, None, precision)
    tracker = Tracker("meta")
    with tracker:
        x = meta(4, 512).requires_grad_()
        y = layer(x)
        dense = 2 * 512 * 1024
        assert sum(n for _, n, _ in tracker.trace.events) < dense
        y.sum().backward()
    assert y.shape == (4, 1024)
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert any(n == dense for _, n, _ in tracker.trace.events), "backward dequantises"


# -- attention -----------------------------------------------------------------------------------


def test_which_kernel_a_device_has() -> None:
    q, k, mask = meta(1, 8, 64, 32), meta(1, 2, 64, 32), meta(64, 64, dtype=torch.bool)
    ampere, turing = devices.by_name("3090"), devices.by_name("2080Ti")
    assert kernel_of(ampere, q, k, None) == "flash"
    assert kernel_of(ampere, q, q, mask) == "efficient"
    assert kernel_of(turing, q, q, None) == "efficient"
    assert kernel_of(turing, q, k, None) == "math"
    assert kernel_of(ampere, q.float(), q.float(), None) == "efficient"
    assert kernel_of(devices.cpu(1 << 30), q, k, mask) == "cpu"


@pytest.mark.parametrize(("device", "square"), [("2080Ti", False), ("cpu", False)])
def test_no_score_for_each_pair(device: str, square: bool) -> None:
    rows, heads = 1024, 4
    tracker = Tracker("meta")
    with tracker:
        q, k, v = (meta(1, heads, rows, 32).requires_grad_() for _ in range(3))
        attend = EmulatedAttention(devices.by_name(device)).attend
        attend(q, k, v, is_causal=True).sum().backward()
    largest = max(n for _, n, _ in tracker.trace.events)
    assert (largest >= rows * rows) is square


# -- allocators ----------------------------------------------------------------------------------


def test_sizes_are_rounded_as_the_allocator_does() -> None:
    assert [rounded(n, "cuda") for n in (1, 512, 513)] == [512, 512, 1024]
    assert rounded(1, "cpu") == 1


def test_the_caching_allocator() -> None:
    allocator = CachingAllocator()
    allocator.allocate(0, 100)
    assert allocator.reserved == 2 * MIB, "small blocks are cut from 2 MiB"
    allocator.allocate(1, 2 * MIB)
    assert allocator.reserved == 22 * MIB, "middle ones from 20 MiB"
    allocator.allocate(2, 17 * MIB)
    assert allocator.reserved == 22 * MIB, "what is left of them is used"
    allocator.allocate(3, 31 * MIB)
    assert allocator.reserved == 54 * MIB, "large ones are rounded to 2 MiB"
    allocator.release(3)
    allocator.allocate(4, 30 * MIB)
    assert allocator.reserved == 54 * MIB, "freed ones are used again"
    for number in (1, 2):
        allocator.release(number)
    allocator.allocate(5, 20 * MIB)
    assert allocator.reserved == 54 * MIB, "neighbours merge"
    assert allocator.allocated == 50 * MIB + 512
