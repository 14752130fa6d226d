"""What `memory: auto` chooses for a run and why: micro-batch, checkpointing, precision.

What the user has set is kept. Of the rest, what costs nothing is changed first: fewer tokens at a
time, then computing activations twice, then fewer tokens than fill the device, and only then the
type of the base, which changes the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from vicuna.config import TrainSettings
from vicuna.config.checkpointing import LEVELS, CheckpointingLevel
from vicuna.config.precisions import SMALLEST
from vicuna.errors import UserError
from vicuna.memory.devices import GIB, Device, at_hand
from vicuna.memory.footprint import Footprint, Planner
from vicuna.memory.traced_step import StepSpec
from vicuna.messages import Message
from vicuna.model import llama, load
from vicuna.model.config_files import load_config
from vicuna.model.load import Chosen
from vicuna.model.tuning import Tuning

# Tokens computed at a time if memory allows: enough to fill the matrix units.
TOKENS = {"cuda": 4096, "mps": 2048, "cpu": 1024}
# With fewer than these the device waits more than computing twice would cost.
FEW_TOKENS = {"cuda": 1024, "mps": 512, "cpu": 256}


@dataclass(frozen=True)
class Choice:
    """What a run takes. fits: whether `footprint` does; if not, it is the smallest there is."""

    micro_batch_tokens: int
    gradient_checkpointing: CheckpointingLevel
    precision: str
    reason: str
    footprint: Footprint
    fits: bool


@dataclass(frozen=True)
class SearchSpace:
    """What may still be chosen. tokens: of a micro-batch, from the most to the fewest."""

    precisions: tuple[str, ...]
    checkpointings: tuple[CheckpointingLevel, ...]
    tokens: tuple[int, ...]


def choose(
    settings: TrainSettings,
    config: Any,
    device: Device,
    longest: int,
    named: Collection[str] = (),
    planner: Planner | None = None,
) -> Choice:
    """The settings of the hardware for a run, the cheapest that fit.

    Args:
        config: the base's, of transformers.
        device: `devices.at_hand(...)`, or one to plan for.
        longest: tokens of the longest example.
        named: settings that the user named. Among them `gradient_checkpointing` is kept; precision
            other than auto and micro_batch_tokens other than 0 are kept anyway.
        planner: of this base and device, if there is one already.

    Raises: UserError if the adapter's layers are not in the base.
    """
    planner = planner or Planner(config, device)
    space = search_space(settings, device, longest, named, bool(planner.alone))
    spec = first_spec(settings, space, longest)
    for candidate, fits in candidates(planner, spec, space):
        if fits:
            return _choice(planner, spec, candidate, True)
    return _choice(planner, spec, smallest(spec, space.precisions[-1], space), False)


def search_space(
    settings: TrainSettings,
    device: Device,
    longest: int,
    named: Collection[str] = (),
    one_by_one: bool = False,
) -> SearchSpace:
    """What the settings leave open on this device. one_by_one: the base takes one example at a
    time."""
    precisions: tuple[str, ...] = (settings.precision,)
    if settings.precision == "auto":
        first = device.fastest()[0]
        smaller = ["bf16"] if first == "fp32" and device.kind == "cpu" else []
        # Rather than int8: half its size, and nearer to 16 bits' speed.
        smaller += [SMALLEST] if device.kind == "cuda" or find_spec("bitsandbytes") else []
        precisions = (first, *smaller)
    asked = settings.gradient_checkpointing
    kept = "gradient_checkpointing" in named
    # The host's memory is the CPU's own: nothing is won by moving there.
    levels = tuple(k for k in LEVELS if k != "offload" or device.kind != "cpu")
    checkpointings = (asked,) if kept else levels
    tokens = settings.micro_batch_tokens
    ladder = (max(tokens, longest),) if tokens else _ladder(TOKENS[device.kind], longest)
    if one_by_one:
        ladder = (longest,)
    return SearchSpace(precisions, checkpointings, ladder)


def _ladder(most: int, fewest: int) -> tuple[int, ...]:
    """Halves of `most` down to `fewest`; an example longer than that has a pack of its own."""
    steps = [max(most, fewest)]
    while steps[-1] // 2 > fewest:
        steps.append(steps[-1] // 2)
    return tuple(dict.fromkeys([*steps, fewest]))


def first_spec(settings: TrainSettings, space: SearchSpace, longest: int) -> StepSpec:
    """The step that would be taken if memory did not matter."""
    return StepSpec(
        precision=space.precisions[0],
        checkpointing=space.checkpointings[0],
        tokens=space.tokens[0],
        longest=longest,
        rank=settings.lora_rank,
        target=tuple(settings.lora_target),
        dropout=settings.lora_dropout,
        optimizer=settings.optimizer,
    )


def candidates(
    planner: Planner, spec: StepSpec, space: SearchSpace
) -> Iterator[tuple[StepSpec, bool]]:
    """Steps from the cheapest to the dearest, with the most tokens that fit, and whether any do.

    Lazy: what comes after the first that fits is only computed if it is asked for.
    """
    few = FEW_TOKENS[planner.device.kind]
    enough = tuple(r for r in space.tokens if r >= min(few, space.tokens[0]))
    below = tuple(r for r in space.tokens if r not in enough)
    for precision in space.precisions:
        least = smallest(spec, precision, space)
        if not planner.fits(least):
            yield least, False
            continue
        for tokens in filter(None, (enough, below)):
            for checkpointing in space.checkpointings:
                candidate = replace(spec, precision=precision, checkpointing=checkpointing)
                most = most_tokens(planner, candidate, tokens)
                yield replace(candidate, tokens=most or tokens[-1]), most is not None


def smallest(spec: StepSpec, precision: str, space: SearchSpace) -> StepSpec:
    """The step of this precision that needs the least memory."""
    return replace(
        spec, precision=precision, checkpointing=space.checkpointings[-1], tokens=space.tokens[-1]
    )


def most_tokens(planner: Planner, spec: StepSpec, tokens: tuple[int, ...]) -> int | None:
    """The most of `tokens` (from many to few) with which a step fits; None if none does."""
    if not planner.fits(replace(spec, tokens=tokens[-1])):
        return None
    # What fits with n tokens fits with fewer.
    low, high = 0, len(tokens) - 1
    while low < high:
        middle = (low + high) // 2
        if planner.fits(replace(spec, tokens=tokens[middle])):
            high = middle
        else:
            low = middle + 1
    return tokens[high]


def _choice(planner: Planner, wanted: StepSpec, spec: StepSpec, fits: bool) -> Choice:
    footprint, device = planner.footprint(spec), planner.device
    reason = Message(
        "{tokens:,} tokens at a time, {checkpointing}, base in {precision}: {peak:.1f} of "
        "{memory:.1f} GiB",
        tokens=spec.tokens,
        checkpointing=LEVELS[spec.checkpointing].in_words,
        precision=spec.precision,
        peak=footprint.peak / GIB,
        memory=device.memory / GIB,
    )
    if planner.alone:
        reason = Message(
            "{plan}; one example at a time ({reason})", plan=reason, reason=planner.alone
        )
    if not fits:
        reason = Message("{plan}, which does not fit", plan=reason)
    elif spec != wanted:
        more = planner.footprint(wanted).peak / GIB
        changes = [
            text
            for text, before, after in (
                (f"{wanted.tokens:,} tokens", wanted.tokens, spec.tokens),
                (
                    f"gradient_checkpointing {wanted.checkpointing}",
                    wanted.checkpointing,
                    spec.checkpointing,
                ),
                (f"precision {wanted.precision}", wanted.precision, spec.precision),
            )
            if before != after
        ]
        reason = Message(
            "{plan} ({changes} would need {memory:.1f} GiB)",
            plan=reason,
            changes=", ".join(changes),
            memory=more,
        )
    return Choice(spec.tokens, spec.checkpointing, spec.precision, reason, footprint, fits)


# -- for a run -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hardware:
    """What a run uses. tokens: computed at a time. settings: with what was chosen filled in."""

    settings: TrainSettings
    device: torch.device
    precision: Chosen
    tokens: int


def defaults_for(settings: TrainSettings, device: torch.device) -> Hardware:
    """The settings as they are, and this kind of device's defaults for what they leave open."""
    tokens = settings.micro_batch_tokens or TOKENS[device.type]
    return Hardware(settings, device, load.choose(settings.precision, device), tokens)


