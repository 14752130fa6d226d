"""The optimiser of a run, its learning rate at each step, and its state as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from vicuna.config import TrainSettings
from vicuna.messages import Message
from vicuna.system_errors import install_extra

# Where bitsandbytes pages its moments; on a CPU it leaves them where they are.
PAGED_ON = ("cuda",)
# bitsandbytes puts its own tensors one level deeper in what it hands out.
_INNER = "__bnb_optimizer_quant_state__"


def mistakes(settings: TrainSettings, device: torch.device) -> list[str]:
    """What the chosen optimiser lacks on this machine, with the way out."""
    if settings.optimizer == "adamw":
        return []
    messages: list[str] = []
    if device.type not in PAGED_ON:
        messages.append(
            Message(
                "optimizer {optimizer} needs a CUDA GPU, and this is {device}: use adamw",
                optimizer=settings.optimizer,
                device=device.type,
            )
        )
    if find_spec("bitsandbytes") is None:
        messages.append(
            Message(
                "optimizer {optimizer} needs bitsandbytes; adamw does not. {install_extra}",
                optimizer=settings.optimizer,
                install_extra=install_extra("gpu"),
            )
        )
    return messages


def build(settings: TrainSettings, parameters: Mapping[str, Tensor], device: torch.device) -> Any:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) over these parameters, or bitsandbytes'
    with moments of 8 bits, block by block (arXiv 2110.02861). Paging was not run here: it needs a
    GPU.

    Raises: SettingsError if what it needs is missing.
    """
    from vicuna.errors import SettingsError

    missing = mistakes(settings, device)
    if missing:
        raise SettingsError(missing)
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_epsilon,
        "weight_decay": settings.weight_decay,
    }
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(list(parameters.values()), **options)
    from bitsandbytes.optim import PagedAdamW8bit

    return PagedAdamW8bit(list(parameters.values()), **options)


def state_of(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """The optimiser's state under `field:parameter`, on the CPU; counts become int64 scalars.

    Args:
        names: the parameters' names in the optimiser's order.
    """
    tensors: dict[str, Tensor] = {}
    for number, fields in optimizer.state_dict()["state"].items():
        flat = {**fields, **fields.get(_INNER, {})}
        flat.pop(_INNER, None)
        for key, value in flat.items():
            tensor = value.detach() if isinstance(value, Tensor) else torch.tensor(int(value))
            # A copy of its own: bitsandbytes' tables are one tensor for all parameters.
            tensors[f"{key}:{names[number]}"] = tensor.to("cpu", copy=True).contiguous()
    return tensors


def load_state(
    optimizer: torch.optim.Optimizer, names: list[str], tensors: Mapping[str, Tensor]
) -> list[str]:
    """Put `state_of`'s tensors into a fresh optimiser of the same kind.

    Returns: the parameters that it has nothing for, nothing being changed then.
    """
    state: dict[int, dict[str, Any]] = {}
    ours = hasattr(optimizer, "non_castable_tensor_keys")
    for number, name in enumerate(names):
        fields: dict[str, Any] = {}
        for key, value in tensors.items():
            field, _, owner = key.partition(":")
            if owner == name:
                # bitsandbytes counts its steps with a plain number.
                fields[field] = int(value) if ours and field == "step" else value
        if fields:
            state[number] = fields
    missing = [name for number, name in enumerate(names) if number not in state]
    if tensors and missing:
        return missing
    whole = optimizer.state_dict()
    whole["state"] = state
    optimizer.load_state_dict(whole)
    if ours:
        _page(optimizer)
    return []


def _page(optimizer: Any) -> None:
    """Move the moments into buffers that bitsandbytes pages; loaded ones are plain tensors."""
    for parameter, fields in optimizer.state.items():
        for key in ("state1", "state2"):
            buffer = optimizer.get_state_buffer(parameter, dtype=fields[key].dtype)
            fields[key] = buffer.copy_(fields[key])


# -- the learning rate ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """A learning rate for each of `total` steps.

    kind: linear, cosine or constant. The first step already learns (rate peak / warmup), the last
    one still does.
    """

    kind: str
    peak: float
    total: int
    warmup: int

    def rate(self, k: int) -> float:
        """The learning rate of step k (0-based)."""
        if k < self.warmup:
            return self.peak * (k + 1) / self.warmup
        if self.kind == "constant":
            return self.peak
        progress = (k - self.warmup) / max(1, self.total - self.warmup)
        if self.kind == "cosine":
            return self.peak * 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.peak * (1.0 - progress)


def warmup_steps(total: int, ratio: float, steps: int) -> int:
    """Steps to warm up: as asked, but never more than a fifth of the run.

    With 300 records and 100 warm-up steps the 2023 project never reached its learning rate.
    """
    return min(steps or math.ceil(total * ratio), total // 5)


def continued_total(old_total: int, old_step: int, new_steps: int) -> int:
    """Length of the schedule when a run continues with new data (incremental training).

    The 2023 project's rule: the new data's own number of steps if that is larger, else the old
    run's, so that the new data stands directly behind the old on the old schedule. If nothing
    would be left of that (the old run was finished; the original then trained nothing and said
    nothing), the schedule is stretched by the new data's steps.
    """
    total = max(old_total, new_steps)
    return total if total > old_step else old_step + new_steps
