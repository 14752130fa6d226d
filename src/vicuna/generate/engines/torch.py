"""The PyTorch engine: our own forward pass over a tree of tokens, a LoRA unmerged.

For models of the family that `model.parts` knows, on any device and in any precision the trainer
loads; `torch_plain` serves the others. What a further turn of a chat has in common with the tree is
not computed again, also after `/undo` and along the answer of a beam.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vicuna.generate.engines.base import Cancelled, OutOfMemory, never
from vicuna.generate.engines.kv_tree import Tree
from vicuna.generate.engines.switching import Switching
from vicuna.model import answering, kernels, parts, products
from vicuna.model.decoder import Layer
from vicuna.model.memory_errors import is_memory
from vicuna.model.parts import Heads

# Tokens of a prompt computed at a time: bounds the memory of activations and the wait for a cancel.
CHUNK = 512
MAX_ROWS = 64


def open_engine(model: Any, context_length: int) -> Any:
    """The engine for a causal LM of transformers, or a PEFT model around one."""
    from vicuna.generate.engines.torch_plain import PlainEngine

    found = parts.find(causal_of(model), training=False)
    if isinstance(found, str):
        return PlainEngine(model, context_length)
    return TorchEngine(model, context_length)


def causal_of(model: Any) -> Any:
    """The causal language model itself, also where PEFT is around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class TorchEngine(Switching):
    """An `Engine` over a model whose parts are known.

    Args:
        model: a causal LM of transformers, or a PEFT model around one. Its weights are used where
            they lie; layers may lie on different devices.
        context_length: tokens that a prompt and its answer may have together.

    Raises: ValueError where the model is not of the known family.
    """

    max_rows = MAX_ROWS

    def __init__(self, model: Any, context_length: int) -> None:
        self.context_length = context_length
        self.computed = 0  # positions that went through the model so far
        self._take(model)

    def _take(self, model: Any) -> None:
        """Compute with a model from now on."""
        causal = causal_of(model)
        found = parts.find(causal, training=False)
        if isinstance(found, str):
            raise ValueError(found)
        self.model, self._parts = model, found
        self._head = causal.get_output_embeddings()
        self._layers = [Layer(block, found.eps) for block in found.blocks]
        self._places = [layer.mlp.norm.device for layer in self._layers]
        self.refresh()

    def refresh(self) -> None:
        """Take the adapters as they are now; needed where they were switched or trained."""
        for layer in self._layers:
            for group in layer.groups:
                group.refresh()
                group.hold(layer.mlp.norm.dtype)
        self.forget()

    def forget(self) -> None:
        """See `Engine.forget`."""
        heads = self._layers[0].heads
        self.tree = Tree(self._places, heads.key, heads.size, self._layers[0].mlp.norm.dtype)

    def prefill(self, prompt_ids: Sequence[int], cancel: Callable[[], bool] = never) -> Tensor:
        """See `Engine.prefill`."""
        with self._safely():
            known = self.tree.begin(prompt_ids)
        new = list(prompt_ids[known:])
        for start in range(0, len(new), CHUNK):
            if cancel():
                raise Cancelled
            with self._safely():
                last = self._read(new[start : start + CHUNK])
        with self._safely():
            return self._scores(last)[0]

    def step(self, token_ids: Sequence[int], parents: Sequence[int]) -> Tensor:
        """See `Engine.step`."""
        with self._safely():
            tree, rows = self.tree, len(token_ids)
            tree.reclaim()
            tree.reserve(tree.used + rows)
            start = tree.used
            tree.grow(token_ids, parents)
            position = len(tree.trunk) + tree.depth - 1
            hidden = {w: self._mask(w) for w in {layer.heads.window for layer in self._layers}}
            self.computed += rows
            x, cos, sin = self._embed(list(token_ids), [position] * rows)
            for number, layer in enumerate(self._layers):
                x, cos, sin = (t.to(self._places[number]) for t in (x, cos, sin))
                qkv = answering.attention_inputs(layer, x, cos, sin)
                self._write(number, qkv, layer.heads, start)
                mask = hidden[layer.heads.window]
                attended = self._look(number, qkv, layer.heads, position, mask)
                x = answering.rest(layer, attended, x)
            return self._scores(x)

    # -- one forward -------------------------------------------------------------------------------

    def _read(self, ids: list[int]) -> Tensor:
        """Append tokens to the trunk; the last hidden state (1, D), not normalised."""
        tree = self.tree
        start, stop = len(tree.trunk), len(tree.trunk) + len(ids)
        tree.reserve(stop)
        self.computed += len(ids)
        x, cos, sin = self._embed(ids, list(range(start, stop)))
        for number, layer in enumerate(self._layers):
            x, cos, sin = (t.to(self._places[number]) for t in (x, cos, sin))
            qkv = answering.attention_inputs(layer, x, cos, sin)
            self._write(number, qkv, layer.heads, start)
            attended = self._over_trunk(number, qkv, layer.heads, start, stop)
            if number == len(self._layers) - 1:
                attended, x = attended[-1:], x[-1:]
            x = answering.rest(layer, attended, x)
        tree.extend(ids)
        return x

    def _embed(self, ids: list[int], positions: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        device = self._parts.embed_device
        x = self._parts.embed(torch.tensor(ids, device=device))
        cos, sin = self._parts.rotary(x[None], torch.tensor([positions], device=device))
        return x, cos[0], sin[0]

    def _write(self, number: int, qkv: Tensor, heads: Heads, start: int) -> None:
        """Put the keys and values of new rows into their slots."""
        split = qkv.unflatten(1, (-1, heads.size)).transpose(0, 1)
        stop = start + qkv.shape[0]
        middle = heads.query + heads.key
        self.tree.keys[number][:, start:stop] = split[heads.query : middle]
        self.tree.values[number][:, start:stop] = split[middle:]

    def _over_trunk(self, number: int, qkv: Tensor, heads: Heads, start: int, stop: int) -> Tensor:
        """Attention of new rows of the trunk, (t, H D): causal over all of it."""
        q = qkv[:, : heads.query * heads.size].unflatten(1, (heads.query, heads.size))
        first = 0 if heads.window is None else max(0, start - heads.window + 1)
        k, v = (b[number][None, :, first:stop] for b in (self.tree.keys, self.tree.values))
        mask = None
        if start > 0 or (heads.window is not None and stop > heads.window):
            rows = torch.arange(start, stop, device=qkv.device)[:, None]
            columns = torch.arange(first, stop, device=qkv.device)[None]
            mask = columns <= rows
            if heads.window is not None:
                mask &= columns > rows - heads.window
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], k, v, attn_mask=mask, is_causal=mask is None,
            scale=heads.scale, enable_gqa=heads.query != heads.key,
        )  # fmt: skip
        return out[0].transpose(0, 1).flatten(1)

    def _look(
        self, number: int, qkv: Tensor, heads: Heads, position: int, hidden: Tensor | None
    ) -> Tensor:
        """Attention of the live rows over trunk and branches: (n, H D).

        The rows and the query heads that share a head of keys are rows of one product, so that
        keys are read once for all of them.
        """
        rows, groups = qkv.shape[0], heads.query // heads.key
        first = 0 if heads.window is None else max(0, position - heads.window + 1)
        first = min(first, len(self.tree.trunk))
        k = self.tree.keys[number][:, first : self.tree.used]
        v = self.tree.values[number][:, first : self.tree.used]
        q = qkv[:, : heads.query * heads.size].view(rows, heads.key, groups, heads.size)
        q = (q * heads.scale).permute(1, 2, 0, 3).reshape(heads.key, groups * rows, heads.size)
        scores = torch.bmm(q, k.transpose(1, 2))
        if hidden is not None:
            branches = scores.view(heads.key, groups, rows, -1)[..., len(self.tree.trunk) - first :]
            branches.masked_fill_(hidden.to(scores.device), float("-inf"))
        weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
        out = torch.bmm(weights, v).view(heads.key, groups, rows, heads.size)
        return out.permute(2, 0, 1, 3).reshape(rows, heads.query * heads.size)

    def _mask(self, window: int | None) -> Tensor | None:
        hidden = self.tree.hidden(window)
        return None if hidden is None else hidden.to(self._places[0])

    def _scores(self, x: Tensor) -> Tensor:
        norm = self._parts.norm
        x = x.to(norm.device)
        h = kernels.normalised(x, kernels.rms(x, self._parts.eps), norm)
        return products.product(h, self._head.weight, self._head.bias).float()

    @contextmanager
    def _safely(self) -> Iterator[None]:
        """No gradients inside; what stops between two layers leaves no sequence at all."""
        whole = False
        try:
            with torch.no_grad():
                yield
            whole = True
        except RuntimeError as e:
            if is_memory(e):
                raise OutOfMemory(str(e)) from e
            raise
        finally:
            if not whole:
                self.forget()
