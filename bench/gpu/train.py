"""LoRA training of 7B and 13B shapes on one GPU: speed, memory under a cap, parity, against others.

    python bench/gpu/train.py --out gpu.json        # one call, at most --minutes 8, no network
    python bench/gpu/train.py --tiny --device cpu   # the same script on a tiny model, to check it

The weights are random, made on the device. Each group of tasks is a process of its own, so that a
task that runs out of memory harms no other. Memory is capped to a card's size by
torch.cuda.set_per_process_memory_fraction. Where the time does not suffice, the last groups are
left out and named. The bars at the end are those of docs/performance.md.

Checked so far on a CPU with --tiny only: no GPU was at hand.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchkit import machine, report  # noqa: E402


@dataclass(frozen=True)
class Task:
    """One thing to measure over a group's model.

    kind: rate, parity, ours, plain, liger, trl. data: `full` or `mixed` (see steps.py). rows: of a
    pack. cap: GiB of memory the process may have; 0: all.
    """

    name: str
    kind: str
    data: str = "mixed"
    count: int = 32
    longest: int = 2048
    rows: int = 8192
    checkpointing: str = "none"
    cap: float = 0.0
    repeats: int = 3


@dataclass(frozen=True)
class Group:
    """Tasks over one model, in one process. cap: GiB while the model is made."""

    name: str
    shape: str
    precision: str
    tasks: tuple[Task, ...]
    cap: float = 0.0


def memory(name: str, longest: int, cap: float) -> Task:
    """A task that asks how much memory one example of `longest` tokens needs."""
    return Task(name, "ours", "full", 1, longest, longest, "full", cap, 2)


GROUPS = (
    Group(
        "7b bf16", "7b", "bf16",
        (
            Task("rate", "rate"),
            Task("parity", "parity", count=3, longest=256),
            Task("ours mixed", "ours"),
            Task("plain mixed", "plain"),
            Task("ours full", "ours", "full", 8),
            Task("plain full", "plain", "full", 8),
            memory("memory 2048", 2048, 24),
        ),
    ),
    Group(
        "7b nf4", "7b", "nf4",
        (
            memory("memory 2048", 2048, 11),
            Task("parity", "parity", count=3, longest=256),
            Task("ours mixed", "ours"),
            Task("plain mixed", "plain", repeats=1),
        ),
        cap=11,
    ),
    Group("13b nf4", "13b", "nf4", (memory("memory 2048", 2048, 24),), cap=24),
    Group(
        "7b int8", "7b", "int8",
        (memory("memory 256", 256, 11), Task("parity", "parity", count=3, longest=128)), cap=11,
    ),
    Group("7b bf16 liger", "7b", "bf16", (Task("liger mixed", "liger"),)),
    Group("7b bf16 trl", "7b", "bf16", (Task("trl mixed", "trl", rows=2048),)),
)  # fmt: skip
# (group, task, highest GiB)
MEMORY_BARS = (
    ("7b nf4", "memory 2048", 6.0),
    ("13b nf4", "memory 2048", 10.0),
    ("7b int8", "memory 256", 8.0),
    ("7b bf16", "memory 2048", 16.0),
)
RATE_SHARE, NF4_SPEED, TIMES_PLAIN = 0.5, 0.8, 1.8
PARITY = 1e-2
# Unsloth is named where it is there, and not measured: it loads models from a folder or a hub only.
OTHERS = ("trl", "liger_kernel", "unsloth", "flash_attn", "bitsandbytes")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cuda")
    add("--tiny", action="store_true", help="a tiny model: does the script work?")
    add("--minutes", type=float, default=8.0, help="for everything")
    add("--groups", default="", help="only these, separated by commas")
    add("--out", type=Path, help="write everything as JSON")
    add("--write-docs", action="store_true", help="put the tables into docs/performance.md")
    add("--child", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = arguments()
    if options.child:
        return child(options)
    ends = time.monotonic() + options.minutes * 60
    wanted = [g.strip() for g in options.groups.split(",") if g.strip()]
    found: dict[str, Any] = {}
    for group in GROUPS:
        if not wanted or group.name in wanted:
            found[group.name] = _process(group, options, ends - time.monotonic())
    devices = [f.pop("device") for f in found.values() if "device" in f]
    device = devices[0] if devices else options.device
    result = {
        "machine": machine.describe(os.cpu_count() or 1) | {"device": device},
        "tiny": options.tiny,
        "installed": {n: find_spec(n) is not None for n in OTHERS},
        "groups": found,
        "bars": bars(found),
    }
    text = markdown(result)
    print(text)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.write_docs:
        report.write("gpu", text)
    return int(any("failure" in f for f in found.values()))


def _process(group: Group, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Run a group in a process of its own; what it found, or why nothing."""
    if seconds < 20:
        return {"left_out": "no time left"}
    print(f"{group.name}: {seconds:.0f} s left", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, str(HERE / "train.py"), "--child", group.name]
        command += ["--device", options.device, "--out", str(out)]
        command += ["--tiny"] if options.tiny else []
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=seconds, env=environment
            )
            words = [x for x in done.stderr.splitlines() if x.strip()]
        except subprocess.TimeoutExpired:
            words = [f"stopped after {seconds:.0f} s"]
        written = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
        if not written.get("finished"):
            return written | {"failure": " | ".join(words[-3:])[-500:]}
        return dict(written)


