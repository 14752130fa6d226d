"""The PyTorch engine: our own forward pass over a tree of tokens, a LoRA unmerged.

For models of the family that `model.llama` knows, on any device and in any precision the trainer
loads; `torch_plain` serves the others. What a further turn of a chat has in common with the tree is
not computed again, also after `/undo` and along the answer of a beam.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from vicuna.config import AnswerSettings
from vicuna.errors import UserError
from vicuna.generate.engines.base import (
    CHUNK,
    Cancelled,
    Engine,
    check_adapter,
    check_rows,
    never,
    reset_on_failure,
)
from vicuna.generate.engines.transformers import MAX_ROWS, PeftAdapters, PlainEngine, causal_of
from vicuna.generate.engines.tree_cache import CacheType, TreeCache
from vicuna.model import device_map, linear, load, self_check
from vicuna.model.adapter import AdapterFiles
from vicuna.model.attention_layout import AttentionShape
from vicuna.model.base import locate
from vicuna.model.layers import infer_norm, signed_sin
from vicuna.model.linear import LinearGroup, release_weight
from vicuna.model.llama import DecoderView, Layer, view_of
from vicuna.model.out_of_memory import is_memory

# Rotary angles are made for so many positions at a time.
ANGLES = 1024


def load_engine(
    base: str, settings: AnswerSettings, files: AdapterFiles | None
) -> tuple[Engine, Path]:
    """The base's weights in memory, and an engine over them: `base.load_engine` for "torch"."""
    devices = device_map.devices(settings.device_map)
    folder = locate(base)
    check_adapter(files, base, folder, settings)
    precision = load.choose(settings.precision, devices[0])
    if len(devices) == 1:
        model = load.load_base(folder, precision, devices[0])
    else:
        fill = settings.device_map == "auto"
        model = load.load_base(folder, precision, devices[0], device_map.spread(devices, fill))
        device_map.check(model, devices)
    model.eval()
    context = settings.context_length or load.context_length(model)
    return open_engine(model, context, settings.cache_type, alone=True), folder


def open_engine(
    model: Any, context_length: int, cache_type: CacheType = "auto", alone: bool = False
) -> TorchEngine | PlainEngine:
    """The engine for a causal LM of transformers, or a PEFT model around one.

    Args:
        cache_type, alone: those of `TorchEngine`.

    Raises: UserError where this kind of model has no such cache, or a part of it is not in memory.
    """
    device_map.check_present(model)
    found: Any = view_of(causal_of(model), training=False)
    if not isinstance(found, str):
        found = _differs(model)
    if not found:
        return TorchEngine(model, context_length, cache_type, alone)
    if cache_type != "auto":
        raise UserError(
            "the cache of this model cannot be {cache_type}: {value}",
            cache_type=cache_type,
            value=found,
            where="cache_type",
            fix="Leave it out, or use --engine llama.cpp.",
        )
    return PlainEngine(model, context_length)


# Models whose forward pass was compared with ours, and why ours is not used; "" if it is.
_COMPARED: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def _differs(model: Any) -> str:
    """Why our forward pass is not this model's, though its parts are those of the family; "" if
    both say the same of a few tokens. Asked once of a model: its weights may be given up later."""
    causal = causal_of(model)
    if causal not in _COMPARED:
        with self_check.in_evaluation(model), self_check.narrow(causal):
            far, allowed = _far(model, causal), self_check.rounding(causal)
        _COMPARED[causal] = "" if far <= allowed else (
            f"our forward pass differs from it by {far:.2g} of the logits' size"
        )  # fmt: skip
    return _COMPARED[causal]


def _far(model: Any, causal: Any) -> float:
    """The largest distance of our logits from transformers' along a text, also by single tokens."""
    text, read = self_check.ids_of(causal, 0, 16), 10
    wanted = self_check.scores_of(causal, text)
    try:
        engine = TorchEngine(model, len(text))
        # Logits are the caller's until the next call only.
        found = [engine.prefill(text[:n]).clone() for n in (5, read)]
        found += [engine.step([token], [0])[0].clone() for token in text[read:]]
    except Exception as e:  # a model that only looks like one of the family
        if is_memory(e):
            raise
        return math.inf
    return self_check.distance(
        torch.stack(found).to(wanted.device), wanted[[4, *range(read - 1, 16)]]
    )


