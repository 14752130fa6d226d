"""What every contender's process shares: the job, the clock, memory, the Trainer's losses.

Imports nothing but the standard library at the top: these files run in environments of their own.
A process is called as `python peers/with_X.py JOB.json` and writes the job's `out`.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

IGNORE = -100
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def main(run: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Read the job, run it, write the result."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    import torch

    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    result = run(job)
    result["versions"] = _versions()
    Path(job["out"]).write_text(json.dumps(result), encoding="utf-8")


def examples(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The examples in the order of training: prompt, completion, input_ids, start."""
    text = Path(job["examples"]).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def fingerprint(ids: Sequence[int], supervised: int) -> str:
    """As in `benchkit/examples.py`."""
    text = ",".join(map(str, ids)) + f";{supervised}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "transformers", "peft", "trl", "llamafactory", "chinese-vicuna"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


# -- memory ----


def memory_gib() -> float:
    """What this process holds now (resident set)."""
    return _status("VmRSS") or peak_gib()


def peak_gib() -> float:
    """The most this process has held since it started, or since `forget_peak`."""
    highest = _status("VmHWM")
    if highest:
        return highest
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def forget_peak() -> bool:
    """Start the peak anew (Linux: proc(5), clear_refs 5); whether that worked."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(key: str) -> float:
    path = Path("/proc/self/status")
    if not path.exists():
        return 0.0
    for line in path.read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 2**20
    return 0.0


class Clock:
    """Seconds and peak memory of the measured pass, from `begin` to the last `lap`."""

    def __init__(self) -> None:
        self.began = self.ended = 0.0
        self.load_peak = self.before = 0.0

    def loaded(self) -> None:
        """Call when the model and the data are there, before the warm-up."""
        self.load_peak = peak_gib()
        self.before = memory_gib()
        forget_peak()

    def begin(self) -> None:
        """Call after the warm-up."""
        self.began = self.ended = time.perf_counter()

    def lap(self) -> None:
        """Call after every update."""
        self.ended = time.perf_counter()

    def result(self, losses: Sequence[float], counts: Sequence[float]) -> dict[str, Any]:
        """losses: mean of each update; counts: its supervised tokens, equal ones where unknown."""
        peak = peak_gib()
        weights = list(counts) if len(counts) == len(losses) else [1.0] * len(losses)
        return {
            "seconds": self.ended - self.began,
            "updates": len(losses),
            "losses": list(losses),
            "loss": sum(x * w for x, w in zip(losses, weights)) / max(sum(weights), 1e-9),
            "loss_weighted": len(counts) == len(losses),
            "before_gib": self.before,
            "peak_gib": peak,
            "process_peak_gib": max(peak, self.load_peak),
        }


# -- transformers' Trainer ----


class Watch:
    """Clock and losses of a Trainer (also TRL's and LLaMA-Factory's, which derive from it).

    The warm-up is one micro-batch forward and backward before the clock starts, without an update.
    """

    def __init__(self, trainer: Any) -> None:
        from transformers import TrainerCallback

        self.clock = Clock()
        self.counts: list[float] = []
        self.trainer = trainer
        watch = self

        class Callback(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                watch._warm_up()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                watch.clock.lap()

        trainer.add_callback(Callback())
        self._inner = trainer.get_batch_samples
        trainer.get_batch_samples = self._counted

    def _counted(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer.get_batch_samples, which also counts an update's supervised tokens."""
        batches, items = self._inner(*args, **kwargs)
        if items is not None:
            self.counts.append(float(items))
        return batches, items

    def _warm_up(self) -> None:
        trainer = self.trainer
        self.clock.loaded()
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.current_gradient_accumulation_steps = 1  # the loop itself sets it only later
        trainer.training_step(trainer.model_wrapped, dict(batch))
        trainer.model.zero_grad(set_to_none=True)
        self.clock.begin()

    def result(self) -> dict[str, Any]:
        history = self.trainer.state.log_history
        losses = [entry["loss"] for entry in history if "loss" in entry]
        return self.clock.result(losses, self.counts)


def trainer_settings(job: dict[str, Any], micro_batch: int, accumulate: int) -> dict[str, Any]:
    """TrainingArguments that are the same for all: what the weights depend on, and no extras."""
    kind = job["variant"]["dtype"]
    return {
        "output_dir": str(Path(job["work"]) / "out"),
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": accumulate,
        "num_train_epochs": 1,
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch",
        "bf16": kind == "autocast",
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "seed": job["seed"],
    }


def load_model(job: dict[str, Any]) -> Any:
    """The base in the variant's type: `bf16` keeps the weights in bf16, `autocast` in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if job["variant"]["dtype"] == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)
    model.config.use_cache = False
    return model


def lora_config(job: dict[str, Any]) -> Any:
    """The adapter's shape."""
    from peft import LoraConfig

    return LoraConfig(
        r=job["rank"],
        lora_alpha=job["alpha"],
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
