"""Does a run fit a device; if not, the nearest settings that do, ranked by what they cost."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from vicuna.config import TrainSettings
from vicuna.config.precisions import QUANTIZED, SMALLEST
from vicuna.errors import UserError
from vicuna.memory import devices
from vicuna.memory.devices import Device
from vicuna.memory.footprint import Footprint, Planner
from vicuna.memory.search import (
    CHECKPOINTING,
    FEW_ROWS,
    Room,
    choose,
    first_job,
    frugal,
    most_rows,
    room_of,
)
from vicuna.memory.traced_step import Job

# A frozen base is passed through twice, forward and backward, with about equal work; computing a
# layer twice adds a third pass, computing gate and up twice not quite half of one.
COSTS = {
    "rows": "nothing: the result is the same",
    "selective": "about a fifth more computing; the result is the same",
    "full": "about half more computing; the result is the same",
    "offload": "about half more computing and copies to the host; the result is the same",
    "precision": "changes the model a little: its frozen weights are rounded",
    "cutoff": "longer examples are left out, split or cut (overlong)",
    "target": "fewer layers learn",
}


@dataclass(frozen=True)
class Alternative:
    """Settings that fit, and what they cost."""

    settings: dict[str, Any]
    peak: int
    cost: str


@dataclass(frozen=True)
class Plan:
    """What a run needs on a device. alternatives: empty where it fits, or nothing does."""

    device: Device
    job: Job
    footprint: Footprint
    fits: bool
    reason: str
    alternatives: list[Alternative] = field(default_factory=list)


def make(settings: TrainSettings, config: Any, device: Device, given: Collection[str] = ()) -> Plan:
    """Plan a run whose longest example has `cutoff_len` tokens.

    Args:
        given: settings that the user named; the others may be chosen (`choose`).

    Raises: UserError where the base cannot see so many tokens, or lacks the adapter's layers.
    """
    context = int(getattr(config, "max_position_embeddings", None) or 1 << 20)
    if settings.cutoff_len > context:
        raise UserError(
            f"examples of up to {settings.cutoff_len} tokens, but the base was made for {context}",
            where="cutoff_len",
            fix=f"Use --cutoff_len {context}.",
        )
    planner = Planner(config, device)
    choice = choose(settings, config, device, settings.cutoff_len, given, planner)
    room = room_of(settings, device, settings.cutoff_len, given, bool(planner.alone))
    job = replace(
        first_job(settings, room, settings.cutoff_len),
        precision=choice.precision,
        checkpointing=choice.gradient_checkpointing,
        rows=choice.micro_batch_tokens,
    )
    others = [] if choice.fits else list(_alternatives(planner, settings, job, room))
    return Plan(device, job, choice.footprint, choice.fits, choice.reason, others)


def _alternatives(
    planner: Planner, settings: TrainSettings, job: Job, room: Room
) -> Iterator[Alternative]:
    """What fits where the asked does not: from what costs nothing to what costs most."""
    found = 0
    free = settings.model_copy(update={"micro_batch_tokens": 0})
    wide = room_of(free, planner.device, job.longest, alone=bool(planner.alone))
    rows = wide.rows
    enough = min(FEW_ROWS[planner.device.kind], rows[0])
    ways = wide.checkpointings
    others = [w for w in ways if CHECKPOINTING.index(w) > CHECKPOINTING.index(job.checkpointing)]
    quantised = [p for p in QUANTIZED if p not in room.precisions]
    for precision in (room.precisions[-1], *quantised):
        if not planner.fits(frugal(job, precision, wide)):
            continue
        for checkpointing in (job.checkpointing, *others):
            wanted = replace(job, precision=precision, checkpointing=checkpointing)
            most = most_rows(planner, wanted, rows)
            if most is not None:
                found += 1
                yield _alternative(planner, job, replace(wanted, rows=most))
            if most is not None and most >= enough:
                break
    if found:
        return
    least = replace(job, precision=SMALLEST, checkpointing=ways[-1])
    for changed in (replace(least, target=("q_proj", "v_proj")), _shorter(planner, least)):
        if changed is None:
            continue
        shortest = replace(changed, rows=changed.longest)
        if planner.fits(shortest):
            yield _alternative(planner, job, shortest)


def _shorter(planner: Planner, job: Job) -> Job | None:
    """The job with the longest examples, of halves of its own, that fit."""
    length = job.longest // 2
    while length >= 64:
        shorter = replace(job, longest=length, rows=length)
        if planner.footprint(shorter).peak <= planner.device.memory:
            return shorter
        length //= 2
    return None


def _alternative(planner: Planner, asked: Job, job: Job) -> Alternative:
    before, after = settings_of(asked), settings_of(job)
    changes = {k: v for k, v in after.items() if before[k] != v}
    costs = []
    if job.checkpointing != asked.checkpointing and job.checkpointing != "none":
        costs.append(COSTS[job.checkpointing])
    if job.precision != asked.precision:
        costs.append(COSTS["precision"])
    if job.longest != asked.longest:
        costs.append(COSTS["cutoff"])
    if job.target != asked.target:
        costs.append(COSTS["target"])
    return Alternative(changes, planner.footprint(job).peak, "; ".join(costs) or COSTS["rows"])


def settings_of(job: Job) -> dict[str, Any]:
    """A job as the settings of `vicuna train`."""
    return {
        "precision": job.precision,
        "gradient_checkpointing": job.checkpointing,
        "micro_batch_tokens": job.rows,
        "cutoff_len": job.longest,
        "lora_rank": job.rank,
        "lora_target": list(job.target),
    }


def larger_devices(peak: int) -> list[str]:
    """The devices of the table that `peak` bytes fit, the smallest first; at most three."""
    enough = [d for d in map(devices.by_name, devices.names()) if d.memory >= peak]
    return [d.name for d in sorted(enough, key=lambda d: d.memory)][:3]
