"""Load a base: the type of its frozen weights, and the reason for it in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vicuna.config.precisions import PRECISIONS, PrecisionName, fastest_precision
from vicuna.errors import UserError
from vicuna.model import attention
from vicuna.model.base import silence_libraries
from vicuna.model.config_files import library_error
from vicuna.system_errors import install_extra
from vicuna.weights.read import check_weights


def dtype_of(precision: str, fastest: Callable[[], tuple[str, str]]) -> torch.dtype:
    """The type of activations, and of weights that are not quantised.

    Args:
        fastest: gives the fastest type of the device, which a quantised base computes in.
    """
    name = fastest()[0] if PRECISIONS[precision].is_quantized else precision
    dtype: torch.dtype = getattr(torch, PRECISIONS[name].dtype)
    return dtype


@dataclass(frozen=True)
class Chosen:
    """A precision and why it was chosen."""

    precision: str
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        """The type of activations and of weights that are not quantised."""
        return dtype_of(self.precision, lambda: fastest(pick_device()))


def pick_device() -> torch.device:
    """The accelerator there is, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def fastest(device: torch.device) -> tuple[str, str]:
    """The fastest type for frozen weights on this device, and the reason in words."""
    if device.type != "cuda":
        bf16 = device.type == "cpu" and cpu_has_bf16()
        return fastest_precision("this CPU", device.type, bf16=bf16)
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    return fastest_precision(name, "cuda", capability)


def cpu_has_bf16() -> bool:
    """Whether this CPU has bf16 instructions (AVX-512 BF16 or AMX)."""
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        ask = getattr(torch.cpu, probe, None)
        if ask is not None and ask():
            return True
    return False


def choose(precision: PrecisionName, device: torch.device) -> Chosen:
    """Turn `auto` into a type; say why."""
    if precision != "auto":
        return Chosen(precision, "asked for")
    return Chosen(*fastest(device))


def load_base(
    folder: Path, chosen: Chosen, device: torch.device, spread: dict[str, Any] | None = None
) -> Any:
    """A causal language model with frozen weights, in evaluation mode, its cache off.

    Args:
        spread: in place of one device, from `placement.spread`.

    Raises: UserError where transformers cannot load it, or a library is missing.
    """
    from transformers import AutoModelForCausalLM

    silence_libraries()
    attention.register()
    check_weights(folder)
    extra: dict[str, Any] = dict(spread or {})
    if PRECISIONS[chosen.precision].is_quantized:
        extra = {"device_map": {"": device}, **extra, "quantization_config": _quantization(chosen)}
    try:
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=chosen.dtype, **extra)
    except torch.cuda.OutOfMemoryError as e:
        raise UserError(
            "the base does not fit the GPU in {precision}",
            precision=chosen.precision,
            where=str(folder),
            fix="Try --precision nf4 (a quarter of fp16's memory), or a smaller model.",
        ) from e
    except Exception as e:  # the library raises many kinds for a model it cannot load
        raise library_error(
            e,
            "transformers cannot load this model",
            folder,
            "The folder needs config.json and *.safetensors of a causal language model.",
        ) from e
    if not extra:
        model.to(device)  # type: ignore[arg-type]
    _keep_layout(model)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model.eval()


def _keep_layout(model: Any) -> None:
    """Keep 4-bit weights as they were quantised, which is how `linear.dequantized_weight` reads
    them. On CPUs with AVX-512 bf16 bitsandbytes would repack them at the first forward without
    gradients, and cannot do so for widths that are not whole blocks."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _quantization(chosen: Chosen) -> Any:
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise UserError(
            "bitsandbytes is not installed",
            install_extra=install_extra("gpu"),
            where=f"precision {chosen.precision}",
            fix="{install_extra}. Or choose bf16, fp16 or fp32.",
        )
    loads = dict(PRECISIONS[chosen.precision].loads)
    if loads.get("load_in_4bit"):
        loads["bnb_4bit_compute_dtype"] = chosen.dtype
    return BitsAndBytesConfig(**loads)


def context_length(model: Any) -> int:
    """Positions the model was made for."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 1 << 20)
