"""One real training step on tensors without data, and what it does to memory.

The step is that of `TrainableModel`: whatever it comes to do, the plan follows.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vicuna.config.checkpointing import CheckpointingLevel
from vicuna.config.precisions import PRECISIONS
from vicuna.data.pack import Pack, PackSegment
from vicuna.memory.devices import Device
from vicuna.memory.emulate_device import (
    EightBitAdamW,
    EmulatedAttention,
    attend_as_on,
    quantize,
    recompute_as_on,
)
from vicuna.memory.tracker import Trace, Tracker, without_collection
from vicuna.model import dropout, self_check
from vicuna.model.adapter import LoraSettings, attach
from vicuna.model.config_files import library_error
from vicuna.model.load import dtype_of
from vicuna.model.trainable import TrainableModel
from vicuna.model.tuning import Tuning

META = torch.device("meta")


@dataclass(frozen=True)
class StepSpec:
    """What decides the memory of a step, besides the base's shape and the device.

    precision: one of `config.precisions`. checkpointing: none, selective, full or offload.
    tokens: computed at a time. longest: tokens of the longest example. rank, target, dropout:
    the adapter's. optimizer: adamw or paged_adamw_8bit.
    """

    precision: str
    checkpointing: CheckpointingLevel
    tokens: int
    longest: int
    rank: int = 8
    target: tuple[str, ...] = ("all",)
    dropout: float = 0.0
    optimizer: str = "adamw"

    def dtype(self, device: Device) -> torch.dtype:
        """The type of activations and of weights that are not quantised."""
        return dtype_of(self.precision, device.fastest)


def worst_pack(spec: StepSpec) -> Pack:
    """As many examples of the longest length as fit into the rows, every token a target: no pack
    of the run needs more."""
    length = min(spec.longest, spec.tokens)
    stops = [*range(length, spec.tokens, length), spec.tokens]
    segments = [PackSegment(a, b) for a, b in zip([0, *stops], stops)]
    return pack_of(segments, np.arange(spec.tokens))


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


def build(config: Any, spec: StepSpec, device: Device) -> TrainableModel:
    """The model with its adapter on `meta`, ready for a step.

    Raises: UserError if no layer has one of the names that the adapter is for.
    """
    from transformers import AutoModelForCausalLM

    with META:
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=spec.dtype(device))
        except Exception as e:  # the library raises many kinds for a config it makes nothing of
            name = Path(getattr(config, "_name_or_path", "") or "model")
            raise library_error(e, "transformers cannot make this model", name) from e
        model.requires_grad_(False)
        model.config.use_cache = False
        if PRECISIONS[spec.precision].is_quantized:
            quantize(model, spec.precision, device.kind)
        lora = LoraSettings(spec.rank, dropout=spec.dropout, target=spec.target)
        peft = attach(model, lora, seed=0)
    trainable = TrainableModel(
        peft,
        META,
        checkpointing=spec.checkpointing,
        longest=spec.longest,
        tuning=Tuning.of(device.kind),
    )
    if trainable.llama is not None:
        trainable.llama.attend = attend_as_on(device, trainable.llama.attend)
    if trainable.llama is None and spec.checkpointing != "none":
        recompute_as_on(device, trainable.causal)
    if trainable.llama is None and self_check.state_of(trainable.causal):
        trainable.way = "alone"
    if spec.dropout:
        dropout.install(peft, spec.dropout, trainable.dropout)
    trainable.packed_attention()
    peft.train()
    return trainable


class Step:
    """A model on `meta` that stands for one on `device`, and steps of it to be traced.

    Optimiser state and gradients are there from the beginning: a trace is of a step that is not the
    first, and of a pack that finds gradients to add to.
    """

    def __init__(self, config: Any, spec: StepSpec, device: Device) -> None:
        self.device = device
        self.tracker = Tracker("meta", config.vocab_size)
        with without_collection(), EmulatedAttention(device), self.tracker:
            self.trainable = build(config, spec, device)
            self.parameters = list(self.trainable.parameters.values())
            self.optimizer = _optimizer(spec, self.parameters, device)
            for p in self.parameters:
                p.grad = torch.zeros_like(p)
            self.optimizer.step()

    def checkpoint(self, checkpointing: CheckpointingLevel) -> None:
        """Change what is kept for backward."""
        if self.trainable.llama is not None:
            self.trainable.llama.checkpointing = checkpointing

    def trace(self, pack: Pack) -> Trace:
        """What happens to memory in a step of this pack."""
        with without_collection(), EmulatedAttention(self.device), self.tracker:
            begin(self.tracker, self.parameters, self.optimizer)
            run(self.trainable, pack, self.optimizer, self.tracker.trace)
            self.trainable.logits = None  # the next pack may be smaller
        return self.tracker.trace


def _optimizer(
    spec: StepSpec, parameters: list[torch.Tensor], device: Device
) -> torch.optim.Optimizer:
    if spec.optimizer == "paged_adamw_8bit":
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
    """One pack and the optimiser's update of the weights.

    Marks: `begin`; `hidden` when the decoder's forward ends, `loss` when the loss's does,
    `update` when backward ends; `end`.
    """
    trace.mark("begin")
    trainable.on_phase = trace.mark
    try:
        trainable.backward([pack], max(pack.supervised, 1))
    finally:
        trainable.on_phase = None
    trace.mark("update")
    torch.nn.utils.clip_grad_norm_(list(trainable.parameters.values()), 1.0)
    optimizer.step()
    trace.mark("end")