# -- in the child ----


def child(options: argparse.Namespace) -> int:
    """Make the model of one group, work through its tasks, write after each."""
    import models
    import torch

    group = next(g for g in GROUPS if g.name == options.child)
    device = torch.device(options.device)
    found: dict[str, Any] = {"device": device_name(device)}
    _cap(device, group.cap)
    config = models.config_of(group.shape, options.tiny)
    began = time.perf_counter()
    model = models.build(config, group.precision, device)
    found["build_seconds"] = round(time.perf_counter() - began, 1)
    found["tasks"] = {}
    peft = None
    for task in group.tasks:
        _cap(device, task.cap)
        task = small(task) if options.tiny else task
        try:
            peft, outcome = _run(task, model, peft, config, device)
        except ImportError as e:
            outcome = {"left_out": f"{e.name} is not installed"}
        except torch.OutOfMemoryError as e:
            outcome = {"failure": f"out of memory: {str(e)[:120]}"}
        found["tasks"][task.name] = outcome
        options.out.write_text(json.dumps(found), encoding="utf-8")
    found["finished"] = True
    options.out.write_text(json.dumps(found), encoding="utf-8")
    return 0


def _run(task: Task, model: Any, peft: Any, config: Any, device: Any) -> tuple[Any, dict[str, Any]]:
    """(the PEFT model, once there is one; what the task found)."""
    import steps
    import torch

    from benchkit import operations, rate

    shape = operations.shape_of(config)
    if task.kind == "rate":
        rates = rate.measure(shape, task.rows, 512, "bfloat16", str(device), rounds=3)
        all_products = rates.weighted(_work(steps, task, shape, config))
        return peft, {"tflops": all_products / 1e12, "best_tflops": rates.best / 1e12}
    if peft is None:
        base = steps.with_liger(model) if task.kind == "liger" else model
        peft = steps.with_adapter(base, device)
    examples = steps.make_examples(task.data, task.count, task.longest, config.vocab_size)
    if task.kind == "parity":
        trainable = steps.trainable_of(peft, device, "none")
        return peft, steps.parity(trainable, examples, device)
    if task.kind == "trl":
        timing = steps.trl(peft, examples, task.rows, task.repeats, device)
        return peft, _figures(timing, 0)
    trained = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if task.kind == "ours":
        trainable = steps.trainable_of(peft, device, task.checkpointing)
        step = steps.ours(trainable, examples, task.rows, optimizer)
        work = _work(steps, task, shape, config).total
    else:
        step, work = steps.keys_values(peft, examples, 4, optimizer, device), 0
    return peft, _figures(steps.timed(step, device, task.repeats), work * task.repeats)


def _work(steps: Any, task: Task, shape: Any, config: Any) -> Any:
    """Operations that one update of a task needs."""
    from benchkit import operations
    from vicuna.data.pack import build_packs

    examples = steps.make_examples(task.data, task.count, task.longest, config.vocab_size)
    return operations.of_packs(build_packs(examples, steps.END, task.rows), shape)


def _figures(timing: Any, work: int) -> dict[str, Any]:
    found = asdict(timing) | {"tokens_per_second": timing.tokens / timing.seconds}
    if work:
        found["achieved_tflops"] = work / timing.seconds / 1e12
    return found


def small(task: Task) -> Task:
    """The task for a tiny model on a CPU."""
    fields = asdict(task) | {"count": min(task.count, 4), "repeats": 1}
    return Task(**(fields | {"longest": min(task.longest, 128), "rows": min(task.rows, 256)}))


