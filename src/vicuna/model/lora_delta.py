"""What LoRA adapters add to the weights of their base; and several adapters as one.

    delta = LoraDelta(read_adapter("runs/demo"))
    merged = delta.apply("model.layers.0.self_attn.q_proj.weight", weight)

The sum of adapters is exact, by laying their ranks side by side: with weights w and scales s, the
sum of w s B A over all adapters is [w1 s1 B1, w2 s2 B2, ...] times [A1; A2; ...]. So it has the sum
of the ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vicuna.errors import UserError
from vicuna.files import whole_folder
from vicuna.model import adapter_fit
from vicuna.model.adapter import AdapterFiles, write
from vicuna.weights.read import ALL

_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class _Part:
    """What one adapter adds to one matrix: scale * B (out, r) @ A (r, in)."""

    adapter: AdapterFiles
    a: Tensor
    b: Tensor
    scale: float


class LoraDelta:
    """The products B A of adapters, scaled and summed, each computed when it is asked for.

    Args:
        adapters: one, or several, each with what it counts with.
    """

    def __init__(self, adapters: AdapterFiles | Iterable[tuple[AdapterFiles, float]]) -> None:
        several = [(adapters, 1.0)] if isinstance(adapters, AdapterFiles) else list(adapters)
        self._adapters = [adapter for adapter, _ in several]
        self._rows = ALL
        self._parts: dict[str, list[_Part]] = {}
        for adapter, weight in several:
            for module, (a, b) in adapter.pairs().items():
                part = _Part(adapter, a, b, adapter.lora.scale_of(module) * weight)
                self._parts.setdefault(f"{module}.weight", []).append(part)

    @property
    def names(self) -> set[str]:
        """The weights it changes, under the base's names."""
        return set(self._parts)

    def check(self, weights: Mapping[str, tuple[int, ...]], tied: bool) -> None:
        """Refuse a base that lacks a weight which an adapter changes, or has it in another shape.

        Args:
            weights: the shapes of the base's, by name.
            tied: whether its output matrix is its embedding.

        Raises: UserError that says in what they differ.
        """
        if tied and _HEAD in self._parts:
            raise UserError(
                "the adapter changes the output matrix, which this base shares with its embedding",
                where=f"adapter {self._adapters[0].path}",
                fix="vicuna merge gives the result an output matrix of its own; export that.",
            )
        held = {n.removesuffix(".weight"): s for n, s in weights.items() if len(s) == 2}
        for adapter in self._adapters:
            if adapter.config.get("fan_in_fan_out"):
                raise UserError(
                    "this adapter belongs to layers whose weights lie transposed (fan_in_fan_out), "
                    "as in GPT-2: it can be used, but not merged",
                    where=f"adapter {adapter.path}",
                    fix="Use --model BASE --adapter ADAPTER, or merge it with PEFT.",
                )
            adapter_fit.check(adapter, held)

    def of_rows(self, rows: slice) -> LoraDelta:
        """The same for some rows of a weight, where it is read in parts."""
        some = copy(self)
        some._rows = rows
        return some

    def apply(self, name: str, weight: Tensor) -> Tensor:
        """A weight (out, in) of the base with what the adapters add, in float32; unchanged, and in
        its own type, where they add nothing. `check` has seen that the shapes fit."""
        merged = weight
        for part in self._parts.get(name, ()):
            b = part.b[self._rows].float()
            merged = merged.float().addmm(b, part.a.float(), alpha=part.scale)
        return merged


# -- several adapters as one -----------------------------------------------------------------------


def weighted_sum(parts: Sequence[tuple[AdapterFiles, float]]) -> tuple[dict[str, Tensor], int]:
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
                "these adapters belong to bases of different shapes: {module} is {shapes}",
                module=module,
                shapes=" and ".join(f"{out} x {deep}" for deep, out in sorted(shapes)),
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


def save_weighted_sum(parts: Mapping[str, tuple[AdapterFiles, float]], folder: Path) -> None:
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
    tensors, rank = weighted_sum(list(parts.values()))
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