def plan_hardware(
    settings: TrainSettings,
    named: Collection[str],
    folder: Path,
    longest: int,
    device: torch.device,
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> Hardware:
    """Choose what the user left open by a plan of the step's memory, and say why.

    Args:
        named: settings that the user named.
        folder: the base, of which only config.json is read.
        longest: tokens of the longest example.
        say, warn: print a line.
    """
    plain = defaults_for(settings, device)
    if settings.memory == "manual" or device.type not in ("cpu", "cuda"):
        return plain
    config = load_config(folder).get_text_config()
    here = at_hand(device.type)
    bound = _upper_bound(config, max(plain.tokens, longest)) if device.type == "cpu" else None
    if bound is not None and bound + here.runtime < here.memory / 2:
        say(
            Message(
                "memory: {tokens:,} tokens at a time, which needs less than half of the "
                "{memory:.1f} GiB available (vicuna plan says how much)",
                tokens=plain.tokens,
                memory=here.memory / GIB,
            )
        )
        return plain
    try:
        choice = choose(settings, config, here, longest, named)
    except UserError:
        raise
    except Exception as e:  # any library may have made the model: train without a plan
        warn(
            Message(
                "memory could not be planned ({error_type}: {error})",
                error_type=type(e).__name__,
                error=e,
            )
        )
        return plain
    (say if choice.fits else warn)(f"memory: {choice.reason}")
    return _as_chosen(plain, choice)


def _as_chosen(plain: Hardware, choice: Choice) -> Hardware:
    chosen: dict[str, Any] = {"gradient_checkpointing": choice.gradient_checkpointing}
    precision = plain.precision
    if choice.precision != precision.precision:
        precision = Chosen(choice.precision, f"{precision.precision} does not fit")
        chosen["precision"] = choice.precision
    tokens = choice.micro_batch_tokens
    if not plain.settings.micro_batch_tokens and plain.device.type == "cpu":
        # More at a time gain nothing; a longer example has a pack of its own.
        tokens = min(tokens, TOKENS["cpu"])
    return Hardware(plain.settings.model_copy(update=chosen), plain.device, precision, tokens)


def _upper_bound(config: Any, tokens: int) -> int | None:
    """An upper bound of the bytes of a step on a CPU, without the seconds that a plan takes: all
    weights in fp32, and twice what the layers keep of so many tokens. None for other families,
    whose attention may keep more.
    """
    if config.model_type not in llama.MODEL_TYPES:
        return None
    hidden, inner = config.hidden_size, config.intermediate_size
    weights = config.num_hidden_layers * (4 * hidden * hidden + 3 * hidden * inner)
    weights += 2 * config.vocab_size * hidden
    kept = tokens * config.num_hidden_layers * (12 * hidden + 6 * inner)
    logits = 3 * Tuning.of("cpu").loss_rows * config.vocab_size
    return 4 * int(weights + 2 * kept + logits)
