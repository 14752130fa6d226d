"""Make tensors without data (`meta`) take the memory that they would take on a device.

Quantised linear layers have storages of the sizes that bitsandbytes makes, and dequantise into a
temporary where it does. Attention allocates what the device's kernel allocates: without this,
tensors without data take the path of plain matrix products, with a score for every pair of tokens.
Nothing global is changed, so that several plans can be made in one process.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vicuna.memory.devices import Device
from vicuna.model import attention
from vicuna.model.attention_layout import AttentionShape, PackLayout
from vicuna.model.linear import register_dequantizer
from vicuna.model.llama import Attend

# nf4 (QLoRA, arXiv 2305.14314, "double quantization"): one code of 8 bits for each 64 weights,
# and one fp32 scale for each 256 of those codes.
_BLOCK, _BLOCK_OF_BLOCKS = 64, 256


class QuantizedStandIn(nn.Linear):
    """A frozen linear layer whose storages have the sizes of its int8 or nf4 form.

    The shapes of input, output and gradients are those of a linear layer; backward keeps nothing
    of the output's or the dense weight's size.
    """

    scales: Tensor
    offset: Tensor

    def __init__(
        self, inputs: int, outputs: int, bias: Tensor | None, precision: str, device: str = "cuda"
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.precision = inputs, outputs, precision
        self.device_kind = device
        n = inputs * outputs
        make: Callable[..., Tensor] = lambda *s, dtype: torch.empty(*s, dtype=dtype, device="meta")  # noqa: E731
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, False))
        if precision == "int8":
            codes = make(outputs, inputs, dtype=torch.int8)
            self.register_buffer("scales", make(outputs, dtype=torch.float32))
        else:
            blocks = math.ceil(n / _BLOCK)
            codes = make(math.ceil(n / 2), 1, dtype=torch.uint8)
            self.register_buffer("scales", make(blocks, dtype=torch.uint8))
            of_blocks = math.ceil(blocks / _BLOCK_OF_BLOCKS)
            self.register_buffer("scales_of_scales", make(of_blocks, dtype=torch.float32))
            self.register_buffer("code", make(16, dtype=torch.float32))
            self.register_buffer("code_of_scales", make(256, dtype=torch.float32))
            self.register_buffer("offset", make((), dtype=torch.float32))
        self.weight = nn.Parameter(codes, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), differentiable in x."""
        result: Tensor = _Dequantized.apply(x, self)
        return result


def dense(layer: Any, dtype: torch.dtype) -> Tensor:
    """The weight (O, I) in `dtype`, made with the temporaries of `dequantized_weight`."""
    if layer.precision == "int8":
        return torch.mul(layer.weight.to(dtype), (layer.scales[:, None] / 127.0).to(dtype))
    scales = layer.scales.to(torch.float32)  # the scales dequantised
    scales = scales + layer.offset
    shape = (layer.out_features, layer.in_features)
    weight = torch.empty(shape, dtype=dtype, device="meta")
    del scales
    return weight


register_dequantizer("QuantizedStandIn", dense)


