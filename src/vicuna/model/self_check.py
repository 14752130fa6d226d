"""A model is tried small, on a few tokens, before a way of computing it is trusted.

The safe way is transformers' own forward of one text alone. Whatever else is offered for it (our
own forward, several examples in a pack) must give the same scores, up to rounding, or is not used.
So it also holds for architectures that are not born yet.

All of it is a function of the model: no random state is used or changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vicuna.data.sampler import mix
from vicuna.errors import UserError
from vicuna.messages import Message

# Tokens of a text that is tried.
LENGTH = 24
# Windows are narrowed to so many tokens while it is: what they hide is then seen in a short text.
WINDOW = 6
# How far scores of a position may differ, as a share of their norm, where the weights have this
# type. Deep models in short types round that much; another way of computing is further off.
_ROUNDING = {torch.float32: 2e-3, torch.float16: 0.03}
_COARSE, _MOST = 0.1, 0.25
_WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size")
# Layers whose rows are a function of the rows that they may see, and of nothing else.
_SOFTMAX = {"full_attention", "sliding_attention"}
_STATE = {"A_log", "dt_bias", "conv1d"}


def ids_of(causal: Any, seed: int, length: int = LENGTH) -> list[int]:
    """Token ids of a text that says nothing; the same for the same model."""
    size = int(causal.get_input_embeddings().weight.shape[0])
    # The first ids, and the last, are often control tokens.
    first, stop = (8, min(size, 20_000)) if size > 32 else (0, size)
    numbers = mix(np.arange(length, dtype=np.uint64) + np.uint64(1000 * (seed + 1)))
    return [first + int(n) for n in numbers % np.uint64(stop - first)]


@torch.no_grad()
def scores_of(causal: Any, ids: Sequence[int], start: int = 0) -> Tensor:
    """What transformers' own forward says after each token of a text alone: float32 (T, V).

    Args:
        start: the first token's position.
    """
    given: dict[str, Any] = {"input_ids": torch.tensor([list(ids)], device=device_of(causal))}
    if start:
        given["position_ids"] = torch.arange(start, start + len(ids), device=device_of(causal))[
            None
        ]
    scores: Tensor = causal(**given, use_cache=False).logits[0].float()
    return scores


@torch.no_grad()
def last_scores(causal: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """The same after the last token of each of several texts of one length: float32 (n, V)."""
    given = torch.tensor([list(row) for row in rows], device=device_of(causal))
    scores: Tensor = causal(input_ids=given, use_cache=False).logits[:, -1].float()
    return scores


def device_of(causal: Any) -> torch.device:
    """Where its token ids must lie."""
    device: torch.device = causal.get_input_embeddings().weight.device
    return device


def distances(found: Tensor, wanted: Tensor) -> Tensor:
    """Of each position the difference of its scores as a share of their norm: (T, V) -> (T,).

    What is added to all scores of a position changes nothing. NaN counts as far.
    """
    found, wanted = (t - t.mean(-1, keepdim=True) for t in (found.float(), wanted.float()))
    far = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-6)
    return far.nan_to_num(float("inf"))


def distance(found: Tensor, wanted: Tensor) -> float:
    """The largest of `distances`."""
    return float(distances(found, wanted).max())


def rounding(causal: Any) -> float:
    """How far scores may be from each other and still be the same: by the type of the weights, and
    by what the model itself makes of a text of which it has seen more.

    Raises: UserError where that is another text to it: no model of the next token is so.
    """
    text = ids_of(causal, 0)
    noise = distances(scores_of(causal, text)[:-8], scores_of(causal, text[:-8]))
    kinds = {p.dtype for p in causal.parameters() if not p.requires_grad} or {torch.float32}
    floor = max(_ROUNDING.get(kind, _COARSE) for kind in kinds)
    if float(noise.median()) > min(10 * floor, _MOST):
        raise UserError(
            "{type} is no model of the next token: what stands behind a token changes what it "
            "says there",
            type=type(causal).__name__,
            where="model",
            fix="Take a causal language model as the base.",
        )
    return max(floor, min(5 * float(noise.max()), _MOST))


@contextmanager
def narrow(causal: Any) -> Iterator[None]:
    """Windows of a few tokens, inside."""
    configs = {id(c): c for m in causal.modules() if (c := getattr(m, "config", None)) is not None}
    with ExitStack() as stack:
        for owner in [*causal.modules(), *configs.values()]:
            for name in _WINDOWS:
                wide = owner.__dict__.get(name)
                if type(wide) is int and wide > WINDOW:
                    setattr(owner, name, WINDOW)
                    stack.callback(setattr, owner, name, wide)
        yield


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients inside; what was in training goes on in it."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module in training:
            module.training = True


def state_of(causal: Any) -> str:
    """Why a model's layers keep more than keys and values of what they read, in words; "" if its
    build shows nothing of the kind."""
    config = causal.config.get_text_config()
    kind = getattr(config, "model_type", "?")
    layers = set(getattr(config, "layer_types", None) or ())
    if odd := sorted(layers - _SOFTMAX):
        return Message("{type} has layers of {name}", type=kind, name=" and ".join(odd))
    for name, module in causal.get_decoder().named_modules():
        own = {key for key, _ in module.named_parameters(recurse=False)}
        if isinstance(module, nn.Conv1d) or own & _STATE:
            return f"{kind} has layers that keep a running state ({name})"
    return ""
