"""Every causal language model of the installed transformers that can be had tiny: what is learned
from packs equals what is learned from one example after the other, or packs are not used and a line
says so; what is answered equals `generate`, greedy and with beams."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from generate_kit import byte_level, make_renderer

from architectures_kit import (
    CACHE_DIFFERS,
    NOT_CAUSAL,
    NOT_TINY,
    OTHER_POSITIONS,
    VOCAB,
    build,
    names,
)
from kit import shake
from vicuna.data.loss_mask import NEXT_TOKEN, NO_TARGET, Example, targets_of
from vicuna.data.pack import build_packs
from vicuna.errors import UserError
from vicuna.generate.decode import Finished, Settings, decode
from vicuna.generate.engines.torch import open_engine
from vicuna.model import forward_choice
from vicuna.model.adapter import LoraSettings, attach
from vicuna.model.trainable import TrainableModel

pytestmark = pytest.mark.slow
CPU, END = torch.device("cpu"), 2
RENDERER = make_renderer(byte_level(), "chatml")


class Ends:
    """A renderer with one end token."""

    tokenizer, stop_ids = RENDERER.tokenizer, frozenset([END])


def examples() -> list[Example]:
    """Three that begin alike, longer than the windows are."""
    rng = np.random.default_rng(0)
    shared = rng.integers(5, VOCAB, 20)
    found = []
    for i in range(3):
        ids = np.concatenate([shared, rng.integers(5, VOCAB, 8 + i)]).astype(np.int32)
        labels = np.full(len(ids), NEXT_TOKEN, np.uint8)
        labels[:20] = labels[-1] = NO_TARGET
        found.append(Example(ids, labels))
    return found


def one_by_one(peft: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients by transformers and PEFT alone."""
    total: Any = 0.0
    count = 0
    for example in examples():
        where, wanted = targets_of(example, END)
        ids = torch.from_numpy(example.ids.astype(np.int64))[None]
        logits = peft(input_ids=ids, use_cache=False).logits[0, torch.from_numpy(where)]
        total = total + F.cross_entropy(logits.double(), torch.from_numpy(wanted), reduction="sum")
        count += len(where)
    (total / count).backward()
    return float(total.detach()) / count, gradients(peft)


def gradients(peft: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in peft.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            found[name], parameter.grad = parameter.grad.double(), None
    return found


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    far = sum(float((a[k] - b[k]).square().sum()) for k in b)
    return float((far / sum(float(b[k].square().sum()) for k in b)) ** 0.5)


def theirs(model: Any, prompt: list[int], **chosen: Any) -> list[int]:
    made = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        eos_token_id=END,
        pad_token_id=0,
        do_sample=False,
        max_new_tokens=5,
        **chosen,
    )
    row: list[int] = made[0, len(prompt) :].tolist()
    return row[: row.index(END) + 1] if END in row else row


def ours(engine: Any, prompt: list[int], **chosen: Any) -> list[int]:
    *_, last = decode(engine, prompt, Settings(max_new_tokens=5, **chosen), Ends())  # type: ignore[arg-type]
    assert isinstance(last, Finished)
    return list(last.answers[0].token_ids)


@pytest.mark.parametrize("name", names())
def test_learns_and_answers_as_transformers_does(name: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if name in NOT_TINY:
        pytest.skip(NOT_TINY[name])
    model = build(name)
    peft = attach(model, LoraSettings(rank=4), seed=1)
    shake(peft)
    peft.eval()
    if name in NOT_CAUSAL:
        with pytest.raises(UserError, match="no model of the next token"):
            forward_choice.settle(TrainableModel(peft, CPU))
        return
    learn(peft)
    if name not in OTHER_POSITIONS:
        answer(peft, name in CACHE_DIFFERS)


def test_few_are_left_out() -> None:
    left = NOT_TINY.keys() & set(names())
    assert len(names()) - len(left) > 150
    assert len(left) < 25


def learn(peft: Any) -> None:
    loss, wanted = one_by_one(peft)
    trainable = TrainableModel(peft, CPU)
    said = forward_choice.settle(trainable)
    packed = trainable.way == "packed"
    assert packed != any(forward_choice.ONE_BY_ONE in line for line in said)
    assert (trainable.llama is not None) == (said == [])
    trainable.packed_attention()
    packs = build_packs(examples(), END, 1000, 0 if packed else 1, share=packed)
    found_loss = trainable.backward(packs, sum(p.supervised for p in packs))
    assert found_loss == pytest.approx(loss, rel=1e-4)
    assert distance(gradients(peft), wanted) < 1e-3
    trainable.plain_attention()


def answer(peft: Any, cache_differs: bool) -> None:
    """cache_differs: what transformers says without its cache is what counts."""
    engine = open_engine(peft, 120)
    how = {"use_cache": False} if cache_differs else {}
    prompt = [int(i) for i in examples()[0].ids[:12]]
    # An earlier prompt, and another end of it.
    for ids, chosen in (
        (prompt, {}),
        (prompt, {"num_beams": 3}),
        ([*prompt[:6], *prompt[8:]], {"num_beams": 3}),
    ):
        assert ours(engine, ids, **chosen) == theirs(peft, ids, **chosen, **how), chosen
