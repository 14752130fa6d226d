"""Memory that runs out during a run: the same weights in smaller packs, or advice that helps."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from run_kit import events, largest_difference, same, train, weights

from vicuna.config import TrainSettings, build
from vicuna.data.pack import Pack
from vicuna.errors import UserError
from vicuna.model.out_of_memory import is_memory
from vicuna.model.trainable import TrainableModel
from vicuna.train import checkpoint as checkpoints
from vicuna.train.micro_batch import MicroBatch
from vicuna.train.oom import advice

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")


@pytest.fixture(scope="module")
def words(tiny: Path, data: Path) -> list[str]:
    return (
        f"--model {tiny} --dataset {data} --batch_size 8 --max_steps 6 --save_steps 2 "
        "--val_size 6 --share_prefixes false --save_total_limit 0"
    ).split()


class Limit:
    """Memory for so many rows of a pack. Runs out in the head, behind gradients of earlier packs,
    and leaves a graph behind.

    first: the step from which on the limit holds. evaluation: whether it holds there instead.
    """

    def __init__(
        self, rows: int, error: Exception, first: int = 0, evaluation: bool = False
    ) -> None:
        self.rows, self.error, self.first, self.evaluation = rows, error, first, evaluation
        self.failed: list[int] = []
        self.tried = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Limit:
        real: Callable[[TrainableModel, Pack], torch.Tensor] = TrainableModel.loss_sum

        def limited(trainable: TrainableModel, pack: Pack) -> torch.Tensor:
            self.tried += 1
            loss = real(trainable, pack)
            concerned = trainable.dropout.step >= self.first
            concerned &= self.evaluation != torch.is_grad_enabled()
            if concerned and len(pack.ids) > self.rows:
                self.failed.append(len(pack.ids))
                raise self.error
            return loss

        monkeypatch.setattr(TrainableModel, "loss_sum", limited)
        return self


def run(words: list[str], folder: Path, *more: str) -> Path:
    assert train(*words, "--output_dir", str(folder), *more) == 0
    return folder


def out_of_memory(run: Path) -> list[dict[str, Any]]:
    return [e for e in events(run, "warning") if "out of memory" in e["message"]]


def kept(run: Path, step: int) -> MicroBatch:
    return checkpoints.read_state(run / f"checkpoints/step-{step:06d}").micro_batch


@pytest.fixture(scope="module")
def undisturbed(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(words, tmp_path_factory.mktemp("runs") / "undisturbed")


@pytest.fixture(scope="module")
def smaller(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that takes from the start what the disturbed one ends with."""
    folder = tmp_path_factory.mktemp("runs") / "smaller"
    return run(words, folder, "--micro_batch_tokens", "128")


