"""Whether a run fits a device; if not, the nearest settings that do, ranked by their cost."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from vicuna.config import TrainSettings
from vicuna.config.checkpointing import LEVELS, costlier
from vicuna.config.precisions import QUANTIZED, SMALLEST
from vicuna.errors import UserError
from vicuna.memory import devices
from vicuna.memory.auto_settings import (
    FEW_TOKENS,
    SearchSpace,
    choose,
    first_spec,
    most_tokens,
    search_space,
    smallest,
)
from vicuna.memory.devices import Device
from vicuna.memory.footprint import Footprint, Planner
from vicuna.memory.traced_step import StepSpec
from vicuna.messages import Message, joined

COSTS = {
    "tokens": Message("nothing: the result is the same"),
    "precision": Message("changes the model a little: its frozen weights are rounded"),
    "cutoff": Message("longer examples are left out, split or cut (overlong)"),
    "target": Message("fewer layers learn"),
}


@dataclass(frozen=True)
class Alternative:
    """Settings that fit, and what they cost."""

    settings: dict[str, Any]
    peak: int
    cost: str


@dataclass(frozen=True)
class Plan:
    """What a run needs on a device. alternatives: empty if it fits, or if nothing does."""

    device: Device
    spec: StepSpec
    footprint: Footprint
    fits: bool
    reason: str
    alternatives: list[Alternative] = field(default_factory=list)


def make(settings: TrainSettings, config: Any, device: Device, named: Collection[str] = ()) -> Plan:
    """Plan a run whose longest example has `cutoff_len` tokens.

    Args:
        named: settings that the user named; the others may be chosen (`choose`).

    Raises: UserError if `cutoff_len` exceeds the base's context, or the adapter's layers are not
        in the base.
    """
    context = int(getattr(config, "max_position_embeddings", None) or 1 << 20)
    if settings.cutoff_len > context:
        raise UserError(
            "examples have up to {cutoff_len} tokens, but the base's context length is {context}",
            cutoff_len=settings.cutoff_len,
            context=context,
            where="cutoff_len",
            fix="Use --cutoff_len {context}.",
        )
    planner = Planner(config, device)
    choice = choose(settings, config, device, settings.cutoff_len, named, planner)
    space = search_space(settings, device, settings.cutoff_len, named, bool(planner.alone))
    spec = replace(
        first_spec(settings, space, settings.cutoff_len),
        precision=choice.precision,
        checkpointing=choice.gradient_checkpointing,
        tokens=choice.micro_batch_tokens,
    )
    others = [] if choice.fits else list(_alternatives(planner, settings, spec, space))
    return Plan(device, spec, choice.footprint, choice.fits, choice.reason, others)


def _alternatives(
    planner: Planner, settings: TrainSettings, spec: StepSpec, space: SearchSpace
) -> Iterator[Alternative]:
    """What fits instead: from what costs nothing to what costs most."""
    count = 0
    free = settings.model_copy(update={"micro_batch_tokens": 0})
    wide = search_space(free, planner.device, spec.longest, one_by_one=bool(planner.alone))
    tokens = wide.tokens
    enough = min(FEW_TOKENS[planner.device.kind], tokens[0])
    levels = wide.checkpointings
    others = [k for k in costlier(spec.checkpointing) if k in levels]
    quantised = [p for p in QUANTIZED if p not in space.precisions]
    for precision in (space.precisions[-1], *quantised):
        if not planner.fits(smallest(spec, precision, wide)):
            continue
        for checkpointing in (spec.checkpointing, *others):
            candidate = replace(spec, precision=precision, checkpointing=checkpointing)
            most = most_tokens(planner, candidate, tokens)
            if most is not None:
                count += 1
                yield _alternative(planner, spec, replace(candidate, tokens=most))
            if most is not None and most >= enough:
                break
    if count:
        return
    least = replace(spec, precision=SMALLEST, checkpointing=levels[-1])
    for changed in (replace(least, target=("q_proj", "v_proj")), _shorter(planner, least)):
        if changed is None:
            continue
        shortest = replace(changed, tokens=changed.longest)
        if planner.fits(shortest):
            yield _alternative(planner, spec, shortest)


def _shorter(planner: Planner, spec: StepSpec) -> StepSpec | None:
    """The step with its examples halved in length until they fit; None if they never do."""
    length = spec.longest // 2
    while length >= 64:
        shorter = replace(spec, longest=length, tokens=length)
        if planner.footprint(shorter).peak <= planner.device.memory:
            return shorter
        length //= 2
    return None


def _alternative(planner: Planner, asked: StepSpec, spec: StepSpec) -> Alternative:
    before, after = settings_of(asked), settings_of(spec)
    changes = {k: v for k, v in after.items() if before[k] != v}
    costs = []
    if spec.checkpointing != asked.checkpointing and spec.checkpointing != "none":
        costs.append(LEVELS[spec.checkpointing].cost)
    if spec.precision != asked.precision:
        costs.append(COSTS["precision"])
    if spec.longest != asked.longest:
        costs.append(COSTS["cutoff"])
    if spec.target != asked.target:
        costs.append(COSTS["target"])
    return Alternative(
        changes, planner.footprint(spec).peak, joined(costs, "; ") if costs else COSTS["tokens"]
    )


def settings_of(spec: StepSpec) -> dict[str, Any]:
    """A step as the settings of `vicuna train`."""
    return {
        "precision": spec.precision,
        "gradient_checkpointing": spec.checkpointing,
        "micro_batch_tokens": spec.tokens,
        "cutoff_len": spec.longest,
        "lora_rank": spec.rank,
        "lora_target": list(spec.target),
    }


def larger_devices(peak: int) -> list[str]:
    """The devices of the table that `peak` bytes fit, the smallest first; at most three."""
    enough = [d for d in map(devices.by_name, devices.names()) if d.memory >= peak]
    return [d.name for d in sorted(enough, key=lambda d: d.memory)][:3]
