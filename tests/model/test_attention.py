"""Every attention backend gives each example what it would get alone, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vicuna.data.pack import PackSegment
from vicuna.model import attention, attention_cpu
from vicuna.model.attention_layout import AttentionShape, PackLayout

# A tree: a preamble, two examples behind it, one of them with two endings, and one on its own.
TREE = [
    PackSegment(0, 20),
    PackSegment(20, 33, ((0, 20),)),
    PackSegment(33, 50, ((0, 20),)),
    PackSegment(50, 57, ((0, 20), (33, 50))),
    PackSegment(57, 70, ((0, 20), (33, 50))),
    PackSegment(70, 90),
]
FLAT = [PackSegment(0, 20), PackSegment(20, 57), PackSegment(57, 90)]
SHAPES = {
    "every head its own": AttentionShape(4, 4, 8, 0.4, None),
    "grouped": AttentionShape(4, 2, 8, 0.3, None),
    "grouped, window": AttentionShape(4, 2, 16, 0.25, 11),
    "grouped, window shorter than the filling": AttentionShape(4, 2, 16, 0.25, 2),
}


def by_hand(qkv: Tensor, heads: AttentionShape, segments: list[PackSegment]) -> Tensor:
    """Softmax attention of each path of the tree by itself."""
    split = qkv.view(len(qkv), -1, heads.size).transpose(0, 1)
    q, k, v = split.split([heads.query, heads.key, heads.key])
    k, v = (t.repeat_interleave(heads.query // heads.key, 0) for t in (k, v))
    parts = []
    for s in segments:
        rows = torch.cat([torch.arange(a, b) for a, b in (*s.above, (s.start, s.stop))])
        own = s.stop - s.start
        scores = q[:, s.start : s.stop] @ k[:, rows].transpose(1, 2) * heads.scale
        back = torch.arange(len(rows))[-own:, None] - torch.arange(len(rows))[None]
        wrong = (back < 0) | (back >= (heads.window or 10_000))
        parts.append(F.softmax(scores.masked_fill(wrong, -torch.inf), -1) @ v[:, rows])
    return torch.cat(parts, 1).transpose(0, 1).flatten(1)


def flex(qkv: Tensor, heads: AttentionShape, layout: PackLayout) -> Tensor:
    return attention.flex(*parts(qkv, heads), heads, layout).flatten(1)


def one_by_one(qkv: Tensor, heads: AttentionShape, layout: PackLayout) -> Tensor:
    return attention.segments(*parts(qkv, heads), heads, layout).flatten(1)


def parts(qkv: Tensor, heads: AttentionShape) -> Any:
    split = qkv.unflatten(1, (-1, heads.size))
    return split.split([heads.query, heads.key, heads.key], 1)


BACKENDS = {
    "cpu": attention.attend, "blocks": attention.attend, "segments": one_by_one, "flex": flex
}  # fmt: skip


@pytest.fixture(autouse=True)
def short_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What bf16 takes on a CPU, in any type, and in blocks shorter than the segments."""
    if "blocks" in request.node.name:
        monkeypatch.setattr(attention_cpu, "in_blocks", lambda _: True)
        monkeypatch.setattr(attention_cpu, "BLOCK", 8)
        monkeypatch.setattr(attention_cpu, "PAD_MULTIPLE", 4)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("segments", [TREE, FLAT], ids=["tree", "flat"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_equals_attention_by_hand(
    backend: str, shape: str, segments: list[PackSegment]
) -> None:
    heads = SHAPES[shape]
    if backend == "flex" and heads.size < 16:
        heads = AttentionShape(heads.query, heads.key, 16, heads.scale, heads.window)
    torch.manual_seed(0)
    given = torch.randn(90, heads.width)
    weight = torch.randn(90, heads.query * heads.size)
    results = []
    backward = backend != "flex"  # FlexAttention has none on CPUs
    for run in (
        lambda x: BACKENDS[backend](x, heads, PackLayout(segments)),
        lambda x: by_hand(x, heads, segments),
    ):
        x = given.clone().requires_grad_(backward)
        y = run(x)
        if backward:
            (y * weight).sum().backward()
        results.append((y.detach(), x.grad if backward else y.detach()))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_example_reaches_another(backend: str) -> None:
    heads = AttentionShape(4, 2, 16, 0.3, None)
    torch.manual_seed(0)
    given = torch.randn(90, heads.width)
    changed = given.clone()
    changed[50:57] = torch.randn(7, heads.width)
    one, two = (BACKENDS[backend](x, heads, PackLayout(TREE)) for x in (given, changed))
    same = torch.ones(90, dtype=torch.bool)
    same[50:57] = False
    assert torch.equal(one[same], two[same])
    assert not torch.allclose(one[~same], two[~same])
    if backend == "flex":
        return
    # Nor does a gradient come back from one example to another.
    x = given.clone().requires_grad_()
    BACKENDS[backend](x, heads, PackLayout(TREE))[57:70].sum().backward()
    assert x.grad is not None
    assert not x.grad[20:33].any()
    assert not x.grad[50:57].any()
    assert not x.grad[70:].any()
    assert x.grad[33:50].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_on_the_cpu_is_as_near_as_bf16_can_be(shape: str) -> None:
    heads = SHAPES[shape]
    torch.manual_seed(0)
    given = torch.randn(90, heads.width).bfloat16()
    weight = torch.randn(90, heads.query * heads.size)
    results = []
    for run, dtype in ((BACKENDS["cpu"], torch.bfloat16), (None, torch.float64)):
        x = given.clone().to(dtype).requires_grad_()
        y = run(x, heads, PackLayout(TREE)) if run else by_hand(x, heads, TREE)
        (y * weight.to(dtype)).sum().backward()
        assert x.grad is not None
        results.append(torch.cat([y.detach().double(), x.grad.double()], 1))
    found, wanted = results
    assert (found - wanted).norm() < 8e-3 * wanted.norm()


def test_on_the_cpu_and_old_gpus_segments_are_computed_one_by_one() -> None:
    layout = PackLayout(TREE)
    assert attention.choose_backend(torch.device("cpu"), torch.float32, layout) == "segments"
    starts, longest = PackLayout(FLAT).boundaries(torch.device("cpu"))
    assert starts.tolist() == [0, 20, 57, 90]
    assert longest == 37


@pytest.mark.parametrize(
    ("capability", "segments", "dtype", "wanted"),
    [
        ((7, 5), FLAT, torch.float16, "segments"),
        ((8, 6), FLAT, torch.bfloat16, "varlen"),
        ((8, 6), FLAT, torch.float32, "flex"),
        ((9, 0), TREE, torch.bfloat16, "flex"),
    ],
)
def test_the_backend_follows_the_chip_and_the_pack(
    capability: tuple[int, int],
    segments: list[PackSegment],
    dtype: torch.dtype,
    wanted: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(attention, "_has_triton", lambda: True)
    assert attention.choose_backend(torch.device("cuda"), dtype, PackLayout(segments)) == wanted
