"""Several adapters as one: exact, by laying their ranks side by side.

With strengths w and scales s, the sum of w s B A over all adapters is [w1 s1 B1, w2 s2 B2, ...]
times [A1; A2; ...]. So the mix has the sum of the ranks, and adds what its parts add together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vicuna.errors import UserError
from vicuna.files import whole_folder
from vicuna.model.adapter import AdapterFiles, write


def mixed(parts: Sequence[tuple[AdapterFiles, float]]) -> tuple[dict[str, Tensor], int]:
    """(tensors under PEFT's keys, rank) of the sum of adapters, each times its strength.

    A module that an adapter leaves alone gets zeros in its place, so that all have one rank.

    Raises: UserError where two of them are for layers of different shapes.
    """
    pairs = [files.pairs() for files, _ in parts]
    ranks = [files.lora.largest for files, _ in parts]
    tensors: dict[str, Tensor] = {}
    for module in sorted({m for each in pairs for m in each}):
        shapes = {(a.shape[1], b.shape[0]) for p in pairs if module in p for a, b in [p[module]]}
        if len(shapes) > 1:
            raise UserError(
                f"these adapters belong to bases of different shapes: {module} is "
                + " and ".join(f"{out} x {deep}" for deep, out in sorted(shapes)),
                where="adapters",
            )
        deep, out = shapes.pop()
        low, high = [], []
        for each, rank, (files, strength) in zip(pairs, ranks, parts):
            a, b = each.get(module, (torch.zeros(rank, deep), torch.zeros(out, rank)))
            lacking = rank - a.shape[0]
            low.append(pad(a.float(), (0, 0, 0, lacking)))
            scale = files.lora.scale_of(module) * strength
            high.append(pad(b.float() * scale, (0, lacking)))
        key = f"base_model.model.{module}.lora_"
        tensors[f"{key}A.weight"] = torch.cat(low).contiguous()
        tensors[f"{key}B.weight"] = torch.cat(high, dim=1).contiguous()
    return tensors, sum(ranks)


def save_mix(parts: Mapping[str, tuple[AdapterFiles, float]], folder: Path) -> None:
    """Write the sum of adapters as one adapter of plain PEFT.

    Its template and base are those of the heaviest part.

    Args:
        parts: adapter and strength by name.

    Raises: UserError where the folder exists, the disk is full, or they do not fit together.
    """
    from peft import LoraConfig

    if folder.exists():
        raise UserError("this folder exists already", where=str(folder), fix="Choose another name.")
    if not parts:
        raise UserError("nothing to merge: no adapter has a strength", where="adapters")
    tensors, rank = mixed(list(parts.values()))
    heaviest, _ = max(parts.values(), key=lambda part: abs(part[1]))
    meta: dict[str, Any] = {k: v for k, v in heaviest.meta.items() if k in ("template", "base")}
    meta["mixed"] = [
        {"adapter": name, "strength": strength} for name, (_, strength) in parts.items()
    ]
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted({key.split(".lora_")[0].rsplit(".", 1)[-1] for key in tensors}),
        task_type="CAUSAL_LM",
        base_model_name_or_path=heaviest.base or None,
    )
    with whole_folder(folder) as aside:
        write(aside, config.to_dict(), tensors, meta)
