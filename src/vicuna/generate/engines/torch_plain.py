"""The PyTorch engine for every other model of transformers: rows are a batch, as `generate` has it.

Its forward pass and its cache are transformers'. A sequence's keys and values, or the states of its
layers, stay in one cache; a new prompt keeps of it what both begin with. Where beams fork the cache
is reordered, as it is in `generate`: slower than a tree. What a kind of model makes of its cache is
tried on a few tokens first: what does not agree with the model without a cache is not used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, Literal

import torch
from torch import Tensor

from vicuna.generate.engines.base import Cancelled, OutOfMemory, never
from vicuna.generate.engines.switching import CHUNK, MAX_ROWS, Switching, causal_of
from vicuna.model import fused, self_check
from vicuna.model.out_of_memory import is_memory
from vicuna.model.peft_switches import Watch

# What a cache is good for. kept: a further prompt goes on where an earlier one ended. steps: token
# by token behind a prompt that was read in one piece. nothing: all is computed again each time.
Trust = Literal["kept", "steps", "nothing"]


class PlainEngine(Switching):
    """An `Engine` over any causal LM of transformers, or a PEFT model around one.

    Args:
        context_length: tokens that a prompt and its answer may have together.
    """

    max_rows = MAX_ROWS

    def __init__(self, model: Any, context_length: int) -> None:
        self.model = model
        self.context_length = context_length
        self._causal = causal_of(model)
        keeps_last = "logits_to_keep" in inspect.signature(self._causal.forward).parameters
        self._last_only = {"logits_to_keep": 1} if keeps_last else {}
        self.computed = 0  # positions that went through the model so far
        self._trust: Trust | None = None  # not known yet
        self._trying = False
        self._watch = Watch(model)
        self.forget()

    @property
    def trust(self) -> Trust:
        """What this model's cache is good for."""
        if self._trust is None:
            before, self._trying = self.computed, True
            try:
                self._trust = self._tried()
            finally:
                self.computed, self._trying = before, False
                self.forget()
        return self._trust

    def refresh(self) -> None:
        """What was computed with other weights is of no use."""
        self.forget()

    def _take(self, model: Any) -> None:
        self.model = model
        fused.install(model)
        self._watch = Watch(model)
        self.refresh()

    def forget(self) -> None:
        """See `Engine.forget`."""
        self._mixed = False
        self._rows: list[list[int]] = [[]]  # the ids whose keys and values the cache holds
        self._cache: Any = None

    def prefill(self, prompt_ids: Sequence[int], cancel: Callable[[], bool] = never) -> Tensor:
        """See `Engine.prefill`."""
        prompt = list(prompt_ids)
        changed = self._watch.changed(search=True)
        if changed or self._mixed or self.trust != "kept":
            self.forget()
        lengths = [_common(row, prompt) for row in self._rows]
        best = max(range(len(lengths)), key=lambda i: lengths[i])
        self._select([best])
        # The last token is always computed: its scores are what is asked for.
        self._keep(min(lengths[best], len(prompt) - 1))
        new = prompt[len(self._rows[0]) :]
        chunk = CHUNK if self.trust == "kept" else len(new)
        for start in range(0, len(new), chunk):
            if cancel():
                raise Cancelled
            scores = self._forward([new[start : start + chunk]])
        return scores[0]

    def step(self, token_ids: Sequence[int], parents: Sequence[int]) -> Tensor:
        """See `Engine.step`."""
        # What was computed before a switch stays in the cache of this answer, not of the next.
        self._mixed |= self._watch.changed()
        self._select(parents)
        return self._forward([[t] for t in token_ids])

    def _select(self, parents: Sequence[int]) -> None:
        """Make the cache's rows those of `parents`."""
        if list(parents) == list(range(len(self._rows))):
            return
        with self._whole_or_forgotten():
            if self._cache is not None:
                device = self._causal.get_input_embeddings().weight.device
                index = torch.tensor(list(parents), device=device)
                self._cache.reorder_cache(index)
            self._rows = [list(self._rows[p]) for p in parents]

    def _keep(self, length: int) -> None:
        """Cut the sequence back to its first `length` tokens, to none where that is impossible."""
        surplus = len(self._rows[0]) - length
        if not surplus:
            return
        # Layers with a sliding window raise: what would come back into sight is gone.
        with suppress(RuntimeError, ValueError), self._whole_or_forgotten():
            self._cache.crop(-surplus)
            del self._rows[0][length:]

    def _forward(self, ids: list[list[int]]) -> Tensor:
        """Append `ids` to the rows; the scores after the last of each, float32 (n, V)."""
        cached = self.trust != "nothing"
        if cached and self._cache is None:
            from transformers import DynamicCache

            self._cache = DynamicCache(config=self._causal.config)
        given = ids if cached else [row + new for row, new in zip(self._rows, ids)]
        cache = {"past_key_values": self._cache} if cached else {}
        device = self._causal.get_input_embeddings().weight.device
        self.computed += sum(map(len, given))
        try:
            answering = nullcontext() if self._trying else _answering(self.model)
            with self._whole_or_forgotten(), answering:
                output = self.model(
                    input_ids=torch.tensor(given, device=device),
                    use_cache=cached,
                    **cache,
                    **self._last_only,
                )
                for row, new in zip(self._rows, ids):
                    row += new
        except RuntimeError as e:
            if is_memory(e):
                raise OutOfMemory(str(e)) from e
            raise
        scores: Tensor = output.logits[:, -1].float()
        return scores

    def _tried(self) -> Trust:
        """Read, fork, go back and go on, with and without the cache, on a few tokens."""
        with self_check.narrow(self._causal), self_check.in_evaluation(self.model):
            allowed = self_check.rounding(self._causal)
            found: tuple[Trust, ...] = ("kept", "steps")
            for trust in found:
                self._trust = trust
                self.forget()
                try:
                    if all(far <= allowed for far in self._distances()):
                        return trust
                except Exception as e:  # a cache that is not of its kind fails in many ways
                    if is_memory(e) or isinstance(e, OutOfMemory):
                        raise
        return "nothing"

    def _distances(self) -> Iterator[float]:
        """How far scores with the cache are from those without, on the way through a few tokens."""
        text, other = (self_check.ids_of(self._causal, seed, 16) for seed in (0, 1))
        paths: list[list[int]] = []

        def far(scores: Tensor) -> float:
            return self_check.distance(scores, self_check.last_scores(self._causal, paths))

        for prompt in (text[:9], text[:13], text[:5] + other[:7]):
            paths = [prompt]
            yield far(self.prefill(prompt)[None])
            for parents in ([0, 0, 0], [2, 0], [1, 1, 0]):
                tokens = other[len(parents) : 2 * len(parents)]
                paths = [[*paths[p], t] for p, t in zip(parents, tokens)]
                yield far(self.step(tokens, parents))

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
