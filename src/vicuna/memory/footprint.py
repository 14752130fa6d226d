"""What a step needs, part by part: traces of few layers, extrapolated, and what no trace sees."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from vicuna.data.pack import Pack
from vicuna.memory.allocator import CachingAllocator
from vicuna.memory.devices import Device
from vicuna.memory.traced_step import Step, StepSpec, shape_of, shortened, worst_pack
from vicuna.memory.tracker import KINDS, Trace, extrapolate, full_peak
from vicuna.model import llama, self_check

# In the order they are shown.
PARTS = (
    "base", "adapters", "gradients", "optimizer", "activations", "loss", "runtime", "margin",
)  # fmt: skip
# What the allocator keeps beyond the bytes in use, as a share of them. On CUDA of those that come
# and go in a step (simulated on twelve layers of Llama 7B: 9 to 15 %); what it keeps beside the
# weights is simulated each time. On a CPU, where much goes back to the system at once, of all.
MARGIN = {"cuda": 0.12, "cpu": 0.02}


@dataclass(frozen=True)
class Footprint:
    """Bytes by part at the moment of the peak.

    parts: base, adapters, gradients, optimizer, activations, loss: what the step has allocated.
    runtime: context, libraries, workspaces. margin: what the allocator keeps beyond that.
    """

    parts: dict[str, int]

    @property
    def allocated(self) -> int:
        """What the step's tensors take."""
        return self.peak - self.parts["runtime"] - self.parts["margin"]

    @property
    def peak(self) -> int:
        """All of it."""
        return sum(self.parts.values())


class Planner:
    """Footprints of specs on one base and device; models on `meta` are kept between them."""

    def __init__(self, config: Any, device: Device) -> None:
        self.config, self.device = config, device
        self._steps: dict[tuple[Any, ...], Step] = {}
        self._known: dict[StepSpec, Footprint] = {}

    @cached_property
    def alone(self) -> str:
        """Why the base takes one example at a time, as far as its build shows it; "" if it takes
        packs. A run tries the weights, too."""
        if getattr(self.config, "model_type", "") in ("", *llama.MODEL_TYPES):
            return ""
        return self_check.state_of(shape_of(self.config))

    def footprint(self, spec: StepSpec, pack: Pack | None = None) -> Footprint:
        """What a spec needs.

        Args:
            pack: the pack to compute; where not named, the worst there can be.

        Raises: UserError where no layer has one of the names that the adapter is for.
        """
        if pack is not None:
            return self._measure(spec, pack)
        if spec not in self._known:
            self._known[spec] = self._measure(spec, worst_pack(spec))
        return self._known[spec]

    def fits(self, spec: StepSpec) -> bool:
        """Whether the device has what a spec needs."""
        return self.footprint(spec).peak <= self.device.memory

    def _measure(self, spec: StepSpec, pack: Pack) -> Footprint:
        layers, kind = self.config.num_hidden_layers, self.device.kind
        alike = len(set(getattr(self.config, "layer_types", None) or [0])) == 1
        # The first and the last layer are unlike the others; where layers are computed twice, so
        # is the one after the first.
        for few in (3,) if spec.checkpointing in ("full", "offload") else (2, 3):
            if not alike or layers <= few + 1:
                break
            short, long = self._trace(spec, few, pack), self._trace(spec, few + 1, pack)
            peak = extrapolate(short, long, layers - few, kind)
            if peak is not None:
                kept = [_kept_beside_weights(t, kind) for t in (short, long)]
                return self._parts(peak, kept[0] + (kept[1] - kept[0]) * (layers - few))
        trace = self._trace(spec, layers, pack)
        peak = full_peak(trace, kind)
        return self._parts(peak, _kept_beside_weights(trace, kind))

    def _trace(self, spec: StepSpec, layers: int, pack: Pack) -> Trace:
        key = (spec.precision, spec.rank, spec.target, spec.dropout, spec.optimizer, layers)
        if key not in self._steps:
            self._steps[key] = Step(shortened(self.config, layers), spec, self.device)
        step = self._steps[key]
        # On a CPU what is moved to the host's memory stays in the same memory.
        away = spec.checkpointing == "offload" and self.device.kind == "cpu"
        step.checkpoint("full" if away else spec.checkpointing)
        return step.trace(pack)

    def _parts(self, peak: np.ndarray, kept: int) -> Footprint:
        parts = dict.fromkeys(PARTS, 0) | {k: int(n) for k, n in zip(KINDS, peak)}
        moving = parts["activations"] + parts["loss"]
        if self.device.kind == "cpu":
            moving = int(peak.sum())
        parts["runtime"] = self.device.runtime
        parts["margin"] = kept + int(moving * MARGIN[self.device.kind])
        return Footprint(parts)


def _kept_beside_weights(trace: Trace, kind: str) -> int:
    """Bytes that the allocator has reserved and not handed out before a step begins; 0 on a CPU."""
    if kind != "cuda":
        return 0
    allocator = CachingAllocator()
    there = trace.events[: trace.marks["begin"]]
    allocator.replay((number, nbytes) for number, nbytes, _ in there)
    return allocator.reserved - allocator.allocated
