"""Merge adapters into the weights of their base, chunk by chunk.

What no adapter touches is copied; what one touches is computed in float32 and rounded once.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from vicuna.json_yaml import write_json
from vicuna.model.lora_delta import LoraDelta
from vicuna.weights.output_folder import copy_side_files
from vicuna.weights.read import Weights, shapes
from vicuna.weights.safetensors_writer import Planned, Read, copies, rounded, write_sharded

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class Merge:
    """The plan of a merge: every tensor of the result, each computed when it is written.

    Args:
        config: of the base (config.json).
        weights: of the base.
        delta: what the adapters add.
        dtype: of the result; None keeps the type of each tensor.

    Attributes:
        touched: values of the adapted matrices written so far.
        changed: how many of them differ from the base's after rounding.

    Raises: UserError if the adapters do not fit the base.
    """

    def __init__(
        self,
        config: dict[str, Any],
        weights: Weights,
        delta: LoraDelta,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._config, self._weights, self._delta = config, weights, delta
        tied = bool(config.get("tie_word_embeddings"))
        # An adapted output matrix can no longer be the embedding.
        self._untie = _HEAD in delta.names and (tied or _HEAD not in weights.names())
        held = shapes(weights)
        delta.check({_HEAD: held[_EMBEDDING], **held} if self._untie else held, tied=False)
        self.changed = self.touched = 0
        self._lock = Lock()
        self.tensors = self._plan(dtype)

    def _plan(self, dtype: torch.dtype | None) -> list[Planned]:
        plan = [
            replace(p, read=self._reader(p.name, p.name, p.dtype))
            if p.name in self._delta.names
            else p
            for p in copies(self._weights, dtype)
        ]
        if self._untie:
            like = next(p for p in plan if p.name == _EMBEDDING)
            plan = [p for p in plan if p.name != _HEAD]
            read = self._reader(_HEAD, _EMBEDDING, like.dtype)
            plan.append(replace(like, name=_HEAD, read=read))
        return plan

    def _reader(self, name: str, source: str, dtype: torch.dtype) -> Read:
        def read(rows: slice) -> Tensor:
            weight = self._weights.read(source, rows)
            merged = rounded(name, self._delta.of_rows(rows).apply(name, weight), dtype)
            changed = int(torch.count_nonzero(merged != weight.to(dtype)))
            with self._lock:
                self.touched += merged.numel()
                self.changed += changed
            return merged

        return read

    @property
    def size(self) -> int:
        """Bytes of the result's tensors."""
        return sum(p.size for p in self.tensors)

    def write(self, base: Path, folder: Path, largest: int) -> None:
        """Write the merged model: weights, config.json, and the base's other files.

        Args:
            base: the base's folder.
            largest: bytes of one file of weights.

        Raises: UserError if the disk is full.
        """
        copy_side_files(base, folder)
        write_json(folder / "config.json", self._merged_config())
        write_sharded(folder, self.tensors, largest)

    def _merged_config(self) -> dict[str, Any]:
        merged = dict(self._config)
        if self._untie:
            merged["tie_word_embeddings"] = False
        dtype = next((_NAMES[p.dtype] for p in self.tensors if p.dtype in _NAMES), None)
        for key in {"dtype", "torch_dtype"} & merged.keys():
            merged[key] = dtype or merged[key]
        return merged