class _Dequantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedStandIn) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        if layer.precision == "int8" and layer.device_kind == "cpu":
            # No int8 products there: the weight is dequantised, in place.
            scales = layer.scales.unsqueeze(1).mul(1.0 / 127.0)
            return F.linear(x, layer.weight.to(x.dtype).mul_(scales), layer.bias)
        if layer.precision == "int8":
            # Inputs are quantised row by row; int8 products add up in int32.
            rows = x.reshape(-1, x.shape[-1]).to(torch.float16)
            quantised = (rows.to(torch.int8), rows.new_empty(rows.shape[0], dtype=torch.float32))
            sums = rows.new_empty((rows.shape[0], layer.out_features), dtype=torch.int32)
            result = sums.to(x.dtype).view(*x.shape[:-1], layer.out_features)
            del quantised
            return result
        return F.linear(x, dense(layer, x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0] @ dense(ctx.layer, ctx.dtype), None


def quantize(model: Any, precision: str, device: str) -> None:
    """Replace the linear layers that bitsandbytes would replace: all but the vocabulary head.

    Args:
        device: the kind of device that stands for, `cuda` or `cpu`.
    """
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not head:
                stand_in = QuantizedStandIn(
                    child.in_features, child.out_features, child.bias, precision, device
                )
                setattr(parent, name, stand_in)


# -- 8-bit AdamW ----------------------------------------------------------------------------------


class EightBitAdamW(torch.optim.Optimizer):
    """Has the state of bitsandbytes' 8-bit AdamW (arXiv 2110.02861): for each of two moments a byte
    a weight and a scale for each 256; fp32 for tensors below 4,096 elements. Updates in place."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make the state where it is missing."""
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state[p]:
                    self.state[p] = self._moments(p)

    def _moments(self, p: Tensor) -> dict[str, Tensor]:
        if p.numel() < 4096:
            return {f"moment{i}": torch.zeros_like(p) for i in (1, 2)}
        codes = {f"moment{i}": torch.zeros_like(p, dtype=torch.uint8) for i in (1, 2)}
        blocks = math.ceil(p.numel() / 256)
        scales = {f"scales{i}": p.new_zeros(blocks, dtype=torch.float32) for i in (1, 2)}
        return {**codes, **scales}


# -- attention -----------------------------------------------------------------------------------


class EmulatedAttention(TorchFunctionMode):
    """While it is active in a thread, PyTorch's attention on `meta` takes the memory of `device`'s
    kernel: flash attention, memory-efficient attention, or plain matrix products if the device has
    neither for these inputs.

    PyTorch's backward pass leaves such modes behind; what checkpointing computes again in it needs
    one of its own (`attend_as_on`, `recompute_as_on`)."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # types: unused, the interface's
        if func is F.scaled_dot_product_attention:
            return self.attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        **rest: Any,
    ) -> Tensor:
        """`F.scaled_dot_product_attention` as the device computes it."""
        kernel = kernel_of(self.device, query, key, attn_mask)
        if query.device.type != "meta" or kernel == "math":
            return F.scaled_dot_product_attention(query, key, value, attn_mask, **rest)
        if attn_mask is not None and attn_mask.dtype is torch.bool:
            attn_mask = attn_mask.to(query.dtype)  # as the kernels expect it
        return fused_attention(query, key, value, kernel, attn_mask)


def recompute_as_on(device: Device, causal: Any) -> None:
    """Let what a model of transformers computes again for backward take the kernels of `device`."""
    contexts = functools.partial(_checkpoint_contexts, device)
    causal.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})


def _checkpoint_contexts(device: Device) -> tuple[nullcontext[None], EmulatedAttention]:
    return nullcontext(), EmulatedAttention(device)


def attend_as_on(device: Device, attend: Attend) -> Attend:
    """`attend` of our own decoder with the kernels of `device`, in both passes."""

    def emulated(qkv: Tensor, shape: AttentionShape, layout: PackLayout) -> Tensor:
        with EmulatedAttention(device):
            if device.kind == "cpu":
                return attend(qkv, shape, layout)
            if device.capability < (8, 0):
                return attention.segments(*shape.split(qkv), shape, layout).flatten(1)
        # `varlen` and `flex`: one kernel for the whole pack, whatever its segments.
        q, k, v = (t.transpose(0, 1)[None] for t in shape.split(qkv))
        return fused_attention(q, k, v, "flash")[0].transpose(0, 1).flatten(1)

    return emulated


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, kernel: str, mask: Tensor | None = None
) -> Tensor:
    """query (B, H, T, D), key and value (B, K, S, D) -> (B, H, T, D), as the kernel of this name
    takes memory: flash, efficient, or cpu."""
    result: Tensor = _Attention.apply(query, key, value, mask, kernel)
    return result


def kernel_of(device: Device, query: Tensor, key: Tensor, mask: Tensor | None) -> str:
    """Which of PyTorch's kernels a device uses: flash, efficient, cpu, or math.

    As in PyTorch's choice (aten/native/transformers/cuda/sdp_utils.cpp): flash attention wants
    compute capability 8, 16 bits and no mask; memory-efficient attention knows no grouped queries.
    """
    grouped = query.shape[-3] != key.shape[-3]
    if device.kind == "cpu":
        return "cpu"
    half = query.dtype in (torch.float16, torch.bfloat16)
    if device.capability >= (8, 0) and half and mask is None and query.shape[-1] <= 256:
        return "flash"
    return "math" if grouped else "efficient"


class _Attention(torch.autograd.Function):
    """Keeps q, k, v, the output and a float32 for each row and head; never a score for each pair.

    Flash attention 2 (arXiv 2307.08691) and memory-efficient attention (arXiv 2112.05682).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kernel: str) -> Any:
        batch, heads, rows, _ = q.shape
        # Rows first, then heads, as the kernels lay it out.
        out = q.new_empty(batch, rows, heads, v.shape[-1]).transpose(1, 2)
        sums = q.new_empty(batch, heads, rows, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, mask, out, sums)
        ctx.kernel = kernel
        return out

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_, sums = ctx.saved_tensors
        products = torch.empty_like(sums)
        dq = torch.empty_like(q)
        wide = [torch.empty_like(q) if _expands(ctx.kernel, q, t) else None for t in (k, v)]
        on_gpu = ctx.kernel != "cpu" and q.dtype is not torch.float32
        summed = torch.empty_like(q, dtype=torch.float32) if on_gpu else None
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        del products, wide, summed
        return dq, dk, dv, None, None


def _expands(kernel: str, query: Tensor, key: Tensor) -> bool:
    """Flash attention makes the gradients of grouped keys and values for every query head first."""
    return kernel == "flash" and query.shape[-3] != key.shape[-3]
