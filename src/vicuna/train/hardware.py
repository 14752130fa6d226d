"""What the hardware decides before a run: how much is computed at a time, what is computed twice,
and the type of the base (`memory: auto`). What the user has set is kept."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vicuna.config import TrainSettings
from vicuna.errors import UserError
from vicuna.memory.devices import GIB, at_hand
from vicuna.memory.search import ROWS, Choice, choose
from vicuna.model import llama, load
from vicuna.model.config_files import load_config
from vicuna.model.load import Chosen
from vicuna.model.loss import CHUNK
from vicuna.train.progress import Screen


@dataclass(frozen=True)
class Hardware:
    """rows: tokens computed at a time. settings: with what was chosen filled in."""

    settings: TrainSettings
    device: torch.device
    precision: Chosen
    rows: int


def by_hand(settings: TrainSettings, device: torch.device) -> Hardware:
    """The settings as they are; where nothing is said, what a device of this kind takes."""
    rows = settings.micro_batch_tokens or ROWS[device.type]
    return Hardware(settings, device, load.choose(settings.precision, device), rows)


def decide(
    settings: TrainSettings,
    given: Collection[str],
    folder: Path,
    longest: int,
    device: torch.device,
    screen: Screen,
) -> Hardware:
    """Choose by a plan of the step's memory what the user left open, and say why.

    Args:
        given: settings that the user named.
        folder: the base, of which only config.json is read.
        longest: tokens of the longest example.
    """
    plain = by_hand(settings, device)
    if settings.memory == "manual" or device.type not in ("cpu", "cuda"):
        return plain
    config = load_config(folder).get_text_config()
    place = at_hand(device.type)
    rough = _rough(config, max(plain.rows, longest)) if device.type == "cpu" else None
    if rough is not None and rough + place.runtime < place.memory / 2:
        screen.say(
            f"memory: {plain.rows:,} tokens at a time, which needs less than half of the "
            f"{place.memory / GIB:.1f} GiB there are (vicuna plan says how much)"
        )
        return plain
    try:
        choice = choose(settings, config, place, longest, given)
    except UserError:
        raise
    except Exception as e:  # a model of any library's making: a plan is no reason not to train
        screen.warn(f"memory could not be planned ({type(e).__name__}: {e})")
        return plain
    (screen.say if choice.fits else screen.warn)(f"memory: {choice.reason}")
    return _as_chosen(plain, choice)


def _as_chosen(plain: Hardware, choice: Choice) -> Hardware:
    chosen: dict[str, Any] = {"gradient_checkpointing": choice.gradient_checkpointing}
    precision = plain.precision
    if choice.precision != precision.precision:
        precision = Chosen(choice.precision, f"{precision.precision} does not fit")
        chosen["precision"] = choice.precision
    rows = choice.micro_batch_tokens
    if not plain.settings.micro_batch_tokens and plain.device.type == "cpu":
        # More at a time gain nothing; a longer example has a pack of its own.
        rows = min(rows, ROWS["cpu"])
    return Hardware(plain.settings.model_copy(update=chosen), plain.device, precision, rows)


def _rough(config: Any, rows: int) -> int | None:
    """Bytes that a step on a CPU cannot need more than, without the seconds that a plan takes: all
    weights in fp32, and twice what the layers keep of so many rows. None for other families, whose
    attention may keep more.
    """
    if config.model_type not in llama.MODEL_TYPES:
        return None
    hidden, inner = config.hidden_size, config.intermediate_size
    weights = config.num_hidden_layers * (4 * hidden * hidden + 3 * hidden * inner)
    weights += 2 * config.vocab_size * hidden
    kept = rows * config.num_hidden_layers * (12 * hidden + 6 * inner)
    scores = 3 * CHUNK["cpu"] * config.vocab_size
    return 4 * int(weights + 2 * kept + scores)
