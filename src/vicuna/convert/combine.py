"""Several adapters made one, by PEFT's methods, one module at a time.

PEFT combines adapters that are attached to a model. Here the model is a single layer of the right
shape whose weights are never touched, so that memory holds one layer and no base is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vicuna.errors import UserError
from vicuna.model.adapter import AdapterFiles, LoraSettings
from vicuna.model.adapter_files import LEAD

_LAYER = "layer"
_RESULT, _ABSENT = "combined", "absent"


@dataclass(frozen=True)
class Method:
    """How adapters are combined: PEFT's name of it, and its parameters."""

    name: str
    density: float = 0.5
    rank: int = 0
    seed: int = 42

    @property
    def prunes(self) -> bool:
        """Whether it keeps only a share of the values."""
        return self.name not in ("svd", "linear")


def combine(parts: Sequence[tuple[AdapterFiles, float]], method: Method) -> AdapterFiles:
    """One adapter out of several, each with what it counts with.

    Raises: UserError where the method needs adapters of one rank.
    """
    by_module: dict[str, list[tuple[Tensor, Tensor, float, float]]] = {}
    for files, weight in parts:
        for module, (a, b) in files.pairs().items():
            by_module.setdefault(module, []).append((a, b, files.lora.scale_of(module), weight))
    ranks = sorted({a.shape[0] for layers in by_module.values() for a, *_ in layers})
    if len(ranks) > 1 and not method.name.endswith("svd"):
        raise UserError(
            "{name} needs adapters of one rank, these have {ranks}",
            name=method.name,
            ranks=", ".join(map(str, ranks)),
            where="method",
            fix="Use linear (exact), svd, or {name}_svd.",
        )
    rank = method.rank or ranks[-1] if method.name.endswith("svd") else ranks[-1]
    tensors: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(method.seed)
        for module in sorted(by_module):
            a, b = _combined(by_module[module], method, rank)
            tensors[f"{LEAD}{module}.lora_A.weight"] = a
            tensors[f"{LEAD}{module}.lora_B.weight"] = b
    first = parts[0][0]
    modules = tuple(sorted({module.rsplit(".", 1)[-1] for module in by_module}))
    lora = LoraSettings(rank=rank, alpha=rank, target=modules)
    return AdapterFiles(first.path, lora, tensors, first.meta, base_name=first.base_name)


def _combined(
    layers: Sequence[tuple[Tensor, Tensor, float, float]], method: Method, rank: int
) -> tuple[Tensor, Tensor]:
    """(A (rank, in), B (out, rank)) of one module, scale 1."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    a, b = layers[0][:2]
    stand_in = nn.Sequential()
    stand_in.add_module(_LAYER, nn.Linear(a.shape[1], b.shape[0], bias=False, device="meta"))
    layer: Any = stand_in.get_submodule(_LAYER)
    layer.weight = nn.Parameter(torch.empty(b.shape[0], a.shape[1]))  # never filled
    model: Any = None
    names = []
    for number, (one, _, scale, _) in enumerate(layers):
        name = f"adapter{number}"
        config = LoraConfig(
            r=one.shape[0],
            lora_alpha=scale * one.shape[0],  # type: ignore[arg-type]
            target_modules=[_LAYER],
        )
        if model is None:
            model = LoraModel(stand_in, config, name)
        else:
            model.peft_config[name] = config
            model.inject_adapter(stand_in, name)
        names.append(name)
    weights = [w for *_, w in layers]
    if len(names) == 1:
        # Of a single adapter PEFT always makes the plain sum; beside one that lacks this module it
        # prunes, as it does in a whole model.
        model.peft_config[_ABSENT] = model.peft_config[names[0]]
        names, weights = [*names, _ABSENT], [*weights, 1.0]
    layer = stand_in.get_submodule(_LAYER)
    for name, (one, two, _, _) in zip(names, layers):
        layer.lora_A[name].weight.data = one.float()
        layer.lora_B[name].weight.data = two.float()
    more: dict[str, Any] = {"density": method.density} if method.prunes else {}
    if method.name.endswith("svd"):
        more |= {"svd_rank": rank, "svd_full_matrices": False}
    model.add_weighted_adapter(names, weights, _RESULT, combination_type=method.name, **more)
    a, b = layer.lora_A[_RESULT].weight.data, layer.lora_B[_RESULT].weight.data
    return _padded(a, rank, 0), _padded(b, rank, 1)


def _padded(matrix: Tensor, rank: int, dim: int) -> Tensor:
    """Zeros up to the rank: a layer smaller than it has fewer."""
    lacking = rank - matrix.shape[dim]
    if lacking <= 0:
        return matrix.contiguous()
    shape = list(matrix.shape)
    shape[dim] = lacking
    return torch.cat([matrix, matrix.new_zeros(shape)], dim).contiguous()
