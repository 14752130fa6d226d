"""Which devices a base is put on: one, or several GPUs where one is too small for its weights."""

from __future__ import annotations

from typing import Any

import torch

from vicuna.errors import UserError
from vicuna.model.load import pick_device

# Of a GPU's free memory; the rest is for keys and values, activations and an adapter.
FOR_WEIGHTS = 0.85
FIX = "Use auto, cpu, mps, one GPU (cuda:0), or several, with commas (cuda:0,cuda:1)."


def devices(wanted: str) -> list[torch.device]:
    """The devices that a setting names; `auto` means all GPUs, else the best one there is.

    Raises: UserError where it names none, or one that is not there.
    """
    if wanted == "auto":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        every = [torch.device("cuda", i) for i in range(count)]
        return every if count > 1 else [pick_device()]
    try:
        named = [torch.device(name.strip()) for name in wanted.split(",")]
    except RuntimeError:
        named = []
    kinds = {d.type for d in named}
    if not named or kinds - {"cpu", "mps", "cuda"} or (len(named) > 1 and kinds != {"cuda"}):
        raise _wrong(f"{wanted!r} is no list of devices a model can be on")
    if len(set(named)) < len(named):
        raise _wrong(f"{wanted} names a device twice")
    missing = [str(d) for d in named if not _exists(d)]
    if missing:
        seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise _wrong(f"there is no {', '.join(missing)}: PyTorch sees {seen} GPUs")
    return named


def _wrong(what: str) -> UserError:
    return UserError(what, where="device_map", fix=FIX)


def _exists(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    return device.type == "cpu" or torch.backends.mps.is_available()


def spread(over: list[torch.device], fill: bool) -> dict[str, Any]:
    """What `from_pretrained` is told in order to spread a model's layers over GPUs.

    Args:
        fill: use the first ones up before the next, so that a model that fits one stays on it; else
            an equal share on each.
    """
    # What finds no room goes to the host's memory, where `check` finds it.
    room: dict[int | str, int] = {"cpu": 1 << 50}
    for device in over:
        room[device.index] = int(FOR_WEIGHTS * torch.cuda.mem_get_info(device)[0])
    return {"device_map": "sequential" if fill else "balanced", "max_memory": room}


def check(model: Any, over: list[torch.device]) -> None:
    """Refuse a model of which a part found no room on its devices, and lies on the host or on disk.

    Raises: UserError naming the first such part.
    """
    for name, parameter in model.named_parameters():
        if parameter.device not in over:
            raise UserError(
                "the base does not fit {over}: from {name} on there is no room",
                over=", ".join(map(str, over)),
                name=name,
                where="device_map",
                fix="Name more GPUs, take --precision nf4 (a quarter of fp16's memory), "
                "--device_map cpu, or --engine llama.cpp with a GGUF file of a 4-bit type.",
            )


def check_present(model: Any) -> None:
    """Refuse a model of which a part has no data here, as accelerate leaves it on disk.

    Raises: UserError naming it.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UserError(
                "{name} is not in memory: it was left on disk or never loaded",
                name=name,
                where="device_map",
                fix="Place the whole model on devices: an answer reads every weight for each "
                "token. Without device_map of your own, vicuna does that.",
            )
