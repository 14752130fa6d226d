"""One real training step on tensors without data, and what it does to memory.

The step is that of `TrainableModel`: whatever it comes to do, the plan follows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vicuna.config.precisions import PRECISIONS
from vicuna.data.pack import Pack, PackSegment
from vicuna.memory.devices import Device
from vicuna.memory.emulate_device import as_on
from vicuna.memory.meta_layers import EightBitAdamW, quantize
from vicuna.memory.tracker import Trace, Tracker, without_collection
from vicuna.model import dropout, self_check
from vicuna.model.adapter import LoraSettings, attach
from vicuna.model.config_files import library_error
from vicuna.model.load import dtype_of
from vicuna.model.trainable import TrainableModel

META = torch.device("meta")


@dataclass(frozen=True)
class Job:
    """What decides the memory of a step, beside the base's shape and the device.

    precision: one of `config.precisions`. checkpointing: none, selective, full or offload.
    rows: tokens computed at a time. longest: tokens of the longest example. rank, target, dropout:
    the adapter's. optimizer: adamw or paged_adamw_8bit.
    """

    precision: str
    checkpointing: str
    rows: int
    longest: int
    rank: int = 8
    target: tuple[str, ...] = ("all",)
    dropout: float = 0.0
    optimizer: str = "adamw"

    def dtype(self, device: Device) -> torch.dtype:
        """The type of activations and of weights that are not quantised."""
        return dtype_of(self.precision, device.fastest)


def worst_pack(job: Job) -> Pack:
    """As many examples of the longest length as fit into the rows, every token a target: no pack
    of the run needs more."""
    length = min(job.longest, job.rows)
    stops = [*range(length, job.rows, length), job.rows]
    segments = [PackSegment(a, b) for a, b in zip([0, *stops], stops)]
    return pack_of(segments, np.arange(job.rows))


def pack_of(segments: Sequence[PackSegment], targets: np.ndarray) -> Pack:
    """A pack of these segments and rows with a target; its ids are zeros."""
    rows, count = segments[-1].stop, len(targets)
    positions = np.concatenate(
        [np.arange(s.stop - s.start) + sum(b - a for a, b in s.above) for s in segments]
    )
    return Pack(
        ids=np.zeros(rows, np.int64),
        positions=positions.astype(np.int64),
        segments=list(segments),
        target_rows=targets.astype(np.int64),
        target_ids=np.zeros(count, np.int64),
        weights=np.ones(count, np.float32),
        prefix_hashes=np.zeros(rows, np.int64),
        examples=len(segments),
        tokens=rows,
        supervised=count,
    )


def shortened(config: Any, layers: int) -> Any:
    """The config of the same model with so many layers."""
    short = copy.deepcopy(config)
    kinds = getattr(short, "layer_types", None)
    short.num_hidden_layers = layers
    if kinds is not None:
        short.layer_types = kinds[:layers]
    return short


def shape_of(config: Any) -> Any:
    """The model of a config without weights."""
    from transformers import AutoModelForCausalLM

    with META:
        return AutoModelForCausalLM.from_config(config)


def build(config: Any, job: Job, device: Device) -> TrainableModel:
    """The model with its adapter on `meta`, ready for a step.

    Raises: UserError where no layer has one of the names that the adapter is for.
    """
    from transformers import AutoModelForCausalLM

    with META:
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=job.dtype(device))
        except Exception as e:  # the library raises many kinds for a config it makes nothing of
            name = Path(getattr(config, "_name_or_path", "") or "model")
            raise library_error(e, "transformers cannot make this model", name) from e
        model.requires_grad_(False)
        model.config.use_cache = False
        if PRECISIONS[job.precision].is_quantized:
            quantize(model, job.precision, device.kind)
        lora = LoraSettings(job.rank, dropout=job.dropout, target=job.target)
        peft = attach(model, lora, seed=0)
    kept: Any = job.checkpointing
    trainable = TrainableModel(peft, META, checkpointing=kept, longest=job.longest)
    if trainable.llama is None and self_check.state_of(trainable.causal):
        trainable.way = "alone"
    if job.dropout:
        dropout.install(peft, job.dropout, trainable.dropout)
    trainable.packed_attention()
    peft.train()
    return trainable


class Step:
    """A model on `meta` that stands for one on `device`, and steps of it to be traced.

    Optimiser state and gradients are there from the beginning: a trace is of a step that is not the
    first, and of a pack that finds gradients to add to.
    """

    def __init__(self, config: Any, job: Job, device: Device) -> None:
        self.device = device
        self.tracker = Tracker("meta", config.vocab_size)
        with without_collection(), as_on(device), self.tracker:
            self.trainable = build(config, job, device)
            self.parameters = list(self.trainable.parameters.values())
            self.optimizer = _optimizer(job, self.parameters, device)
            for p in self.parameters:
                p.grad = torch.zeros_like(p)
            self.optimizer.step()

    def checkpoint(self, checkpointing: str) -> None:
        """Change what is kept for backward."""
        if self.trainable.llama is not None:
            self.trainable.llama.checkpointing = checkpointing  # type: ignore[assignment]

    def trace(self, pack: Pack) -> Trace:
        """What happens to memory in a step of this pack."""
        with without_collection(), as_on(self.device), self.tracker:
            begin(self.tracker, self.parameters, self.optimizer)
            run(self.trainable, pack, self.optimizer, self.tracker.trace)
            self.trainable.logits = None  # the next pack may be smaller
        return self.tracker.trace


def _optimizer(job: Job, parameters: list[torch.Tensor], device: Device) -> torch.optim.Optimizer:
    if job.optimizer == "paged_adamw_8bit":
        return EightBitAdamW(parameters)
    # On CUDA AdamW updates all parameters at once.
    return torch.optim.AdamW(parameters, foreach=device.kind == "cuda")


def begin(
    tracker: Tracker, parameters: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Start a trace with all that is there between two steps."""
    state = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    gradients = [p.grad for p in parameters if p.grad is not None]
    tracker.begin(adapters=parameters, gradients=gradients, optimizer=state)


def run(
    trainable: TrainableModel, pack: Pack, optimizer: torch.optim.Optimizer, trace: Trace
) -> None:
    """One pack and the optimiser's update.

    Marks: `begin`; `hidden` where the decoder's forward ends, `loss` where the loss's does,
    `update` where backward ends; `end`.
    """
    trace.mark("begin")
    hidden, loss_sum = trainable.hidden, trainable.loss_sum
    trainable.hidden = _marking(hidden, trace, "hidden")  # type: ignore
    trainable.loss_sum = _marking(loss_sum, trace, "loss")  # type: ignore
    try:
        trainable.backward([pack], max(pack.supervised, 1))
    finally:
        trainable.hidden, trainable.loss_sum = hidden, loss_sum  # type: ignore[method-assign]
    trace.mark("update")
    torch.nn.utils.clip_grad_norm_(list(trainable.parameters.values()), 1.0)
    optimizer.step()
    trace.mark("end")


def _marking(
    part: Callable[[Pack], torch.Tensor], trace: Trace, name: str
) -> Callable[[Pack], torch.Tensor]:
    def marked(pack: Pack) -> torch.Tensor:
        result = part(pack)
        trace.mark(name)
        return result

    return marked
