"""The PyTorch engine for every other model of transformers: rows are a batch, as `generate` has it.

Its forward pass and its cache are transformers'. A sequence's keys and values, or the states of its
layers, stay in one cache; a new prompt keeps of it what both begin with. Where beams fork the cache
is reordered, as it is in `generate`: slower than a tree. What a kind of model makes of its cache is
tried on a few tokens first: what does not agree with the model without a cache is not used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, Literal

import torch
from torch import Tensor

from vicuna.generate.engines.base import (
    CHUNK,
    Cancelled,
    OutOfMemory,
    check_rows,
    common_prefix,
    never,
    reset_on_failure,
)
from vicuna.model import adapter as adapters
from vicuna.model import fused_lora, self_check
from vicuna.model.adapter import AdapterFiles
from vicuna.model.out_of_memory import is_memory
from vicuna.model.peft_switches import Watch

# What a cache is good for. kept: a further prompt goes on where an earlier one ended. steps: token
# by token behind a prompt that was read in one piece. nothing: all is computed again each time.
Trust = Literal["kept", "steps", "nothing"]
MAX_ROWS = 64


def causal_of(model: Any) -> Any:
    """The causal language model itself, also where PEFT is around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class PeftAdapters:
    """How an engine over a model of transformers, or PEFT's around one, handles adapters."""

    model: Any
    about = ""

    def reset(self) -> None:
        """Implemented by the engine."""
        raise NotImplementedError

    def refresh(self) -> None:
        """Read the adapters again, and reset."""
        raise NotImplementedError

    def _take(self, model: Any) -> None:
        """Compute with this model from now on."""
        raise NotImplementedError

    def load_adapter(self, name: str, files: AdapterFiles) -> None:
        """Attach an adapter with PEFT, unmerged. Raises: UserError if it does not fit the base."""
        peft = adapters.attach_saved(self.model, files, name=name)
        peft.eval()  # PEFT has put each layer's adapter where that layer is
        _use(peft, {})
        self._take(peft)

    def drop_adapter(self, name: str) -> None:
        """Delete an adapter; none is active afterwards."""
        self.model.delete_adapter(name)
        self.use_adapters({})

    def use_adapters(self, mix: Mapping[str, float]) -> None:
        """Activate these adapters alone, each scaled, and reset."""
        _use(self.model, mix)
        self.refresh()

    def close(self) -> None:
        """Drop the cache. The model belongs to the caller."""
        self.reset()


def _use(model: Any, mix: Mapping[str, float]) -> None:
    """Make adapters of a PEFT model the active ones; none if the mix is empty."""
    if not hasattr(model, "get_base_model"):  # no adapter was attached to it yet
        return
    if not mix:
        model.base_model.disable_adapter_layers()
        return
    model.base_model.enable_adapter_layers()
    model.base_model.set_adapter(list(mix))
    for module in model.modules():
        if hasattr(module, "set_scale") and hasattr(module, "lora_A"):
            for name, strength in mix.items():
                module.set_scale(name, strength)


class PlainEngine(PeftAdapters):
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
        self.reset()

    @property
    def trust(self) -> Trust:
        """What this model's cache is good for."""
        if self._trust is None:
            before, self._trying = self.computed, True
            try:
                self._trust = self._tried()
            finally:
                self.computed, self._trying = before, False
                self.reset()
        return self._trust

    def refresh(self) -> None:
        """What was computed with other weights is of no use."""
        self.reset()

    def _take(self, model: Any) -> None:
        self.model = model
        fused_lora.install(model)
        self._watch = Watch(model)
        self.refresh()

    def reset(self) -> None:
        self._mixed = False
        self._rows: list[list[int]] = [[]]  # the ids whose keys and values the cache holds
        self._cache: Any = None

    def prefill(self, prompt_ids: Sequence[int], cancel: Callable[[], bool] = never) -> Tensor:
        prompt = list(prompt_ids)
        changed = self._watch.changed(search=True)
        if changed or self._mixed or self.trust != "kept":
            self.reset()
        lengths = [common_prefix(row, prompt) for row in self._rows]
        best = max(range(len(lengths)), key=lambda i: lengths[i])
        self._select([best])
        # The last token is always computed: its logits are what is asked for.
        self._keep(min(lengths[best], len(prompt) - 1))
        new = prompt[len(self._rows[0]) :]
        chunk = CHUNK if self.trust == "kept" else len(new)
        for start in range(0, len(new), chunk):
            if cancel():
                raise Cancelled
            logits = self._forward([new[start : start + chunk]])
        return logits[0]

    def step(self, token_ids: Sequence[int], parents: Sequence[int]) -> Tensor:
        check_rows(token_ids, parents, len(self._rows), self.max_rows)
        # What was computed before a switch stays in the cache of this answer, not of the next.
        self._mixed |= self._watch.changed()
        self._select(parents)
        return self._forward([[t] for t in token_ids])

    def _select(self, parents: Sequence[int]) -> None:
        """Make the cache's rows those of `parents`."""
        if list(parents) == list(range(len(self._rows))):
            return
        with reset_on_failure(self):
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
        with suppress(RuntimeError, ValueError), reset_on_failure(self):
            self._cache.crop(-surplus)
            del self._rows[0][length:]

    def _forward(self, ids: list[list[int]]) -> Tensor:
        """Append `ids` to the rows; the logits after the last of each, float32 (n, V)."""
        cached = self.trust != "nothing"
        if cached and self._cache is None:
            from transformers import DynamicCache

            self._cache = DynamicCache(config=self._causal.config)
        given = ids if cached else [row + new for row, new in zip(self._rows, ids)]
        cache = {"past_key_values": self._cache} if cached else {}
        device = self._causal.get_input_embeddings().weight.device
        self.computed += sum(map(len, given))
        inference = nullcontext() if self._trying else _inference(self.model)
        with reset_on_failure(self), inference:
            output = self.model(
                input_ids=torch.tensor(given, device=device),
                use_cache=cached,
                **cache,
                **self._last_only,
            )
            for row, new in zip(self._rows, ids):
                row += new
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def _tried(self) -> Trust:
        """Read, fork, go back and go on, with and without the cache, on a few tokens."""
        with self_check.narrow(self._causal), self_check.in_evaluation(self.model):
            allowed = self_check.rounding(self._causal)
            found: tuple[Trust, ...] = ("kept", "steps")
            for trust in found:
                self._trust = trust
                self.reset()
                try:
                    if all(far <= allowed for far in self._distances()):
                        return trust
                except Exception as e:  # a cache that is not of its kind fails in many ways
                    if is_memory(e) or isinstance(e, OutOfMemory):
                        raise
        return "nothing"

    def _distances(self) -> Iterator[float]:
        """How far logits with the cache are from those without, on the way through a few tokens."""
        text, other = (self_check.ids_of(self._causal, seed, 16) for seed in (0, 1))
        paths: list[list[int]] = []

        def far(logits: Tensor) -> float:
            return self_check.distance(logits, self_check.last_scores(self._causal, paths))

        for prompt in (text[:9], text[:13], text[:5] + other[:7]):
            paths = [prompt]
            yield far(self.prefill(prompt)[None])
            for parents in ([0, 0, 0], [2, 0], [1, 1, 0]):
                tokens = other[len(parents) : 2 * len(parents)]
                paths = [[*paths[p], t] for p, t in zip(parents, tokens)]
                yield far(self.step(tokens, parents))


@contextmanager
def _inference(model: Any) -> Iterator[None]:
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
