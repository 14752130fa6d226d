"""Who is compared, in which settings, and how one of them is run in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchkit import environments, machine

PEERS = Path(__file__).parent.parent / "peers"


@dataclass(frozen=True)
class Variant:
    """Settings of a contender, tried out in a short probe where it has several."""

    name: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Contender:
    """title: as the table names it. environment: one of the bench's own, "" for this one."""

    name: str
    title: str
    script: str
    variants: tuple[Variant, ...]
    environment: str = ""


@dataclass(frozen=True)
class Job:
    """What every contender is given, besides its variant.

    micro_batch: examples at a time of those that pad. pack: tokens of a pack of those that pack.
    """

    model: str
    pad_id: int
    examples: Path
    records: Path
    template: str
    updates: int
    batch: int
    cutoff: int
    pack: int
    threads: int
    seed: int
    micro_batch: int = 4
    rank: int = 8
    alpha: float = 16
    learning_rate: float = 3e-4


@dataclass
class Run:
    """How one process ended: its result, or why there is none."""

    result: dict[str, Any] = field(default_factory=dict)
    failure: str = ""
    wall: float = 0.0
    timed_out: bool = False


def dtypes() -> list[str]:
    """The types to try, the likeliest first: what comes later is stopped when it is far behind."""
    return ["autocast", "bf16", "fp32"] if machine.has_bf16() else ["fp32", "autocast", "bf16"]


def contenders() -> dict[str, Contender]:
    """All of them by name, in the order of the table."""
    kinds = dtypes()
    plain = tuple(Variant(k, {"dtype": k}) for k in kinds)
    packed = [Variant(f"bfd {k}", {"dtype": k, "packing": "bfd"}) for k in kinds]
    free = [Variant(f"padding-free {k}", {"dtype": k, "packing": "none"}) for k in kinds]
    everyone = (
        Contender(
            "original", "the 2023 way: padded to the cutoff, fp32", "with_trainer.py",
            (Variant("fp32", {"dtype": "fp32", "pad": "cutoff"}),),
        ),
        Contender("plain", "transformers Trainer + PEFT", "with_trainer.py", plain),
        Contender("trl", "TRL SFTTrainer", "with_trl.py", (*packed, *free), "trl"),
        Contender(
            "llamafactory", "LLaMA-Factory, neat packing", "with_llamafactory.py",
            tuple(Variant(k, {"dtype": k}) for k in kinds), "llamafactory",
        ),
        Contender("ours", "vicuna train", "with_vicuna.py", (Variant("auto", {}),)),
    )  # fmt: skip
    return {c.name: c for c in everyone}


def python_for(contender: Contender, root: Path) -> Path:
    """The interpreter that runs a contender.

    Raises: environments.NotMade.
    """
    if not contender.environment:
        return Path(sys.executable)
    return environments.python_of(contender.environment, root)


def words_of(job: Job, variant: Variant, work: Path, out: Path) -> dict[str, Any]:
    """A job as the contender's process reads it."""
    words = {k: str(v) if isinstance(v, Path) else v for k, v in job.__dict__.items()}
    return {**words, "variant": variant.settings, "work": str(work), "out": str(out)}


def run(
    contender: Contender, variant: Variant, job: Job, python: Path, limit: float | None = None
) -> Run:
    """Run one contender once.

    Args:
        limit: seconds after which it is stopped; None is no limit.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as work:
        out = Path(work) / "result.json"
        text = words_of(job, variant, Path(work), out)
        (Path(work) / "job.json").write_text(json.dumps(text), encoding="utf-8")
        command = [str(python), str(PEERS / contender.script), str(Path(work) / "job.json")]
        began = time.perf_counter()
        code, tail = _call(command, _environment(job.threads, Path(work)), Path(work), limit)
        wall = time.perf_counter() - began
        if code is None:
            return Run(failure=f"stopped after {wall:.0f} s", wall=wall, timed_out=True)
        if not out.is_file():
            return Run(failure=f"exit code {code}: {tail}", wall=wall)
        return Run(json.loads(out.read_text(encoding="utf-8")), wall=wall)


def _environment(threads: int, work: Path) -> dict[str, str]:
    """The same threads for everyone, no hub, and caches that leave nothing behind."""
    cores = {k: str(threads) for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return {
        **os.environ,
        **cores,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(work / "hf"),
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONWARNINGS": "ignore",
        "WANDB_DISABLED": "true",
    }


def _call(
    command: list[str], environment: dict[str, str], work: Path, limit: float | None
) -> tuple[int | None, str]:
    """(exit code, or None where it was stopped; the last words of its output)."""
    log = work / "log.txt"
    with log.open("wb") as f:
        process = subprocess.Popen(
            command, env=environment, cwd=work, stdout=f, stderr=f, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    lines = [x for x in log.read_text(encoding="utf-8", errors="replace").splitlines() if x.strip()]
    return code, " | ".join(lines[-3:])[-600:]


@dataclass
class Probe:
    """The variant that was taken, and the real tokens a second of every variant tried."""

    taken: Variant | None
    figures: dict[str, float | str]


def probe(
    contender: Contender, job: Job, tokens: int, python: Path, say: Callable[[str], None] = print
) -> Probe:
    """Run every variant on a few examples and take the fastest.

    A variant is stopped when its process takes twice as long as the best so far and a quarter of a
    minute more, and its type is not tried in another way: bf16 on a chip without bf16 instructions
    would otherwise take all day.
    """
    if len(contender.variants) == 1:
        return Probe(contender.variants[0], {})
    figures: dict[str, float | str] = {}
    best: tuple[float, Variant] | None = None
    walls: list[float] = []
    hopeless: set[str] = set()
    for variant in contender.variants:
        kind = variant.settings.get("dtype", "")
        if kind in hopeless:
            figures[variant.name] = "not tried"
            continue
        limit = 2 * min(walls) + 15 if walls else None
        done = run(contender, variant, job, python, limit)
        if done.failure:
            figures[variant.name] = done.failure
            say(f"  {contender.name} in {variant.name}: {done.failure}")
            hopeless |= {kind} if done.timed_out else set()
            continue
        walls.append(done.wall)
        speed = tokens / done.result["seconds"]
        figures[variant.name] = round(speed, 1)
        say(f"  {contender.name} in {variant.name}: {speed:.1f} real tokens/s")
        if best is None or speed > best[0]:
            best = (speed, variant)
    return Probe(best[1] if best else None, figures)
