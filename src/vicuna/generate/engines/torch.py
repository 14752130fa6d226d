"""The PyTorch engine: any causal language model of transformers, also with a LoRA unmerged.

The sequence's keys and values stay in one cache. A new prompt keeps of it what both begin with, so
a further turn of a chat computes only its new tokens; also after `/undo`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from vicuna.generate.engines.base import Cancelled, OutOfMemory, never

# Tokens of a prompt computed at a time: bounds the memory of activations and the wait for a cancel.
CHUNK = 512


class TorchEngine:
    """An `Engine` over a transformers model, wherever its weights lie.

    Args:
        model: a causal LM of transformers, or a PEFT model around one.
        context_length: tokens that a prompt and its answer may have together.
    """

    def __init__(self, model: Any, context_length: int) -> None:
        self.model = model
        self.context_length = context_length
        self._causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        keeps_last = "logits_to_keep" in inspect.signature(self._causal.forward).parameters
        self._last_only = {"logits_to_keep": 1} if keeps_last else {}
        self.forget()

    def forget(self) -> None:
        """Drop the sequence and free its memory; needed where weights or the adapter changed."""
        self._held: list[int] = []  # the ids whose keys and values the cache holds
        self._cache: Any = None

    def prefill(self, prompt_ids: Sequence[int], cancel: Callable[[], bool] = never) -> Tensor:
        """See `Engine.prefill`."""
        prompt = list(prompt_ids)
        # The last token is always computed: its scores are what is asked for.
        known = min(_common(self._held, prompt), len(prompt) - 1)
        self._keep(known)
        new = prompt[len(self._held) :]
        for start in range(0, len(new), CHUNK):
            if cancel():
                raise Cancelled
            scores = self._forward(new[start : start + CHUNK])
        return scores

    def step(self, token_id: int) -> Tensor:
        """See `Engine.step`."""
        return self._forward([token_id])

    def _keep(self, length: int) -> None:
        """Cut the sequence back to its first `length` tokens, to none where that is impossible."""
        surplus = len(self._held) - length
        if not surplus:
            return
        # Layers with a sliding window raise: what would come back into sight is gone.
        with suppress(RuntimeError, ValueError), self._whole_or_forgotten():
            self._cache.crop(-surplus)
            del self._held[length:]

    def _forward(self, ids: list[int]) -> Tensor:
        """Append `ids` to the sequence; the scores after the last of them, float32 (V,)."""
        if self._cache is None:
            from transformers import DynamicCache

            self._cache = DynamicCache(config=self._causal.config)
        device = self._causal.get_input_embeddings().weight.device
        try:
            with self._whole_or_forgotten(), _answering(self.model):
                output = self.model(
                    input_ids=torch.tensor([ids], device=device),
                    past_key_values=self._cache,
                    use_cache=True,
                    **self._last_only,
                )
                self._held += ids
        except RuntimeError as e:
            if _is_memory(e):
                raise OutOfMemory(str(e)) from e
            raise
        scores: Tensor = output.logits[0, -1].float()
        return scores

    @contextmanager
    def _whole_or_forgotten(self) -> Iterator[None]:
        """A change of the cache that stops between two layers leaves no sequence at all."""
        whole = False
        try:
            yield
            whole = True
        finally:
            if not whole:
                self.forget()


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest prefix that both have."""
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return min(len(a), len(b))


@contextmanager
def _answering(model: Any) -> Iterator[None]:
    """No gradients and no dropout inside; a model that is being trained goes on training after."""
    if not model.training:
        with torch.inference_mode():
            yield
        return
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        # Not inference_mode: what a model computes once and keeps must serve autograd later.
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _is_memory(error: RuntimeError) -> bool:
    """Whether memory ran out: CUDA has a type for it, the CPU and Apple's GPU only words."""
    words = str(error).lower()
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "out of memory" in words
        or "can't allocate memory" in words
    )
