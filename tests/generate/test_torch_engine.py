"""The PyTorch engine: what is known is not computed again, and scores do not depend on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from generate_kit import tiny_llama
from torch import Tensor

from vicuna.generate.engines import torch as engines
from vicuna.generate.engines.base import Cancelled, OutOfMemory
from vicuna.generate.engines.torch import TorchEngine


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """The number of positions of each call of the model."""
    calls: list[int] = []

    def count(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        calls.append(kwargs["input_ids"].shape[1])

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    yield calls
    handle.remove()


def fresh(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0, -1].float()


def near(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-4)


def test_a_further_turn_computes_only_its_tokens(engine: TorchEngine, model: Any) -> None:
    with counted(model) as calls:
        engine.prefill([1, 2, 3, 4])
        engine.step(5)
        grown = engine.prefill([1, 2, 3, 4, 5, 6, 7])
        undone = engine.prefill([1, 2, 9])
        again = engine.prefill([1, 2, 9])
        other = engine.prefill([8, 2, 9])
    assert calls == [4, 1, 2, 1, 1, 3]
    assert near(grown, fresh(model, [1, 2, 3, 4, 5, 6, 7]))
    assert near(undone, fresh(model, [1, 2, 9]))
    assert near(again, undone)
    assert near(other, fresh(model, [8, 2, 9]))


def test_scores_are_float32_of_the_last_position() -> None:
    scores = TorchEngine(tiny_llama(50).bfloat16(), 64).prefill([3, 4])
    assert (scores.dtype, scores.shape) == (torch.float32, (50,))


def test_long_prompts_come_in_pieces(
    engine: TorchEngine, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "CHUNK", 8)
    prompt = [i % 50 for i in range(21)]
    with counted(model) as calls:
        scores = engine.prefill(prompt)
    assert calls == [8, 8, 5]
    assert near(scores, fresh(model, prompt))


def test_cancel_between_pieces_keeps_what_was_read(
    engine: TorchEngine, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "CHUNK", 8)
    prompt = [i % 50 for i in range(21)]
    answers = iter([False, False, True])
    with counted(model) as calls:
        with pytest.raises(Cancelled):
            engine.prefill(prompt, lambda: next(answers))
        scores = engine.prefill(prompt)
    assert calls == [8, 8, 5]
    assert near(scores, fresh(model, prompt))


def test_sliding_windows_start_anew_where_they_must() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=6,
        initializer_range=0.3,
    )
    model = MistralForCausalLM(config).eval()
    engine = TorchEngine(model, 100)
    prompt = list(range(20))
    with counted(model) as calls:
        engine.prefill(prompt)
        longer = engine.prefill([*prompt, 30])
        cut = engine.prefill([*prompt[:15], 31])
        short = TorchEngine(model, 100)
        short.prefill([1, 2, 3])
        shortened = short.prefill([1, 2, 7])
    assert calls == [20, 1, 16, 3, 1]
    assert near(longer, fresh(model, [*prompt, 30]))
    assert near(cut, fresh(model, [*prompt[:15], 31]))
    assert near(shortened, fresh(model, [1, 2, 7]))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_out_of_memory_forgets_and_goes_on(error: RuntimeError) -> None:
    model = tiny_llama(50)
    engine = TorchEngine(model, 64)
    engine.prefill([1, 2, 3])

    def fail(*_: Any) -> None:
        raise error

    # Between the layers: the first has the new token already, the second not.
    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(OutOfMemory):
        engine.step(4)
    handle.remove()
    assert near(engine.prefill([1, 2, 3, 4]), fresh(model, [1, 2, 3, 4]))


def test_an_interrupt_between_layers_leaves_nothing_wrong() -> None:
    model = tiny_llama(50)
    engine = TorchEngine(model, 64)
    engine.prefill([1, 2, 3])

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.step(4)
    handle.remove()
    assert near(engine.prefill([1, 2, 3, 5]), fresh(model, [1, 2, 3, 5]))


def test_other_errors_are_not_called_memory() -> None:
    with pytest.raises(IndexError):
        TorchEngine(tiny_llama(50), 64).prefill([99])


def test_a_model_in_training_goes_on_training() -> None:
    model = tiny_llama(50, attention_dropout=0.5)
    model.train()
    model.model.layers[1].eval()
    before = {n: m.training for n, m in model.named_modules()}
    scores = TorchEngine(model, 64).prefill([1, 2, 3])
    assert {n: m.training for n, m in model.named_modules()} == before
    model.eval()
    assert near(scores, fresh(model, [1, 2, 3]))
    model.train()
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()


def test_an_adapter_applies_unmerged() -> None:
    from peft import LoraConfig, get_peft_model

    base = tiny_llama(50)
    plain = fresh(base, [1, 2, 3])
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(base, config).eval()
    scores = TorchEngine(adapted, 64).prefill([1, 2, 3])
    assert near(scores, fresh(adapted, [1, 2, 3]))
    assert not near(scores, plain)
