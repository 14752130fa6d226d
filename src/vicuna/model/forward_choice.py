"""Which way a model is computed in training: the fastest that agrees with transformers' own.

Tried at the start of each run on a few tokens: our own forward; several examples in a pack, and the
same with their common beginning laid down once; one example at a time; the whole model. Only the
last is right for every model there is. Where a layer keeps a running state of what it read (gated
delta net, Mamba, short convolutions) a pack would hand it from example to example.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from vicuna.data.loss_mask import NEXT_TOKEN, NO_TARGET, Example
from vicuna.data.pack import MIN_SHARED, Pack, build_packs
from vicuna.errors import UserError
from vicuna.model import llama, self_check
from vicuna.model.dropout import PrefixDropout
from vicuna.model.llama import Decoder
from vicuna.model.out_of_memory import is_memory
from vicuna.model.trainable import TrainableModel

ONE_BY_ONE = "one example at a time, and no beginning is shared"


def settle(trainable: TrainableModel) -> list[str]:
    """Find the way; `trainable` takes it.

    Returns: what the user should know, a line each.

    Raises: UserError where transformers itself cannot compute the model.
    """
    trainable.way = "packed"
    still(trainable)
    trainable.plain_attention()
    with self_check.in_evaluation(trainable.model):
        found = _settle(trainable)
    trainable.packed_attention()
    return found


def still(trainable: TrainableModel) -> None:
    """Turn off what the base's own layers draw at random in training (GPT-2's dropouts, Seed-OSS's
    residual one): only the adapter's dropout is a function of the step, which a resumed run takes
    up again."""
    for name, module in trainable.causal.named_modules():
        if "lora_" in name or isinstance(module, PrefixDropout):
            continue
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for key, value in vars(module).items():
            if type(value) is float and "drop" in key:
                setattr(module, key, 0.0)


def _settle(trainable: TrainableModel) -> list[str]:
    probe = _Probe(trainable)
    if trainable.llama is not None:
        far = probe.own_forward()
        if far <= probe.allowed:
            return []
        trainable.use_fallback(
            f"ours differs from it by {far:.2g} of the scores' size, {probe.allowed:.2g} would be "
            "rounding"
        )
    said = [f"transformers' own forward is used, which is slower: {trainable.fallback_reason}"]
    why = self_check.state_of(trainable.causal) or _by_length(trainable) or probe.packed()
    if not why:
        return said
    trainable.way = "alone"
    if wrong := probe.alone():
        trainable.way = "whole"
        why += f"; {wrong}"
    return [*said, f"{ONE_BY_ONE}: {why}"]


def _by_length(trainable: TrainableModel) -> str:
    """Why examples that are longer than what is tried cannot share a pass; "" if they can."""
    config, longest = trainable.causal.config.get_text_config(), trainable.longest
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk and longest > chunk:
        return f"its attention goes by chunks of {chunk:,} tokens"
    reaches = [r for m in trainable.causal.modules() if (r := llama.rotary_reach(m)) is not None]
    return llama.LENGTH_DEPENDENT_ROTARY if any(longest > reach for reach in reaches) else ""


class _Probe:
    """Two short examples with a beginning in common, and what transformers says about them."""

    def __init__(self, trainable: TrainableModel) -> None:
        self.trainable, causal = trainable, trainable.causal
        shared = self_check.ids_of(causal, 0, MIN_SHARED)
        self.texts = [shared + self_check.ids_of(causal, seed, 8) for seed in (1, 2)]
        try:
            self.wanted = [self_check.scores_of(causal, text) for text in self.texts]
            self.allowed = self_check.rounding(causal)
        except Exception as e:  # a model of any library's making
            if is_memory(e) or isinstance(e, UserError):
                raise
            raise UserError(
                "transformers cannot compute {type}: {error_type}: {error}",
                type=type(causal).__name__,
                error_type=type(e).__name__,
                error=str(e).strip().splitlines()[0] if str(e).strip() else "",
                where="model",
                fix="Take a base that computes next tokens from token ids alone.",
            ) from e

    def own_forward(self) -> float:
        """How far our own forward is from transformers': over packs, with narrow windows, and at
        the end of the context."""
        trainable = self.trainable
        causal, before = trainable.causal, trainable.llama
        try:
            far = max(self._furthest(self._packs(share=True)), self._far_away())
            with self_check.narrow(causal):
                found = llama.view_of(causal, longest=trainable.longest)
                if isinstance(found, str):
                    return math.inf
                trainable.llama = Decoder(found, tuning=trainable.tuning)
                wanted = [self_check.scores_of(causal, text) for text in self.texts]
                return max(far, self._furthest(self._packs(share=True), wanted))
        except Exception as e:  # a model that only looks like one of the family
            if is_memory(e):
                raise
            return math.inf
        finally:
            trainable.llama = before

    def _far_away(self) -> float:
        """The same where the last positions are that the model was made for."""
        config = self.trainable.causal.config
        last = int(getattr(config, "max_position_embeddings", 0) or 0)
        start = last - len(self.texts[0])
        if start <= 0:
            return 0.0
        wanted = self_check.scores_of(self.trainable.causal, self.texts[0], start)
        (pack,) = self._packs(share=False, texts=self.texts[:1])
        pack.positions = pack.positions + start
        return self._furthest([pack], [wanted, self.wanted[1]])

    def packed(self) -> str:
        """Why packs are not exact, in words; "" if they are."""
        trainable = self.trainable
        with self_check.narrow(trainable.causal):
            try:
                wanted = [self_check.scores_of(trainable.causal, text) for text in self.texts]
                trainable.packed_attention()
                far = max(
                    self._furthest(self._packs(share=share), wanted) for share in (False, True)
                )
            except Exception as e:  # whatever a model says to arguments that it does not know
                if is_memory(e):
                    raise
                return f"it does not take several in a pass ({type(e).__name__})"
            finally:
                trainable.plain_attention()
        if far <= self.allowed:
            return ""
        return f"two in a pass differ from each alone by {far:.2g} of the scores' size"

    def alone(self) -> str:
        """Why its hidden states times its output matrix are not its scores; "" if they are."""
        try:
            packs = [self._packs(share=False, texts=[text]) for text in self.texts]
            far = max(self._furthest(p) for p in packs)
        except Exception as e:  # as above
            if is_memory(e):
                raise
            return f"scores are the whole model's ({type(e).__name__})"
        return "" if far <= self.allowed else "scores are the whole model's"

    def _packs(self, share: bool, texts: list[list[int]] | None = None) -> list[Pack]:
        examples = [_example(text) for text in texts or self.texts]
        return build_packs(examples, 0, budget=1 << 20, share=share)

    def _furthest(self, packs: Iterable[Pack], wanted: list[torch.Tensor] | None = None) -> float:
        """The largest distance of a row's scores from those of the text that it belongs to."""
        # Every row is known by the tokens up to it.
        rows: dict[int, torch.Tensor] = {}
        for text, scores in zip(self.texts, self.wanted if wanted is None else wanted):
            (alone,) = self._packs(share=False, texts=[text])
            rows |= {int(h): row for h, row in zip(alone.prefix_hashes, scores)}
        far = 0.0
        for pack in packs:
            right = torch.stack([rows[int(h)] for h in pack.prefix_hashes[pack.target_rows]])
            found = self.trainable.scores(pack)
            far = max(far, self_check.distance(found, right.to(found.device)))
        return far


def _example(text: list[int]) -> Example:
    """A text of which every token but the first is to be learned."""
    labels = np.full(len(text), NEXT_TOKEN, np.uint8)
    labels[-1] = NO_TARGET
    return Example(np.array(text, np.int32), labels)
