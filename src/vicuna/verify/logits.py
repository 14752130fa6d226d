"""Logits at every position of a text, from a folder, a loaded model or a GGUF file.

A folder is computed layer by layer: the weights of one layer are in memory at a time, in fp32, so
that a model that only just fits on the disk can be compared with another. What an adapter adds is
computed beside the base, as in inference, and never added to the weights: a merge is compared with
what it claims to equal, not with itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vicuna.errors import UserError
from vicuna.messages import Message
from vicuna.model.config_files import library_error, load_config, read_config
from vicuna.model.load import pick_device
from vicuna.weights.read import Weights, open_weights

if TYPE_CHECKING:
    from vicuna.model.adapter import AdapterFiles

Texts = Sequence[Sequence[int]]
# Types of models whose head is the one computed here; others are loaded whole.
_STREAMED = {
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "smollm3",
}  # fmt: skip
_HEAD_ROWS = 8192  # rows of the output matrix multiplied at a time
_POSITIONS = 8192  # padding included, computed at a time


class LogitSource(Protocol):
    """A model that gives the logits of texts."""

    def logits(self, texts: Texts) -> Iterator[np.ndarray]:
        """Logits (T, V) of each text in turn, float32: row t is for the token after t."""
        ...


class FolderLogits:
    """A base in Hugging Face's layout, perhaps with adapters, computed in fp32.

    Args:
        folder: config.json is read from here.
        weights: the tensors by Hugging Face's names; default: the folder's own.
        adapters: each with its weight.

    Raises: UserError if the weights cannot be read or do not belong to the config.
    """

    def __init__(
        self,
        folder: Path,
        weights: Weights | None = None,
        adapters: Iterable[tuple[AdapterFiles, float]] = (),
    ) -> None:
        self._folder, self._adapters = folder, list(adapters)
        self._config = read_config(folder)
        self._whole = (
            self._config.get("model_type") not in _STREAMED or "quantization_config" in self._config
        )
        self._weights = weights
        if not self._whole and weights is None:
            self._weights = open_weights(folder)

    def logits(self, texts: Texts) -> Iterator[np.ndarray]:
        if self._whole:
            return self._loaded().logits(texts)
        assert self._weights is not None
        return _Streamed(self._folder, self._weights, _deltas(self._adapters)).logits(texts)

    def _loaded(self) -> ModelLogits:
        from vicuna.model.load import Chosen, load_base

        if self._weights is not None:
            raise UserError(
                "models of type {model_type} are compared from a folder only",
                model_type=self._config.get("model_type"),
                where=str(self._folder),
                fix="Add --no-verify.",
            )
        precision = "fp16" if "quantization_config" in self._config else "fp32"
        model = load_base(self._folder, Chosen(precision, "comparing"), pick_device())
        for module, delta in _deltas(self._adapters).items():
            _add(model.get_submodule(module), delta)
        return ModelLogits(model)


class ModelLogits:
    """A causal language model of transformers that is loaded already, quantized or not."""

    def __init__(self, model: Any) -> None:
        self._model = model.eval()

    def logits(self, texts: Texts) -> Iterator[np.ndarray]:
        device = self._model.get_input_embeddings().weight.device
        for ids in texts:
            with torch.inference_mode():
                input_ids = torch.tensor([list(ids)], device=device)
                logits = self._model(input_ids=input_ids, use_cache=False).logits[0]
            yield logits.float().cpu().numpy()


class GgufLogits:
    """A GGUF file, computed by llama.cpp, perhaps with a GGUF LoRA beside it.

    Args:
        longest: tokens of the longest text.

    Raises: UserError if llama.cpp is missing or cannot load the file.
    """

    def __init__(
        self, path: Path, adapter: Path | None = None, longest: int = 512, threads: int = 0
    ) -> None:
        from vicuna.llamacpp.context import Context, Model
        from vicuna.llamacpp.cores import physical_cores

        self._longest = longest
        self._model = Model(path)
        try:
            cores = threads or physical_cores()
            # Keys and values in f32: what is measured are the weights, not the cache.
            self._context = Context(self._model, longest, 1, longest, cores, "f32")
            if adapter is not None:
                self._context.use_adapters([(self._model.load_adapter(adapter), 1.0)])
        except (MemoryError, UserError):
            self._model.close()
            raise

    def logits(self, texts: Texts) -> Iterator[np.ndarray]:
        for ids in texts:
            if len(ids) > self._longest:
                raise ValueError(f"{len(ids)} tokens, room for {self._longest}")
            self._context.clear()
            code = self._context.decode(ids, range(len(ids)), [0] * len(ids), len(ids))
            if code:
                raise UserError("llama.cpp could not compute a text (code {code})", code=code)
            yield self._context.logits(len(ids)).copy()

    def close(self) -> None:
        """Free cache and weights, now."""
        self._context.close()
        self._model.close()


# -- what adapters add ----

# (A (r, in), B (out, r), scale) of each adapter that touches a module.
_Delta = list[tuple[Tensor, Tensor, float]]


def _deltas(adapters: Iterable[tuple[AdapterFiles, float]]) -> dict[str, _Delta]:
    """What is added, by the name of the module."""
    found: dict[str, _Delta] = {}
    for files, weight in adapters:
        for module, (a, b) in files.pairs().items():
            scale = files.lora.scale_of(module) * weight
            found.setdefault(module, []).append((a.float(), b.float(), scale))
    return found


def _added(x: Tensor, delta: _Delta) -> Tensor:
    parts = [F.linear(F.linear(x, a.to(x)), b.to(x)) * scale for a, b, scale in delta]
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def _add(module: nn.Module, delta: _Delta) -> None:
    module.register_forward_hook(lambda _, given, out: out + _added(given[0], delta))


# -- layer by layer ----


class _Streamed:
    """A model without weights, into which each layer's are put while it computes."""

    def __init__(self, folder: Path, weights: Weights, deltas: dict[str, _Delta]) -> None:
        self._where, self._weights, self._deltas = folder, weights, deltas
        self._names = set(weights.names())
        self._device = pick_device()
        self._model = _empty_model(folder)
        self._check()
        self._hook()

    def logits(self, texts: Texts) -> Iterator[np.ndarray]:
        for batch in _batches(texts):
            with torch.inference_mode():
                hidden = self._hidden(batch)
            for row, ids in zip(hidden, batch):
                with torch.inference_mode():
                    logits = self._head_logits(row[: len(ids)]).cpu().numpy()
                yield logits

    def _hidden(self, texts: Texts) -> Tensor:
        """The last layer's rows (B, T, H). What stands behind a text is never seen by it."""
        given = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
        for row, ids in zip(given, texts):
            row[: len(ids)] = torch.tensor(list(ids))
        inner = self._model.model
        hidden: Tensor = inner(input_ids=given.to(self._device), use_cache=False).last_hidden_state
        return hidden

    def _head_logits(self, rows: Tensor) -> Tensor:
        """Logits (T, V) of hidden rows (T, H); the output matrix is converted to fp32 in parts."""
        name = self._head
        if getattr(self, "_matrix", None) is None:
            self._matrix = self._weights.read(name).to(self._device)
        parts = [F.linear(rows, part.float()) for part in self._matrix.split(_HEAD_ROWS)]
        logits = torch.cat(parts, dim=-1)
        if delta := self._deltas.get("lm_head"):
            logits = logits + _added(rows, delta)
        if cap := getattr(self._model.config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        return logits

    @property
    def _head(self) -> str:
        own = "lm_head.weight"
        tied = self._model.config.tie_word_embeddings
        return "model.embed_tokens.weight" if tied or own not in self._names else own

    def _check(self) -> None:
        wanted = {f"model.{name}" for name, _ in self._model.model.named_parameters()} | {
            self._head
        }
        missing = sorted(wanted - self._names)
        if missing:
            raise UserError(
                "the weights lack {name}{more}",
                name=missing[0],
                more=Message(" and {count} more", count=len(missing) - 1)
                if len(missing) > 1
                else "",
                where=str(self._where),
                fix="Weights and config.json do not belong together, or a file is missing.",
            )
        for name, parameter in self._model.model.named_parameters():
            found = self._weights.shape(f"model.{name}")
            if found != tuple(parameter.shape):
                raise UserError(
                    "model.{name} has the shape {value}, config.json makes it {shape}",
                    name=name,
                    value=found,
                    shape=tuple(parameter.shape),
                    where=str(self._where),
                )
        modules = {f"model.{name}" for name, _ in self._model.model.named_modules()} | {"lm_head"}
        strange = sorted(set(self._deltas) - modules)
        if strange:
            raise UserError("the adapter does not fit: there is no {name}", name=strange[0])

    def _hook(self) -> None:
        """Weights come before a part computes and go after it."""
        inner = self._model.model
        layers = {f"model.layers.{i}": layer for i, layer in enumerate(inner.layers)}
        for name, part in {
            "model.embed_tokens": inner.embed_tokens, **layers, "model.norm": inner.norm
        }.items():  # fmt: skip
            full = None if name == "model.embed_tokens" else torch.float32
            part.register_forward_pre_hook(self._filler(name, full))
            part.register_forward_hook(_emptied)
        for name, delta in self._deltas.items():
            if name != "lm_head":
                _add(self._model.get_submodule(name), delta)

    def _filler(self, prefix: str, dtype: torch.dtype | None) -> Any:
        def fill(module: nn.Module, _: Any) -> None:
            for name, _parameter in list(module.named_parameters()):
                tensor = self._weights.read(f"{prefix}.{name}").to(self._device)
                owner, leaf = _owner(module, name)
                value = tensor if dtype is None else tensor.to(dtype)
                owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)

        return fill


def _batches(texts: Texts) -> Iterator[list[Sequence[int]]]:
    """The texts in order, so many at a time as are computed together: each batch reads the weights
    once."""
    batch: list[Sequence[int]] = []
    for ids in texts:
        if batch and (len(batch) + 1) * max(len(ids), *map(len, batch)) > _POSITIONS:
            yield batch
            batch = []
        batch.append(ids)
    if batch:
        yield batch


def _emptied(module: nn.Module, _: Any, out: Any) -> Any:
    for name, parameter in list(module.named_parameters()):
        owner, leaf = _owner(module, name)
        empty = torch.empty_like(parameter, device="meta")
        owner._parameters[leaf] = nn.Parameter(empty, requires_grad=False)
    return out.float() if isinstance(out, Tensor) else out


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def _empty_model(folder: Path) -> Any:
    """The model as transformers computes it, without weights."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = load_config(folder)
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as e:  # the library raises many kinds for a config it makes nothing of
        raise library_error(e, "transformers cannot make this model", folder) from e
    return model.eval()
