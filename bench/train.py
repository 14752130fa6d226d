"""How fast and in how much memory the same LoRA training runs: the 2023 way, the peers, and ours.

    python bench/train.py --records 96 --cutoff 512 --data my.jsonl --env ~/.cache/vicuna/bench
    python bench/train.py --records 400 --cutoff 2048 --contenders plain,ours --repeats 1
    python bench/train.py --sweep

Every contender trains the embedded base on the same token ids, in the same order, with the same
adapter (rank 8, all linear layers), optimiser, batch and number of updates. Each runs in a process
of its own, one at a time, in turn, `--repeats` times, with the same threads. A peer that can run in
several types or ways is first tried in each on a few examples, and takes the fastest.

Measured is the pass over all updates: not loading, not preparing data, not the one micro-batch
forward and backward (without an update) that each does first to warm up. Real tokens are those of
the examples as if each stood alone. Peak memory is the process's resident set during the pass.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchkit import contenders as field
from benchkit import environments, examples, machine, report, summary, sweep
from benchkit.contenders import Contender, Job, Run, Variant

HERE = Path(__file__).parent
SAMPLE = HERE.parent / "src/vicuna/samples/instruct_zh.jsonl"

# What the padding contenders compute at a time: 4 examples, but not more tokens than this.
PADDED_TOKENS = 2048
MICRO_BATCH = (
    f"examples at a time of those that pad; 0: 4, fewer where that is over {PADDED_TOKENS:,} tokens"
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=SAMPLE, help="records; default: the packaged samples")
    add("--records", type=int, default=96, help="no record is used twice")
    add("--cutoff", type=int, default=512, help="longest example in tokens")
    add("--batch", type=int, default=32, help="examples in an update")
    add("--updates", type=int, default=0, help="0: as many as the records fill")
    add("--micro_batch", type=int, default=0, help=MICRO_BATCH)
    add("--contenders", default="original,plain,trl,llamafactory,ours")
    add("--repeats", type=int, default=3)
    add("--probe_records", type=int, default=8, help="examples of the short trials of the types")
    add("--model", default="smollm2-135m")
    add("--threads", type=int, default=0, help="0: all cores this process may use")
    add("--seed", type=int, default=42)
    add("--env", type=Path, help="folder for the peers' environments; default: the user's cache")
    add("--no_roofline", action="store_true", help="do not measure the matrix-product rate")
    add("--sweep", action="store_true", help="ours alone, cutoff 256 to 4,096")
    add("--sweep_cutoffs", default="256,512,1024,2048,4096")
    add("--sweep_tokens", type=int, default=16384, help="real tokens at each cutoff")
    add("--out", type=Path, help="write everything as JSON")
    add("--write-docs", action="store_true", help="put the table into docs/performance.md")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    options.threads = options.threads or machine.physical_threads()
    with tempfile.TemporaryDirectory(prefix="bench-train-") as work:
        if options.sweep:
            name, result, text = "sweep", *_sweep(options, Path(work))
        else:
            result = compare(options, Path(work))
            name, text = f"train {options.records} x {options.cutoff}", summary.markdown(result)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        written = json.dumps(result, ensure_ascii=False, indent=1)
        options.out.write_text(written + "\n", encoding="utf-8")
    if options.write_docs:
        report.write(name, text)
    return 0


def compare(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Probe, run all contenders in turn, and put the figures together."""
    folder, renderer = _model(options.model)
    chosen = examples.select(
        options.data, renderer, options.records, options.cutoff, options.batch, options.updates,
        options.seed,
    )  # fmt: skip
    if len(chosen.items) < options.records:
        say(f"{options.data.name} has only {len(chosen.items)} records of this length")
    job = _job(options, chosen, folder, renderer, work / "all")
    entries, ready = _ready(options, chosen, folder, renderer, work)
    rates = [] if options.no_roofline else [_roofline(options, job, 0)]
    for repeat in range(options.repeats):
        for entry in entries:
            if entry.name in ready:
                _one(entry, ready[entry.name], job, chosen, f"{repeat + 1}/{options.repeats}")
    result = {
        "data": {"file": options.data.name, **chosen.describe()},
        "repeats": options.repeats,
        "machine": machine.describe(options.threads),
        "settings": {
            "micro_batch_of_padding": job.micro_batch,
            "rank": job.rank,
            "alpha": job.alpha,
            "learning_rate": job.learning_rate,
        },
        **summary.compare(entries),
    }
    share = None
    ours = result["contenders"].get("ours", {})
    if rates and "missing" not in ours and ours:
        rows = ours["runs"][-1]["cut"]["tokens"]
        last = _roofline(options, job, ours["tokens_per_second"], rows)
        # The higher of the two rates: what the chip showed it can do in this run.
        same = [r for r in (*rates, last) if r["dtype"] == last["dtype"]]
        best = max(same, key=lambda r: r["rate_gflops"])
        share = last["achieved_gflops"] / best["rate_gflops"]
        result["roofline"] = {**last, "rate_gflops": best["rate_gflops"], "share": share}
    result["bars"] = summary.bars(result["contenders"], share)
    return result


Ready = tuple[Contender, Variant, Path]