def _cap(device: Any, gib: float) -> None:
    """Allow this process so many GiB of the device; 0: all of it."""
    if device.type != "cuda":
        return
    import torch

    total = torch.cuda.get_device_properties(device).total_memory / 2**30
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib / total) if gib else 1.0, device)


def device_name(device: Any) -> str:
    """The device in words."""
    if device.type != "cuda":
        return str(device)
    import torch

    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"


# -- what it says ----


def bars(found: dict[str, Any]) -> list[tuple[str, float | None, bool | None]]:
    """(what, value, reached) of every bar; None where it was not measured."""

    def get(group: str, task: str, key: str) -> float | None:
        value = found.get(group, {}).get("tasks", {}).get(task, {}).get(key)
        return None if value is None else float(value)

    def ratio(a: float | None, b: float | None) -> float | None:
        return a / b if a is not None and b else None

    lines: list[tuple[str, float | None, bool | None]] = []
    for group, task, highest in MEMORY_BARS:
        peak = get(group, task, "peak_gib")
        words = f"{group}, {task.split()[1]} tokens: at most {highest} GiB"
        lines.append((words, peak, None if peak is None else peak <= highest))
    speed = get("7b bf16", "ours mixed", "tokens_per_second")
    least = (
        ("7b bf16: at least 50 % of the measured matrix rate", RATE_SHARE,
         ratio(get("7b bf16", "ours full", "achieved_tflops"), get("7b bf16", "rate", "tflops"))),
        ("7b nf4: at least 80 % of the speed in bf16", NF4_SPEED,
         ratio(get("7b nf4", "ours mixed", "tokens_per_second"), speed)),
        ("7b bf16: at least 1.8 x transformers + PEFT", TIMES_PLAIN,
         ratio(speed, get("7b bf16", "plain mixed", "tokens_per_second"))),
    )  # fmt: skip
    lines += [(w, v, None if v is None else v >= lowest) for w, lowest, v in least]
    for group in ("7b bf16", "7b nf4", "7b int8"):
        off = get(group, "parity", "loss")
        words = f"{group}: loss as with plain PEFT, to {PARITY:g} relative"
        lines.append((words, off, None if off is None else off <= PARITY))
    return lines


def markdown(result: dict[str, Any]) -> str:
    """Tables of speed, memory and parity, then the bars."""
    rows = []
    for group, found in result["groups"].items():
        if "tasks" not in found:
            rows.append([group, found.get("failure") or found.get("left_out", ""), *[""] * 4])
        for name, task in found.get("tasks", {}).items():
            rows.append([f"{group}: {name}", *_cells(task)])
        if "failure" in found and "tasks" in found:
            rows.append([group, found["failure"], *[""] * 4])
    head = [
        "task",
        "real tokens/s",
        "TFLOPS",
        "peak GiB",
        "reserved GiB",
        "parity",
    ]
    lines = []
    for what, value, ok in result["bars"]:
        word = {None: "not measured", True: "pass", False: "FAIL"}[ok]
        word = "not judged, tiny" if result["tiny"] else word
        lines.append(f"- {word}: {what}" + ("" if value is None else f" (here {value:.4g})"))
    note = "A tiny model: these figures mean nothing.\n\n" if result["tiny"] else ""
    there = ", ".join(n for n, yes in result["installed"].items() if yes)
    note += f"Installed: {there or 'none of ' + ', '.join(OTHERS)}.\n\n"
    words = f"{result['machine']['device']}; {report.machine_words(result['machine'])}"
    return f"{note}{words}\n\n{report.table(head, rows)}\n\n" + "\n".join(lines)


def _cells(task: dict[str, Any]) -> list[str]:
    if "left_out" in task or "failure" in task:
        return [task.get("left_out") or task["failure"], "", "", "", ""]
    rate = task.get("achieved_tflops", task.get("tflops"))
    off = f"loss {task['loss']:.1e}, gradient {task['gradient']:.1e}" if "gradient" in task else ""
    return [
        f"{task['tokens_per_second']:.0f}" if "tokens_per_second" in task else "",
        f"{rate:.4g}" if rate else "",
        f"{task['peak_gib']:.2f}" if task.get("peak_gib") else "",
        f"{task['reserved_gib']:.2f}" if task.get("reserved_gib") else "",
        off,
    ]


if __name__ == "__main__":
    sys.exit(main())