def test_a_run_without_enough_memory_ends_in_the_weights_of_the_cut_it_found(
    words: list[str], smaller: Path, undisturbed: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    limit = Limit(130, CUDA).install(monkeypatch)
    found = run(words, tmp_path / "run")
    assert limit.failed
    assert same(weights(found), weights(smaller))
    assert largest_difference(weights(found), weights(undisturbed)) < 1e-5
    told = out_of_memory(found)
    assert [e["micro_batch_tokens"] for e in told] == sorted(
        (e["micro_batch_tokens"] for e in told), reverse=True
    )
    assert told[-1]["micro_batch_tokens"] == 128
    assert told[-1]["step"] == 0
    assert "step 1" in told[-1]["message"]
    assert "128 tokens at a time" in " ".join(capsys.readouterr().out.split())
    assert kept(found, 2).tokens == kept(found, 6).tokens == 128
    # What a failed attempt added to the gradients is gone.
    for a, b in zip(events(found, "step"), events(smaller, "step"), strict=True):
        for name in ("loss", "grad_norm", "tokens", "supervised_tokens", "examples"):
            assert a[name] == b[name]


def test_memory_that_gets_short_later_changes_nothing_but_rounding(
    words: list[str], undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Limit(130, CPU, first=3).install(monkeypatch)
    found = run(words, tmp_path / "run", "--lora_dropout", "0.1")
    monkeypatch.undo()
    quiet = run(words, tmp_path / "quiet", "--lora_dropout", "0.1")
    assert largest_difference(weights(found), weights(quiet)) < 1e-5
    assert out_of_memory(found)[0]["step"] == 3
    assert kept(found, 2).tokens > 128
    assert kept(found, 4).tokens == 128
    first = [[e["loss"] for e in events(r, "step")][:3] for r in (found, quiet)]
    assert first[0] == first[1]


def test_resume_goes_on_with_the_smaller_size(
    words: list[str], smaller: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = Limit(130, MemoryError()).install(monkeypatch)
    found = run(words, tmp_path / "run")
    failures = len(limit.failed)
    assert train("--resume", str(found / "checkpoints/step-000004")) == 0
    assert len(limit.failed) == failures
    assert kept(found, 6).tokens == 128
    assert same(weights(found), weights(smaller))


def test_an_evaluation_that_does_not_fit_is_cut_by_itself(
    words: list[str], undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Limit(100, CPU, evaluation=True).install(monkeypatch)
    found = run(words, tmp_path / "run")
    assert same(weights(found), weights(undisturbed))
    told = out_of_memory(found)
    assert told
    assert all("the evaluation at step 0" in e["message"] for e in told)
    assert kept(found, 6) == replace(
        kept(undisturbed, 6), eval_tokens=told[-1]["micro_batch_tokens"]
    )
    for a, b in zip(events(found, "eval"), events(undisturbed, "eval"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-6)
        assert a["supervised_tokens"] == b["supervised_tokens"]


def test_dropout_is_back_after_an_evaluation_that_failed(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = run(words, tmp_path / "quiet", "--lora_dropout", "0.2")
    Limit(100, CPU, evaluation=True).install(monkeypatch)
    found = run(words, tmp_path / "run", "--lora_dropout", "0.2")
    assert same(weights(found), weights(quiet))


def test_one_example_that_does_not_fit_ends_the_run_with_advice(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = Limit(10, CUDA).install(monkeypatch)
    with pytest.raises(UserError) as caught:
        train(*words, "--output_dir", str(tmp_path / "run"))
    text = str(caught.value)
    ways = ["--gradient_checkpointing selective, or full", "--precision nf4", "--cutoff_len",
            "--lora_target q_proj,v_proj", "a smaller base"]  # fmt: skip
    places = [text.index(way) for way in ways]
    assert places == sorted(places)
    assert "one example of" in text
    assert "--lora_dropout" not in text
    assert "offload" not in text  # the host's memory is what ran out
    assert len(limit.failed) < 12
    # Twice the same pack: the second time memory had been given back.
    assert limit.failed[-1] == limit.failed[-2]
    assert "UserError" in events(tmp_path / "run", "warning")[-1]["message"]


@pytest.mark.parametrize(
    ("given", "checkpointing", "device", "named", "silent"),
    [
        ({}, "none", "cuda", ["selective, or full, offload", "a quarter"], ["lora_dropout"]),
        ({}, "none", "cpu", ["selective, or full"], ["offload"]),
        ({}, "full", "cuda", ["--gradient_checkpointing offload"], ["selective", "full"]),
        ({}, "full", "cpu", ["nf4"], ["gradient_checkpointing"]),
        ({}, "offload", "cuda", ["nf4"], ["gradient_checkpointing"]),
        ({"precision": "nf4"}, "none", "cuda", ["--cutoff_len 250"], ["--precision"]),
        ({"precision": "int8"}, "none", "cuda", ["nf4 (half"], []),
        ({"lora_target": "q_proj,v_proj"}, "none", "cuda", ["selective"], ["lora_target"]),
        ({"lora_dropout": 0.1}, "none", "cuda", ["--lora_dropout 0"], []),
    ],
)
def test_advice_names_only_what_is_not_on_already(
    given: dict[str, Any], checkpointing: str, device: str, named: list[str], silent: list[str]
) -> None:
    settings = build(TrainSettings, {"precision": "bf16", **given})
    trainable: Any = SimpleNamespace(
        checkpointing=checkpointing, device=torch.device(device), llama=1
    )
    run = Path("runs/mine")
    text = advice(settings, trainable, settings.precision, run, 500)
    assert not [word for word in named if word not in text]
    assert not [word for word in silent if word in text]
    trainable.llama = None  # transformers' own forward knows one way of computing again
    assert "selective" not in advice(settings, trainable, settings.precision, run, 500)
    text = advice(settings, trainable, settings.precision, run, 500, "eval")
    assert "checkpointing" not in text


def test_a_lone_example_that_fits_once_memory_is_given_back_goes_on(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = run(words, tmp_path / "one", "--micro_batch_size", "1")
    limit = Limit(10, CUDA).install(monkeypatch)
    real = TrainableModel.backward

    def once(self: TrainableModel, *args: Any) -> float:
        limit.rows = 10_000 if limit.failed else 10
        return real(self, *args)

    monkeypatch.setattr(TrainableModel, "backward", once)
    found = run(words, tmp_path / "run", "--micro_batch_size", "1")
    assert len(limit.failed) == 1
    assert same(weights(found), weights(one))
    assert kept(found, 6) == kept(one, 6)


def test_other_errors_pass_through(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = Limit(0, RuntimeError("mat1 and mat2 shapes cannot be multiplied")).install(monkeypatch)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        train(*words, "--output_dir", str(tmp_path / "run"))
    assert len(limit.failed) == 1


def test_weights_that_are_half_changed_are_not_saved(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = torch.optim.AdamW.step, []

    def full(self: torch.optim.AdamW, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise CUDA
        return real(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    with pytest.raises(UserError, match="while step 4 changed the weights"):
        train(*words, "--output_dir", str(tmp_path / "run"), "--val_size", "0")
    assert [p.name for p in checkpoints.all_of(tmp_path / "run/checkpoints")] == ["step-000002"]


def test_a_checkpoint_of_before_has_one_size_for_both(
    words: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    found = run(words, tmp_path / "run")
    state = found / "checkpoints/step-000004/state.json"
    noted = json.loads(state.read_text())
    del noted["cut"]["evaluation"]
    state.write_text(json.dumps(noted))
    assert train("--resume", str(state.parent)) == 0
    assert same(weights(found), weights(undisturbed))


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (CUDA, True),
        (CPU, True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"), True),
        (
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_memory_that_ran_out_is_told_by(error: Exception, memory: bool) -> None:
    assert is_memory(error) is memory


def test_the_allocator_of_this_machine_says_what_is_looked_for() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_memory(caught.value)