def _ready(
    options: argparse.Namespace, chosen: examples.Selection, folder: Path, renderer: Any, work: Path
) -> tuple[list[summary.Entry], dict[str, Ready]]:
    """Each contender with its interpreter and the variant that won its probe, or why there is
    none."""
    known = field.contenders()
    names = [n.strip() for n in options.contenders.split(",") if n.strip()]
    unknown = [n for n in names if n not in known]
    if unknown:
        raise SystemExit(f"no such contender: {unknown[0]}; known: {', '.join(known)}")
    few = min(options.probe_records, len(chosen.items))
    short = examples.select(
        options.data, renderer, few, options.cutoff, few, 1, options.seed
    )  # fmt: skip
    probe_job = _job(options, short, folder, renderer, work / "few")
    root = options.env or _cache()
    entries, ready = [], {}
    for name in names:
        contender = known[name]
        entry = summary.Entry(
            name,
            contender.title,
            tokens=chosen.tokens,
            examples=len(chosen.order),
            updates=chosen.updates,
        )
        entries.append(entry)
        try:
            python = field.python_for(contender, root)
        except environments.NotMade as e:
            entry.missing = str(e)
            continue
        say(f"{name}: trying {len(contender.variants)} ways" if len(contender.variants) > 1 else "")
        probe = field.probe(contender, probe_job, short.tokens, python, say)
        entry.probe = probe.figures
        if probe.taken is None:
            entry.missing = f"no way to run it worked: {probe.figures}"
            continue
        entry.variant = probe.taken.name
        ready[name] = (contender, probe.taken, python)
    return entries, ready


def _one(
    entry: summary.Entry, ready: Ready, job: Job, chosen: examples.Selection, words: str
) -> None:
    """One repeat of one contender."""
    contender, variant, python = ready
    done: Run = field.run(contender, variant, job, python)
    if done.failure:
        entry.missing = done.failure
        say(f"{words} {entry.name}: {done.failure}")
        return
    prints = done.result.pop("fingerprints", None)
    if prints is not None:
        entry.disagreeing = examples.disagreeing(chosen, prints)
    if done.result.get("precision"):
        entry.variant = done.result["precision"]
    entry.runs = [*entry.runs, done.result]
    say(
        f"{words} {entry.name} ({entry.variant}): {entry.speeds[-1]:.1f} real tokens/s, "
        f"{done.result['peak_gib']:.2f} GiB, loss {done.result['loss']:.4f}"
    )


def _roofline(
    options: argparse.Namespace, job: Job, speed: float, rows: int = 1024
) -> dict[str, Any]:
    """bench/roofline.py in a process of its own, over the same examples."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        out = Path(folder) / "roofline.json"
        command = [
            sys.executable, str(HERE / "roofline.py"), "--data", str(options.data),
            "--records", str(options.records), "--cutoff", str(options.cutoff),
            "--batch", str(options.batch), "--updates", str(job.updates),
            "--model", options.model, "--seed", str(options.seed), "--rows", str(rows),
            "--threads", str(options.threads), "--tokens_per_second", str(speed or -1),
            "--out", str(out),
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        loaded: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return loaded


def _sweep(options: argparse.Namespace, work: Path) -> tuple[dict[str, Any], str]:
    folder, renderer = _model(options.model)
    cutoffs = [int(c) for c in options.sweep_cutoffs.split(",")]

    def run_at(cutoff: int, data: Path, records: int) -> tuple[Run, examples.Selection]:
        chosen = examples.select(
            data, renderer, records, cutoff, max(1, records // 2), 2, options.seed
        )
        job = _job(options, chosen, folder, renderer, work / str(cutoff), cutoff)
        ours = field.contenders()["ours"]
        return field.run(ours, sweep.WAY, job, Path(sys.executable)), chosen

    result = sweep.run(SAMPLE, renderer, folder, cutoffs, options.sweep_tokens, work, run_at, say)
    result["machine"] = machine.describe(options.threads)
    return result, sweep.markdown(result)


def _model(name: str) -> tuple[Path, Any]:
    from vicuna.model.base import locate

    folder = locate(name)
    return folder, examples.renderer_of(folder)


def _job(
    options: argparse.Namespace, chosen: examples.Selection, folder: Path, renderer: Any,
    work: Path, cutoff: int = 0,
) -> Job:  # fmt: skip
    examples.write(chosen, work)
    cutoff = cutoff or options.cutoff
    return Job(
        model=str(folder),
        pad_id=renderer.tokenizer.data.pad_id,
        examples=work / "examples.jsonl",
        records=work / "records.jsonl",
        template=examples.TEMPLATE,
        updates=chosen.updates,
        batch=chosen.batch,
        cutoff=cutoff,
        pack=max(1024, cutoff),
        threads=options.threads,
        seed=options.seed,
        micro_batch=min(
            options.micro_batch or max(1, min(4, PADDED_TOKENS // cutoff)), chosen.batch
        ),
    )


def _cache() -> Path:
    from vicuna.files import cache_dir

    return cache_dir("bench")


def say(text: str) -> None:
    """Progress goes to the standard error; the table alone to the standard output."""
    if text:
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
