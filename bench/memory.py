"""Whether the plan's memory is what a training step really takes, on the CPU.

    python bench/memory.py [--only 0,3] [--out memory.json] [--write-docs]

For each setting the plan is made on tensors without data; then, in a process of its own, the same
model is built for real and the same step is run for real. Four numbers are compared:

    planned     what the plan says the step's tensors take (without runtime and margin)
    allocated   what PyTorch's allocator has handed out at the peak, as its profiler records it:
                everything, also what an operation allocates inside itself
    tracked     what the plan's own tracker sees of the real tensors
    resident    by how much the process has grown since before the model was built, at its peak

The bar is planned against allocated: within 10 %. `resident` has the threads' scratch memory and
what the C library keeps in it, too; it stands beside the plan's peak with runtime and margin.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs/memory.md"
MARKS = ("<!-- measured -->", "<!-- /measured -->")
MIB = 1 << 20


@dataclass(frozen=True)
class Setting:
    """One step. model: `smollm2-135m` whole has its real weights, all else made-up ones. targets:
    rows with a target, 0 for all. Types that this kind of CPU is slow in come with few rows."""

    model: str
    precision: str
    checkpointing: str
    rows: int
    longest: int
    rank: int = 8
    target: tuple[str, ...] = ("all",)
    layers: int = 0
    targets: int = 0


SETTINGS = (
    Setting("smollm2-135m", "fp32", "none", 1024, 512),
    Setting("smollm2-135m", "fp32", "selective", 1024, 256, rank=64),
    Setting("smollm2-135m", "fp32", "full", 1024, 512),
    Setting("smollm2-135m", "fp32", "none", 512, 512, target=("q_proj", "v_proj")),
    Setting("smollm2-135m", "fp32", "full", 512, 128, rank=16),
    Setting("qwen2.5-0.5b", "fp32", "selective", 256, 256, layers=6),
    Setting("qwen3-0.6b", "fp32", "none", 256, 128, layers=4),
    Setting("llama-3.2-1b", "fp32", "full", 256, 256, layers=4),
    Setting("smollm2-135m", "bf16", "none", 256, 128, targets=16, layers=4),
    Setting("mistral-7b", "bf16", "full", 8, 8, targets=2, layers=2),
    Setting("tinyllama-1.1b", "nf4", "none", 256, 256, layers=3),
    Setting("tinyllama-1.1b", "int8", "full", 256, 128, layers=5),
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="numbers of settings, such as 0,3; all of them")
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    parser.add_argument("--write-docs", action="store_true", help="put the table into the docs")
    parser.add_argument("--child", type=int, default=-1, help=argparse.SUPPRESS)
    return parser.parse_args()


# -- planned -------------------------------------------------------------------------------------


def job_of(setting: Setting) -> Any:
    from vicuna.memory.traced_step import StepSpec

    return StepSpec(
        setting.precision, setting.checkpointing, setting.rows, setting.longest, setting.rank,
        setting.target,
    )  # fmt: skip


def config_of(setting: Setting) -> Any:
    from vicuna.memory import model_shapes
    from vicuna.memory.traced_step import shortened

    config = model_shapes.config_of(setting.model)
    return shortened(config, setting.layers) if setting.layers else config


def pack_of(setting: Setting) -> Any:
    import numpy as np

    from vicuna.memory import traced_step

    pack = traced_step.worst_pack(job_of(setting))
    if not setting.targets:
        return pack
    return traced_step.pack_of(pack.segments, np.arange(setting.targets))


def planned(setting: Setting) -> tuple[int, int]:
    """(bytes of the step's tensors, bytes with runtime and margin) as the plan has them."""
    from vicuna.memory import devices
    from vicuna.memory.footprint import Planner

    # The libraries are there before the process grows.
    cpu = replace(devices.at_hand("cpu"), runtime=devices.CPU_SCRATCH)
    footprint = Planner(config_of(setting), cpu).footprint(job_of(setting), pack_of(setting))
    return footprint.allocated, footprint.peak


# -- real ----------------------------------------------------------------------------------------


def real(setting: Setting) -> dict[str, int]:
    """What a real step takes, in this process."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from vicuna.memory.devices import at_hand
    from vicuna.memory.traced_step import begin, run
    from vicuna.memory.tracker import Trace, Tracker, without_collection

    load_libraries(setting)
    before = resident("VmRSS")
    tracker = Tracker("cpu")
    with tracker:
        trainable = build(setting, job_of(setting).dtype(at_hand("cpu")))
        parameters = list(trainable.parameters.values())
        optimizer = torch.optim.AdamW(parameters)
        for p in parameters:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    pack = pack_of(setting)
    give_back()
    reset_peak()
    run(trainable, pack, optimizer, Trace())
    grown = resident("VmHWM") - before
    gc.collect()
    watch = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with watch as watched, without_collection(), tracker:
        begin(tracker, parameters, optimizer)
        run(trainable, pack, optimizer, tracker.trace)
    events = [n for _, n, _ in tracker.trace.events]
    recorded = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(recorded, key=lambda e: e.start_ns())]
    # The profiler knows changes only; what is there at the end, between two steps, is known.
    return {
        "allocated": sum(events) - sum(changes) + highest(changes),
        "tracked": highest(events),
        "resident": grown,
    }


def highest(changes: list[int]) -> int:
    """The largest sum of a beginning of the list."""
    live = peak = 0
    for change in changes:
        live += change
        peak = max(peak, live)
    return peak


def resident(key: str) -> int:
    """Bytes of this process's VmRSS (now) or VmHWM (at its peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{key} is not in /proc/self/status")


def load_libraries(setting: Setting) -> None:
    """A step of a small model of the same kind: what is loaded by it is no part of the model."""
    import torch

    from vicuna.memory.traced_step import pack_of as rows_of
    from vicuna.memory.traced_step import worst_pack

    small = replace(setting, model="smollm2-135m", layers=1, rows=16, longest=16)
    trainable = build(small, torch.float32)
    pack = worst_pack(job_of(small))
    trainable.backward([rows_of(pack.segments, pack.target_rows[:1])], 1)
    del trainable
    give_back()


def give_back() -> None:
    """Return to the system what loading left over (glibc)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def reset_peak() -> None:
    """Let VmHWM begin anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def build(setting: Setting, dtype: Any) -> Any:
    """The setting's model for real, on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    from vicuna.model.adapter import LoraSettings, attach
    from vicuna.model.base import locate
    from vicuna.model.trainable import TrainableModel

    if setting.model == "smollm2-135m" and not setting.layers:
        model = AutoModelForCausalLM.from_pretrained(str(locate(setting.model)), dtype=dtype)
    else:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config_of(setting), dtype=dtype)
        model.to_empty(device="cpu")
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data.fill_(0.01)  # no random numbers: they take longer than the step
        model.tie_weights()
    if setting.precision in ("int8", "nf4"):
        quantize(model, setting.precision, dtype)
    model.requires_grad_(False)
    model.config.use_cache = False
    peft = attach(model, LoraSettings(setting.rank, target=setting.target), seed=0)
    trainable = TrainableModel(peft, torch.device("cpu"), checkpointing=setting.checkpointing)
    trainable.packed_attention()
    peft.train()
    return trainable


def quantize(model: Any, precision: str, dtype: Any) -> None:
    """Replace all linear layers but the head by bitsandbytes' own."""
    import bitsandbytes as bnb
    from torch import nn

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear or child is model.get_output_embeddings():
                continue
            size, bias = (child.in_features, child.out_features), child.bias is not None
            if precision == "nf4":
                layer = bnb.nn.Linear4bit(*size, bias, dtype, True, "nf4")
            else:
                layer = bnb.nn.Linear8bitLt(*size, bias, has_fp16_weights=False, threshold=6.0)
            layer.load_state_dict(child.state_dict())
            setattr(parent, name, layer.to("cpu"))


# -- the comparison ------------------------------------------------------------------------------


def compare(number: int) -> dict[str, Any]:
    setting = SETTINGS[number]
    allocated, peak = planned(setting)
    command = [sys.executable, "-W", "ignore", __file__, "--child", str(number)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"setting {number} failed:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        "number": number, "setting": asdict(setting), "planned": allocated, "planned_peak": peak,
        **found, "planned_by_allocated": round(allocated / found["allocated"], 4),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| base | precision | checkpointing | rows | rank | planned MiB | allocated MiB "
        "| planned / allocated | tracked MiB | plan's peak MiB | resident MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        s = row["setting"]
        name = s["model"] + (f", {s['layers']} layers" if s["layers"] else "")
        mib = [f"{row[k] / MIB:,.0f}" for k in ("planned", "allocated")]
        rest = [f"{row[k] / MIB:,.0f}" for k in ("tracked", "planned_peak", "resident")]
        cells = [name, s["precision"], s["checkpointing"], s["rows"], s["rank"], *mib]
        lines.append(
            "| "
            + " | ".join(map(str, [*cells, f"{row['planned_by_allocated']:.3f}", *rest]))
            + " |"
        )
    return "\n".join(lines)


def write_docs(text: str, page: Path = DOCS, marks: tuple[str, str] = MARKS) -> None:
    """Put a text between two marks of a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(marks[0])
    _, _, after = rest.partition(marks[1])
    page.write_text(f"{before}{marks[0]}\n{text}\n{marks[1]}{after}", encoding="utf-8")


def main() -> None:
    args = arguments()
    if args.child >= 0:
        print(json.dumps(real(SETTINGS[args.child])))
        return
    numbers = [int(n) for n in args.only.split(",")] if args.only else range(len(SETTINGS))
    rows = []
    for number in numbers:
        rows.append(compare(number))
        print(json.dumps(rows[-1]), flush=True)
    print(table(rows))
    if args.out:
        versions = {"python": platform.python_version(), "machine": platform.machine()}
        args.out.write_text(json.dumps({"rows": rows, **versions}, indent=1) + "\n")
    if args.write_docs:
        write_docs(table(rows))


if __name__ == "__main__":
    main()
