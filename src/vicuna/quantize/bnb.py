"""8 bits and nf4 as bitsandbytes loads them, through transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vicuna.errors import UserError

if TYPE_CHECKING:
    from vicuna.commands.model_source import ModelSource
    from vicuna.verify.logits import LogitSource


def write(bits: int, source: ModelSource, aside: Path) -> Callable[[], LogitSource]:
    """Write a base, with its adapter merged, in 8 bits or nf4; what gives the result's scores.

    Raises: UserError where bitsandbytes is missing or memory runs out.
    """
    from vicuna.model import load
    from vicuna.quantize.merged_base import merged_folder

    precision = load.Chosen("int8" if bits == 8 else "nf4", "asked for")
    device = load.pick_device()
    with merged_folder(source) as folder:
        model = load.load_base(folder, precision, device)
        try:
            model.save_pretrained(str(aside))
        except (RuntimeError, ValueError) as e:
            raise UserError(
                "transformers cannot save this model: {error}",
                error=str(e).splitlines()[0],
                where=str(source.folder),
            ) from e
    return lambda: _loaded(aside, device)


def _loaded(folder: Path, device: object) -> LogitSource:
    """What was written, read again: what is compared must be what others will load."""
    import torch
    from transformers import AutoModelForCausalLM

    from vicuna.verify.logits import ModelLogits

    model = AutoModelForCausalLM.from_pretrained(
        str(folder), device_map={"": device}, dtype=torch.float32
    )
    return ModelLogits(model)
