"""The precisions that a base's frozen weights can have: one table, without PyTorch.

A further quantisation is a row here, its name in `PrecisionName`, its dequantizer (`model.linear`)
and the storage that it takes (`memory.meta_layers`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from vicuna.messages import Message

# The types of weights that are not quantised, and all precisions, as settings take them.
FloatName = Literal["auto", "fp32", "bf16", "fp16"]
PrecisionName = Literal["auto", "fp32", "bf16", "fp16", "int8", "nf4"]


@dataclass(frozen=True)
class Precision:
    """How the frozen weights of a base are held.

    bits: of a weight. dtype: torch's name of the type; "" if the weights are quantised, and what is
    not (embedding, norms, activations) then has the fastest type of the device. loads: arguments of
    transformers' BitsAndBytesConfig. gguf, vllm: what the engines of llama.cpp and vLLM call it; ""
    if they have no such thing.
    """

    name: str
    bits: int
    dtype: str = ""
    loads: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    gguf: str = ""
    vllm: str = ""

    @property
    def is_quantized(self) -> bool:
        """Whether weights are codes with scales, which a product dequantises first."""
        return not self.dtype


PRECISIONS = {
    p.name: p
    for p in (
        Precision("fp32", 32, "float32", gguf="f32", vllm="float32"),
        Precision("bf16", 16, "bfloat16", gguf="bf16", vllm="bfloat16"),
        Precision("fp16", 16, "float16", gguf="f16", vllm="float16"),
        Precision("int8", 8, loads={"load_in_8bit": True}, gguf="q8_0"),
        Precision(
            "nf4",
            4,
            loads={
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
            },
        ),
    )
}
# From the largest to the smallest.
QUANTIZED = tuple(p.name for p in PRECISIONS.values() if p.is_quantized)
SMALLEST = min(PRECISIONS.values(), key=lambda p: p.bits).name


def fastest_precision(
    device: str, kind: str, capability: tuple[int, int] = (0, 0), bf16: bool = False
) -> tuple[str, str]:
    """The fastest type for frozen weights on a device, and the reason in words.

    Args:
        device: its name, for the reason. kind: `cuda`, `mps` or `cpu`.
        capability: CUDA's compute capability. bf16: whether a CPU has bf16 instructions.
    """
    if kind == "cuda":
        name = f"{device} (compute capability {capability[0]}.{capability[1]})"
        if capability >= (8, 0):
            return "bf16", f"{name} has bf16 matrix units"
        if capability >= (7, 0):
            return "fp16", f"{name} has fp16 units, no bf16"
        return "fp32", f"{name} has no fast 16-bit type"
    if kind == "mps":
        return "fp16", "Apple's GPU: fp16 halves the memory"
    if bf16:
        return "bf16", f"{device} has bf16 instructions"
    return "fp32", f"{device} has no bf16 instructions"


def share_of_memory(precision: str, smaller: str) -> str:
    """What a base takes in one precision, as a share of another, in words: `a quarter`."""
    ratio = PRECISIONS[precision].bits // PRECISIONS[smaller].bits
    return {2: "half", 4: Message("a quarter"), 8: Message("an eighth")}.get(ratio, f"1/{ratio}")