class TorchEngine(PeftAdapters):
    """An `Engine` over a model whose parts are known.

    Args:
        model: a causal LM of transformers, or a PEFT model around one. Its weights are used where
            they lie; layers may lie on different devices.
        context_length: tokens that a prompt and its answer may have together.
        cache_type: how keys and values are stored: auto (the type of activations), f32, f16, or
            q8_0 (8 bits, and a scale for each head and token).
        alone: whether nobody else computes with this model. Then weights are laid out for
            answering, where that is faster, and the model's own are given up.

    Raises: ValueError where the model is not of the known family.
    """

    max_rows = MAX_ROWS

    def __init__(
        self,
        model: Any,
        context_length: int,
        cache_type: CacheType = "auto",
        alone: bool = False,
    ) -> None:
        self.model = model
        self.context_length = context_length
        self.cache_type: CacheType = cache_type
        causal = causal_of(model)
        found = view_of(causal, training=False)
        if isinstance(found, str):
            raise ValueError(found)
        self._build(found)
        head = causal.get_output_embeddings()
        self._head, self._head_bias = head.weight, head.bias
        self._places = [layer.mlp.norm.device for layer in self._layers]
        self._windows = {layer.shape.window for layer in self._layers}
        if alone:
            self._pack(head)
        self._angles = _Angles(found)
        self.computed = 0  # positions that went through the model so far
        self.refresh()

    def _build(self, found: DecoderView) -> None:
        self._view = found
        self._layers = [Layer(layer, found.eps) for layer in found.layers]
        # Its weight lies in `_head`; of this only the adapters are used.
        self._head_group = LinearGroup([found.causal.get_output_embeddings()])

    @property
    def _groups(self) -> list[LinearGroup]:
        return [*(g for layer in self._layers for g in layer.groups), self._head_group]

    def _pack(self, head: Any) -> None:
        """Lay the weights out for answering; an output matrix that is the embedding as well stays
        beside its packed copy."""
        for layer in self._layers:
            for group in layer.groups:
                group.pack()
        base = getattr(head, "base_layer", head)
        if (laid := getattr(base, "packed_weight", None)) is not None:
            self._head, _ = laid
            return
        packed = linear.pack_weight(self._head)
        if packed is None:
            return
        self._head = packed
        base.packed_weight = packed, self._head_bias
        if base.weight is not getattr(self._view.embed, "weight", None):
            release_weight(base)
        self._head_group = LinearGroup([head])

    def refresh(self) -> None:
        """Take the adapters as they are now; needed where they were trained."""
        for group in self._groups:
            group.refresh()
        self._hold()
        self.reset()

    def _hold(self) -> None:
        for layer in self._layers:
            for group in layer.groups:
                group.cache_adapters(layer.mlp.norm.dtype)
        self._head_group.cache_adapters(self._view.norm.dtype)

    def _take(self, model: Any) -> None:
        """Compute with the same base, with other adapters around it, from now on. Weights that were
        laid out for answering stay so."""
        found = view_of(causal_of(model), training=False)
        assert not isinstance(found, str), found
        self.model = model
        self._build(found)
        self.refresh()

    def _follow(self) -> bool:
        """Compute as PEFT's switches stand now; whether they stand otherwise than they did."""
        if self._view.is_stale or self._head_group.layers[0] is not self._output():
            self._build(self._view.renewed())
            changed = True
        else:
            changed = sum(group.follow() for group in self._groups) > 0
        if changed:
            self._hold()
        return changed

    def _output(self) -> Any:
        return self._view.causal.get_output_embeddings()

    def reset(self) -> None:
        heads = self._layers[0].shape
        dtype = self._layers[0].mlp.norm.dtype
        self._mixed = False
        self.tree = TreeCache(self._places, heads.key, heads.size, dtype, self.cache_type)

    def prefill(self, prompt_ids: Sequence[int], cancel: Callable[[], bool] = never) -> Tensor:
        if self._follow() or self._mixed:
            self.reset()
        with reset_on_failure(self), torch.inference_mode():
            known = self.tree.begin(prompt_ids)
        new = list(prompt_ids[known:])
        for start in range(0, len(new), CHUNK):
            if cancel():
                raise Cancelled
            with reset_on_failure(self), torch.inference_mode():
                last = self._read(new[start : start + CHUNK])
        with reset_on_failure(self), torch.inference_mode():
            return self._logits(last)[0]

    def step(self, token_ids: Sequence[int], parents: Sequence[int]) -> Tensor:
        check_rows(token_ids, parents, self.tree.rows, self.max_rows)
        # As with transformers, what was computed before a switch stays in the cache of this answer.
        self._mixed |= self._follow()
        with reset_on_failure(self), torch.inference_mode():
            tree, rows = self.tree, len(token_ids)
            tree.reclaim()
            tree.reserve(tree.used + rows)
            start = tree.used
            tree.grow(token_ids, parents)
            position = len(tree.prompt) + tree.depth - 1
            visible = {w: self._visible_slots(w, position) for w in self._windows}
            self.computed += rows
            x, cos, sin = self._embed(list(token_ids), [position] * rows)
            for number, layer in enumerate(self._layers):
                x, cos, sin = self._moved(number, x, cos, sin)
                qkv = layer.infer_qkv(x, cos, sin)
                self._write(number, qkv, layer.shape, start)
                attended = self._attend(number, qkv, layer.shape, visible[layer.shape.window])
                x = layer.infer_output(attended, x)
            return self._logits(x)

    # -- one forward -------------------------------------------------------------------------------

    def _read(self, ids: list[int]) -> Tensor:
        """Append tokens to the prompt; the last hidden state (1, D), not normalised."""
        tree = self.tree
        start, stop = len(tree.prompt), len(tree.prompt) + len(ids)
        tree.reserve(stop)
        self.computed += len(ids)
        x, cos, sin = self._embed(ids, list(range(start, stop)))
        for number, layer in enumerate(self._layers):
            x, cos, sin = self._moved(number, x, cos, sin)
            qkv = layer.infer_qkv(x, cos, sin)
            self._write(number, qkv, layer.shape, start)
            attended = self._attend_prompt(number, qkv, layer.shape, start, stop)
            if number == len(self._layers) - 1:
                attended, x = attended[-1:], x[-1:]
            x = layer.infer_output(attended, x)
        tree.extend(ids)
        return x

    def _embed(self, ids: list[int], positions: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        x = self._view.embed(torch.tensor(ids, device=self._view.embed_device))
        return (x, *self._angles.at(positions, x))

    def _moved(self, number: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Tensors on the device of a layer."""
        place = self._places[number]
        if tensors[0].device == place:
            return tensors
        return tuple(t.to(place) for t in tensors)

    def _write(self, number: int, qkv: Tensor, heads: AttentionShape, start: int) -> None:
        """Put the keys and values of new rows into their slots."""
        split = qkv.unflatten(1, (-1, heads.size)).transpose(0, 1)
        self.tree.layers[number].write(start, split[heads.query :])

    def _attend_prompt(
        self, number: int, qkv: Tensor, heads: AttentionShape, start: int, stop: int
    ) -> Tensor:
        """Attention of new rows of the prompt, (t, H D): causal over all of it."""
        q = qkv[:, : heads.query * heads.size].unflatten(1, (heads.query, heads.size))
        first = 0 if heads.window is None else max(0, start - heads.window + 1)
        k, v = self.tree.layers[number].keys_values(first, stop)
        mask = None
        if start > 0 or (heads.window is not None and stop > heads.window):
            rows = torch.arange(start, stop, device=qkv.device)[:, None]
            columns = torch.arange(first, stop, device=qkv.device)[None]
            mask = columns <= rows
            if heads.window is not None:
                mask &= columns > rows - heads.window
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], k[None], v[None], attn_mask=mask, is_causal=mask is None,
            scale=heads.scale, enable_gqa=heads.query != heads.key,
        )  # fmt: skip
        return out[0].transpose(0, 1).flatten(1)

    def _visible_slots(self, window: int | None, position: int) -> tuple[int, Tensor | None]:
        """The first slot that rows at a position look at, and what they must not look at: for each
        query head that shares a head of keys, all rows."""
        first = 0 if window is None else max(0, position - window + 1)
        first = min(first, len(self.tree.prompt))
        mask = self.tree.mask(window, first)
        heads = self._layers[0].shape
        return first, None if mask is None else mask.repeat(heads.query // heads.key, 1)

    def _attend(
        self, number: int, qkv: Tensor, heads: AttentionShape, visible: tuple[int, Tensor | None]
    ) -> Tensor:
        """Attention of the live rows over prompt and branches: (n, H D)."""
        rows, groups, (first, mask) = qkv.shape[0], heads.query // heads.key, visible
        q = qkv[:, : heads.query * heads.size].view(rows, heads.key, groups, heads.size)
        q = q.permute(1, 2, 0, 3).reshape(heads.key, groups * rows, heads.size)
        mask = None if mask is None else mask.to(q.device)
        out = self.tree.layers[number].attend(q, first, self.tree.used, heads.scale, mask)
        out = out.view(heads.key, groups, rows, heads.size)
        return out.permute(2, 0, 1, 3).reshape(rows, heads.query * heads.size)

    def _logits(self, x: Tensor) -> Tensor:
        norm = self._view.norm
        x = x.to(norm.device)
        h = infer_norm(x, norm, self._view.eps)
        h = h.to(self._head.device)
        y = linear.onednn_linear(h, self._head, self._head_bias)
        a, b = self._head_group.lora_matrices(h.dtype)
        if a is not None and b is not None:
            y.addmm_(h @ a.t(), b.t())
        return y.float()


class _Angles:
    """The rotary angles of positions: made once for each, not once for each step."""

    def __init__(self, found: DecoderView) -> None:
        self._rotary, self._made = found.rotary, 0
        self._cos = self._sin = torch.empty(0)

    def at(self, positions: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (t, D), as `Layer.infer_qkv` takes them, in type and place of `like`."""
        if max(positions) >= self._made or self._cos.dtype != like.dtype:
            self._made = -(-(max(positions) + 1) // ANGLES) * ANGLES
            every = torch.arange(self._made, device=like.device)
            cos, sin = self._rotary(like[None], every[None])
            self._cos, self._sin = cos[0], signed_sin(sin[0])
        index = torch.tensor(positions, device=like.device)
        return self._cos[index], self._sin[index]
