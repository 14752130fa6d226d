"""Which micro-batch, checkpointing and precision a run takes (`memory: auto`), and why.

What the user has set is kept. Of the rest, what costs nothing is changed first: fewer rows at a
time, then computing activations twice, then fewer rows than fill the device, and only then the
type of the base, which changes the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from vicuna.config import TrainSettings
from vicuna.config.precisions import SMALLEST
from vicuna.memory.devices import GIB, Device
from vicuna.memory.footprint import Footprint, Planner
from vicuna.memory.traced_step import Job

# Rows computed at a time where there is room: enough to fill the matrix units.
ROWS = {"cuda": 4096, "mps": 2048, "cpu": 1024}
# With fewer than these the device waits more than computing twice would cost.
FEW_ROWS = {"cuda": 1024, "mps": 512, "cpu": 256}

CHECKPOINTING = ("none", "selective", "full", "offload")
IN_WORDS = {
    "none": "nothing computed twice",
    "selective": "the MLP's inside computed twice",
    "full": "each layer computed twice",
    "offload": "each layer computed twice, its input kept in the host's memory",
}


@dataclass(frozen=True)
class Choice:
    """What a run takes. fits: whether `footprint` does; where not, it is the least there is."""

    micro_batch_tokens: int
    gradient_checkpointing: str
    precision: str
    reason: str
    footprint: Footprint
    fits: bool


@dataclass(frozen=True)
class Room:
    """What may still be chosen. rows: from the most to the fewest."""

    precisions: tuple[str, ...]
    checkpointings: tuple[str, ...]
    rows: tuple[int, ...]


def choose(
    settings: TrainSettings,
    config: Any,
    device: Device,
    longest: int,
    given: Collection[str] = (),
    planner: Planner | None = None,
) -> Choice:
    """The settings of the hardware for a run.

    Args:
        config: the base's, of transformers.
        device: `devices.at_hand(...)`, or one to plan for.
        longest: tokens of the longest example.
        given: settings that the user named. Among them `gradient_checkpointing` is kept; precision
            other than auto and micro_batch_tokens other than 0 are kept anyway.
        planner: one of this base and device that is there already.

    Raises: UserError where the adapter's layers are not in the base.
    """
    planner = planner or Planner(config, device)
    room = room_of(settings, device, longest, given, bool(planner.alone))
    job = first_job(settings, room, longest)
    for candidate, fitting in search(planner, job, room):
        if fitting:
            return _choice(planner, job, candidate, True)
    return _choice(planner, job, frugal(job, room.precisions[-1], room), False)


def room_of(
    settings: TrainSettings,
    device: Device,
    longest: int,
    given: Collection[str] = (),
    alone: bool = False,
) -> Room:
    """What the settings leave open on this device. alone: the base takes one example at a time."""
    precisions: tuple[str, ...] = (settings.precision,)
    if settings.precision == "auto":
        first = device.fastest()[0]
        smaller = ["bf16"] if first == "fp32" and device.kind == "cpu" else []
        # Rather than int8: half its size, and nearer to 16 bits' speed.
        smaller += [SMALLEST] if device.kind == "cuda" or find_spec("bitsandbytes") else []
        precisions = (first, *smaller)
    asked = str(settings.gradient_checkpointing)
    kept = "gradient_checkpointing" in given and asked != "auto"
    # The host's memory is the CPU's own: nothing is won by moving there.
    ways = CHECKPOINTING[:-1] if device.kind == "cpu" else CHECKPOINTING
    checkpointings = (asked,) if kept else ways
    rows = settings.micro_batch_tokens
    ladder = (max(rows, longest),) if rows else _ladder(ROWS[device.kind], longest)
    if alone:
        ladder = (longest,)
    return Room(precisions, checkpointings, ladder)


def _ladder(most: int, fewest: int) -> tuple[int, ...]:
    """Halves of `most` down to `fewest`; an example longer than that has a pack of its own."""
    steps = [max(most, fewest)]
    while steps[-1] // 2 > fewest:
        steps.append(steps[-1] // 2)
    return tuple(dict.fromkeys([*steps, fewest]))


def first_job(settings: TrainSettings, room: Room, longest: int) -> Job:
    """The job that would be taken if memory were no matter."""
    return Job(
        precision=room.precisions[0],
        checkpointing=room.checkpointings[0],
        rows=room.rows[0],
        longest=longest,
        rank=settings.lora_rank,
        target=tuple(settings.lora_target),
        dropout=settings.lora_dropout,
        optimizer=settings.optimizer,
    )


def search(planner: Planner, job: Job, room: Room) -> Iterator[tuple[Job, bool]]:
    """Jobs from the cheapest to the dearest, each with the most rows that fit, and whether any do.

    Lazy: what lies behind the first that fits is only computed where it is asked for.
    """
    few = FEW_ROWS[planner.device.kind]
    enough = tuple(r for r in room.rows if r >= min(few, room.rows[0]))
    below = tuple(r for r in room.rows if r not in enough)
    for precision in room.precisions:
        least = frugal(job, precision, room)
        if not planner.fits(least):
            yield least, False
            continue
        for rows in filter(None, (enough, below)):
            for checkpointing in room.checkpointings:
                wanted = replace(job, precision=precision, checkpointing=checkpointing)
                found = most_rows(planner, wanted, rows)
                yield replace(wanted, rows=found or rows[-1]), found is not None


def frugal(job: Job, precision: str, room: Room) -> Job:
    """The job of this precision that needs the least."""
    return replace(
        job, precision=precision, checkpointing=room.checkpointings[-1], rows=room.rows[-1]
    )


def most_rows(planner: Planner, job: Job, rows: tuple[int, ...]) -> int | None:
    """The most of `rows` (from many to few) with which a job fits; None where none does."""
    if not planner.fits(replace(job, rows=rows[-1])):
        return None
    # What fits with n rows fits with fewer.
    low, high = 0, len(rows) - 1
    while low < high:
        middle = (low + high) // 2
        if planner.fits(replace(job, rows=rows[middle])):
            high = middle
        else:
            low = middle + 1
    return rows[high]


def _choice(planner: Planner, wanted: Job, job: Job, fits: bool) -> Choice:
    footprint, device = planner.footprint(job), planner.device
    words = (
        f"{job.rows:,} tokens at a time, {IN_WORDS[job.checkpointing]}, base in {job.precision}: "
        f"{footprint.peak / GIB:.1f} of {device.memory / GIB:.1f} GiB"
    )
    if planner.alone:
        words += f"; one example at a time ({planner.alone})"
    if not fits:
        words += ", which does not fit"
    elif job != wanted:
        more = planner.footprint(wanted).peak / GIB
        changes = [
            f"{before} {name}"
            for name, before, after in (
                ("tokens", f"{wanted.rows:,}", f"{job.rows:,}"),
                ("checkpointing", wanted.checkpointing, job.checkpointing),
                ("precision", wanted.precision, job.precision),
            )
            if before != after
        ]
        words += f" ({', '.join(changes)} would need {more:.1f} GiB)"
    return Choice(job.rows, job.checkpointing, job.precision, words, footprint, fits)
