"""One optimiser step's loss and gradients: packs through the decoder, the loss at supervised rows.

The result is that of the step's examples run one by one, up to rounding, however they were packed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vicuna.config.checkpointing import CheckpointingLevel
from vicuna.data.pack import Pack, padded
from vicuna.errors import UserError
from vicuna.model import attention, loss
from vicuna.model.attention_layout import PackLayout
from vicuna.model.dropout import DropoutState
from vicuna.model.llama import Decoder, view_of
from vicuna.model.tuning import Tuning

# How a model may be computed. packed: several examples in one pass, none seeing another; alone: one
# example in a pass, as transformers' decoder computes a text; whole: the same, and the scores are
# those of the whole model, where they are not the hidden states times one matrix.
Way = Literal["packed", "alone", "whole"]


def _plain_head(causal: Any) -> Any:
    """The output matrix's module.

    Raises: UserError where an adapter changes it: the loss is computed with the matrix alone.
    """
    head = causal.get_output_embeddings()
    if hasattr(head, "base_layer"):
        raise UserError(
            "the output matrix (lm_head) has an adapter, which cannot be trained here",
            where="lora_target",
            fix="Leave lm_head out of lora_target, or begin with an adapter without it.",
        )
    return head


@dataclass
class TrainableModel:
    """A causal language model with an adapter, and how to get a loss from it.

    model: a PEFT model (or a bare causal LM for evaluation).
    checkpointing: what backward computes again. way: how much
    of the model is known to be right (`ways.settle` finds out). longest: tokens of the longest
    example, 0 if that is not known. tuning: None: of the device. on_phase: told in a step when
    `hidden` and `loss` of a pack are reached. logits: memory for them that packs share, on a CPU.
    """

    model: Any
    device: torch.device
    dropout: DropoutState = field(default_factory=DropoutState)
    checkpointing: CheckpointingLevel = "none"
    way: Way = "packed"
    longest: int = 0
    tuning: Tuning | None = None
    on_phase: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        self._tuning = tuning = self.tuning or Tuning.of(self.device)
        get_base = getattr(self.model, "get_base_model", None)
        self.causal = causal = get_base() if get_base else self.model
        found = view_of(causal, longest=self.longest)
        # Our own forward where the model is of the family we know, else transformers' with PEFT's
        # layers; why is for the user to see.
        self.llama: Decoder | None = None
        self.fallback_reason = ""
        if isinstance(found, str):
            self.use_fallback(found)
        else:
            self.llama = Decoder(found, self.checkpointing, tuning)
            self.llama.copy_out_of_mmap(causal)
        self.decoder = causal.get_decoder()
        if not hasattr(self.decoder, "config"):  # ModernBERT's "decoder" is its output matrix
            self.decoder = causal.base_model
        self.head = _plain_head(causal)
        self._frozen = {n: p for n, p in causal.named_parameters() if ".lora_" not in n}
        # Gemma 2 has no sdpa: what transformers chose when it loaded the model is what fits it.
        chosen = self.decoder.config._attn_implementation
        self.plain = "sdpa" if chosen == attention.NAME else chosen
        config = causal.config.get_text_config()
        self.logits: Tensor | None = None
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        scale = getattr(config, "logit_scale", None)
        divisor = getattr(config, "logits_scaling", None)
        self.logit_scale = float(scale or 1.0) / float(divisor or 1.0)

    def _reached(self, phase: str) -> None:
        if self.on_phase is not None:
            self.on_phase(phase)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The trainable parameters by name, in a fixed order."""
        named = ((n, p) for n, p in self.model.named_parameters() if p.requires_grad)
        return dict(sorted(named, key=lambda x: x[0]))

    def use_fallback(self, why: str) -> None:
        """Take transformers' own forward from now on."""
        self.llama, self.fallback_reason = None, why
        if self.checkpointing == "none":
            return
        try:
            self.causal.gradient_checkpointing_enable({"use_reentrant": False})
        except (ValueError, AttributeError, NotImplementedError) as e:
            raise UserError(
                "{type} cannot compute layers twice: {error}",
                type=type(self.causal).__name__,
                error=e,
                where="gradient_checkpointing",
                fix="Use --gradient_checkpointing none.",
            ) from e

    def packed_attention(self) -> None:
        """Switch the decoder to attention over packs, where it computes packs."""
        if self.way != "packed":
            return
        attention.register()
        self.decoder.config._attn_implementation = attention.NAME

    def plain_attention(self) -> None:
        """Switch the decoder back to ordinary attention, for generation."""
        self.decoder.config._attn_implementation = self.plain

    def hidden(self, pack: Pack) -> Tensor:
        """The last hidden states of a pack's rows with a target: (N, D)."""
        ids = torch.from_numpy(pack.ids).to(self.device)
        positions = torch.from_numpy(pack.positions).to(self.device)
        rows = torch.from_numpy(pack.target_rows).to(self.device)
        layout = PackLayout(pack.segments)
        hashes = torch.from_numpy(pack.prefix_hashes).to(self.device)
        if self.llama is not None:
            self._check_frozen()
            dropping = self.model.training and self.dropout.active
            return self.llama(ids, positions, layout, rows, hashes if dropping else None)
        self.dropout.rows = hashes[None]
        if self.way != "packed":
            alone: Tensor = self.decoder(input_ids=ids[None], use_cache=False).last_hidden_state[0]
            return alone[rows]
        output = self.decoder(
            input_ids=ids[None],
            position_ids=positions[None],
            attention_mask=None,
            use_cache=False,
            packed=layout,
        )
        states: Tensor = output.last_hidden_state[0]
        return states[rows]

    def loss_sum(self, pack: Pack) -> Tensor:
        """Sum of the cross-entropies of a pack's targets, a float32 scalar with its graph."""
        if self.way == "whole":
            return self._whole_loss(pack)
        if self.way == "packed" and self.head.weight.dtype != torch.float32:
            pack = padded(pack, self._tuning.pad_rows)
        hidden = self.hidden(pack)
        self._reached("hidden")
        return loss.cross_entropy_sum(
            hidden,
            self.head.weight,
            torch.from_numpy(pack.target_ids).to(self.device),
            torch.from_numpy(pack.weights).to(self.device),
            bias=getattr(self.head, "bias", None),
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            tuning=self._tuning,
            room=self._room(len(pack.target_rows)),
        )

    def _whole_loss(self, pack: Pack) -> Tensor:
        """The same by the model's own scores."""
        ids, rows, targets, weights = (
            torch.from_numpy(a).to(self.device)
            for a in (pack.ids, pack.target_rows, pack.target_ids, pack.weights)
        )
        self.dropout.rows = torch.from_numpy(pack.prefix_hashes).to(self.device)[None]
        scores = self.causal(input_ids=ids[None], use_cache=False).logits[0, rows].float()
        return (F.cross_entropy(scores, targets, reduction="none") * weights).sum()

    def scores(self, pack: Pack) -> Tensor:
        """What is said after each row with a target, float32 (N, V): small packs only."""
        if self.way == "whole":
            ids = torch.from_numpy(pack.ids).to(self.device)[None]
            own: Tensor = self.causal(input_ids=ids, use_cache=False).logits[0, pack.target_rows]
            return own.float()
        bias = getattr(self.head, "bias", None)
        scores = F.linear(self.hidden(pack), self.head.weight, bias).float() * self.logit_scale
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        return scores

    def _check_frozen(self) -> None:
        """Our own backward gives gradients to adapters alone.

        Raises: UserError where a weight of the base is to be trained, too.
        """
        wanted = next((n for n, p in self._frozen.items() if p.requires_grad), None)
        if wanted is not None and torch.is_grad_enabled():
            raise UserError(
                "{value} is to be trained, but only adapters can be",
                value=wanted,
                where="model",
                fix="Freeze it again: requires_grad_(False) for all but the adapter.",
            )

    def _room(self, rows: int) -> Tensor | None:
        """Memory for the logits of so many rows, where packs share it; else None."""
        rows = min(rows, self._tuning.loss_rows)
        if self._tuning.share_logits and (self.logits is None or len(self.logits) < rows):
            self.logits = None  # before the next, which may have its place
            self.logits = self.head.weight.new_empty(rows, self.head.weight.shape[0])
        return self.logits

    def backward(self, packs: Iterable[Pack], supervised: int, loss_scale: float = 1.0) -> float:
        """Add a step's gradients to the parameters; the mean loss over its supervised tokens.

        Args:
            supervised: tokens with a target in the whole step (all packs, all devices).
            loss_scale: keeps fp16 gradients above underflow; divide gradients by it afterwards.
        """
        total = 0.0
        for pack in packs:
            value = self.loss_sum(pack)
            self._reached("loss")
            (value * (loss_scale / supervised)).backward()
            total += value.item()
        return total / supervised

    @torch.no_grad()
    def mean_loss(self, packs: Iterable[Pack]) -> tuple[float, int]:
        """(mean loss, supervised tokens) without gradients; dropout is off."""
        training = self.model.training
        self.model.eval()
        total, count = 0.0, 0
        try:
            for pack in packs:
                total += self.loss_sum(pack).item()
                count += pack.supervised
        finally:
            self.model.train(training)
        return total / max(count, 1), count
