"""The vLLM engine over a stand-in with the surface of vLLM's offline API; vLLM itself is not run."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from gguf_kit import scores_after, tiny_base
from vicuna.errors import UserError
from vicuna.generate.engines.base import Cancelled, OutOfMemory
from vicuna.generate.engines.vllm import VllmEngine


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class SamplingParams:
    max_tokens: int
    temperature: float
    logprobs: int
    detokenize: bool


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class Completion:
    logprobs: list[dict[int, Logprob]]
    token_ids: list[int] = field(default_factory=list)


@dataclass
class Request:
    outputs: list[Completion]


class LLM:
    """Answers as `vllm.LLM` does, by transformers."""

    model: Any = None  # set by the fixture
    made: list[LLM] = []  # noqa: RUF012

    def __init__(self, model: str, **options: Any) -> None:
        self.folder, self.options = model, options
        self.asked: list[list[list[int]]] = []
        self.adapters: list[Any] = []
        self.resets = 0
        LLM.made.append(self)

    def generate(
        self, prompts: list[dict[str, list[int]]], sampling_params: SamplingParams,
        use_tqdm: bool = True, lora_request: LoRARequest | None = None,
    ) -> list[Request]:  # fmt: skip
        assert (sampling_params.max_tokens, sampling_params.logprobs) == (1, -1)
        assert not use_tqdm
        rows = [p["prompt_token_ids"] for p in prompts]
        self.asked.append(rows)
        self.adapters.append(lora_request)
        answers = []
        for row in rows:
            if len(row) > 20:
                raise torch.OutOfMemoryError("CUDA out of memory")
            logs = scores_after(self.model, row).log_softmax(-1).tolist()
            order = sorted(range(len(logs)), key=lambda i: -logs[i])
            found = {i: Logprob(logs[i], rank) for rank, i in enumerate(order, 1)}
            answers.append(Request([Completion([found], [order[0]])]))
        return answers

    def reset_prefix_cache(self) -> bool:
        self.resets += 1
        return True


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    module = types.ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    lora, request = types.ModuleType("vllm.lora"), types.ModuleType("vllm.lora.request")
    request.LoRARequest = LoRARequest  # type: ignore[attr-defined]
    for name, part in (("vllm", module), ("vllm.lora", lora), ("vllm.lora.request", request)):
        monkeypatch.setitem(sys.modules, name, part)
    LLM.made.clear()
    LLM.model = tiny_base(tmp_path, "llama")
    yield tmp_path
    LLM.model = None


def test_scores_are_log_probabilities_of_each_row(base: Path) -> None:
    engine = VllmEngine(base)

    def wanted(row: list[int]) -> torch.Tensor:
        return scores_after(LLM.model, row).log_softmax(-1)

    torch.testing.assert_close(engine.prefill([5, 6, 7]), wanted([5, 6, 7]))
    logits = engine.step([10, 11], [0, 0])
    assert logits.shape == (2, 352)
    assert logits.dtype == torch.float32
    logits = engine.step([20, 21], [1, 1])
    for row, path in zip(logits, ([5, 6, 7, 11, 20], [5, 6, 7, 11, 21])):
        torch.testing.assert_close(row, wanted(path))
    assert LLM.made[0].asked[-1] == [[5, 6, 7, 11, 20], [5, 6, 7, 11, 21]]


def test_vllm_is_opened_for_all_scores_and_its_prefix_cache(base: Path) -> None:
    engine = VllmEngine(base, context_length=100, dtype="bfloat16", lora_rank=12)
    options = LLM.made[0].options
    assert engine.context_length == options["max_model_len"] == 100
    assert options["max_logprobs"] == -1
    assert options["enable_prefix_caching"] is True
    assert (options["enable_lora"], options["max_lora_rank"]) == (True, 16)
    assert options["dtype"] == "bfloat16"
    assert VllmEngine(base).context_length == 512
    assert "enable_lora" not in LLM.made[1].options


def test_cancel_is_asked_before_a_prompt(base: Path) -> None:
    engine = VllmEngine(base)
    with pytest.raises(Cancelled):
        engine.prefill([5, 6], lambda: True)
    assert LLM.made[0].asked == []


def test_memory_running_out_is_told_and_forgotten(base: Path) -> None:
    engine = VllmEngine(base)
    with pytest.raises(OutOfMemory):
        engine.prefill([5] * 21)
    assert LLM.made[0].resets == 1
    assert engine.prefill([5, 6]).shape == (352,)


def test_adapters_are_named_and_switched(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    engine = VllmEngine(base, lora_rank=8)
    with pytest.raises(UserError, match="PEFT's layout"):
        engine.load_adapter("mine", folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_text("{}")
    engine.load_adapter("mine", folder)
    for mix in ({"mine": 1.0}, {"mine": 0.0}, {}):
        engine.use_adapters(mix)
        engine.prefill([5, 6])
    used = LLM.made[0].adapters
    assert used == [LoRARequest("mine", 1, str(folder)), None, None]
    with pytest.raises(UserError, match="no adapter 'other'"):
        engine.use_adapters({"other": 1.0})
    with pytest.raises(UserError, match=r"cannot scale an adapter by 0\.5"):
        engine.use_adapters({"mine": 0.5})
    engine.load_adapter("further", folder)
    with pytest.raises(UserError, match="one adapter at a time, not with 2"):
        engine.use_adapters({"mine": 1.0, "further": 1.0})
    engine.drop_adapter("further")
    with pytest.raises(UserError, match="no adapter 'further'"):
        engine.use_adapters({"further": 1.0})
    with pytest.raises(UserError, match="only where it was opened with one"):
        VllmEngine(base).load_adapter("mine", folder)


def test_the_command_opens_it_with_the_strategies_over_it(base: Path) -> None:
    from vicuna.config import GenerateSettings
    from vicuna.data.conversation import Turn
    from vicuna.generate.decode import complete
    from vicuna.generate.load import open_model
    from vicuna.generate.settings import Settings

    settings = GenerateSettings(
        model=str(base), engine="vllm", template="vicuna-chat", precision="fp16"
    )
    loaded = open_model(settings)
    assert LLM.made[0].options["dtype"] == "float16"
    loaded.engine.prefill([5, 6])
    found = complete(
        loaded.engine, [5, 6], Settings(num_beams=2, max_new_tokens=3), loaded.renderer
    )
    assert 1 <= len(found.answers[0].token_ids) <= 3
    assert loaded.renderer.prompt([Turn("user", "a")])


def test_without_vllm_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("vicuna.generate.engines.vllm.find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install vllm"):
        VllmEngine(tmp_path)
