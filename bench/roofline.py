"""How near the training is to what the chip can do.

    python bench/roofline.py --records 96 --cutoff 512 --data my.jsonl
    python bench/roofline.py --tokens_per_second 359
    python bench/roofline.py --profile

Counts the operations that the job needs (`benchkit/operations.py` says which), measures the chip's
matrix-product rate at the model's shapes in the type that ours trains in (`benchkit/rate.py`), and
sets both against real tokens a second: given, or measured here by one run of ours. With --profile,
one update of ours runs under torch.profiler, and a table says where its time goes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchkit import contenders, examples, machine, operations, profile, rate, report

HERE = Path(__file__).parent
SAMPLE = HERE.parent / "src/vicuna/samples/instruct_zh.jsonl"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# Rows whose logits exist at a time, as in vicuna/model/loss.py.
HEAD_ROWS = 512


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default=SAMPLE)
    add("--records", type=int, default=96)
    add("--cutoff", type=int, default=512)
    add("--batch", type=int, default=32)
    add("--updates", type=int, default=0, help="0: as many as the records fill")
    add("--model", default="smollm2-135m")
    add("--dtype", default="auto", help="auto (what ours chooses), fp32, bf16, fp16")
    add("--rows", type=int, default=1024, help="rows a pack may have")
    add("--rank", type=int, default=8)
    add("--threads", type=int, default=0)
    add("--seed", type=int, default=42)
    add("--rounds", type=int, default=rate.ROUNDS, help="rounds of the rate's measurement")
    add(
        "--tokens_per_second", type=float, default=0.0,
        help="real tokens a second to judge; 0: measure one run of ours; below 0: none",
    )  # fmt: skip
    add("--profile", action="store_true", help="where one update's time goes")
    add("--out", type=Path, help="write everything as JSON")
    add("--write-docs", action="store_true", help="put the table into docs/performance.md")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    options.threads = options.threads or machine.physical_threads()
    from vicuna.model.base import locate

    folder = locate(options.model)
    renderer = examples.renderer_of(folder)
    chosen = examples.select(
        options.data, renderer, options.records, options.cutoff, options.batch, options.updates,
        options.seed,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="bench-roofline-") as work:
        job = _job(options, chosen, folder, renderer, Path(work))
        speed = options.tokens_per_second
        if speed == 0:
            speed = _measured(job, chosen.tokens)
        result = judge(chosen, folder, options, speed)
        text = markdown(result)
        if options.profile:
            result["profile"] = profile.one_update(job, Path(work))
            text += "\n\n" + profile.markdown(result["profile"])
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.write_docs:
        report.write("roofline", text)
    return 0


def judge(
    chosen: examples.Selection, folder: Path, options: argparse.Namespace, speed: float
) -> dict[str, Any]:
    """Operations needed, rate measured, and what that makes of `speed` real tokens a second."""
    import torch

    torch.set_num_threads(options.threads)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape = operations.shape_of(config, options.rank)
    needed, every_row, rows, targets = needs(chosen, shape, options.rows)
    dtype = _dtype(options.dtype)
    rates = rate.measure(shape, rows, min(HEAD_ROWS, targets), DTYPES[dtype], rounds=options.rounds)
    weighted = rates.weighted(needed)
    per_token = needed.total / chosen.tokens
    result: dict[str, Any] = {
        "machine": machine.describe(options.threads),
        "data": {"file": options.data.name, **chosen.describe()},
        "dtype": dtype,
        "rows_of_a_pack": rows,
        "gflop_per_token": per_token / 1e9,
        "gflop_per_token_all_rows_of_last_layer": every_row.total / chosen.tokens / 1e9,
        "operations": {
            k: getattr(needed, k) / needed.total for k in ("linear", "lora", "attention", "head")
        },
        "rate_gflops": weighted / 1e9,
        "best_product_gflops": rates.best / 1e9,
        "products_gflops": {k: round(v / 1e9, 1) for k, v in rates.products.items()},
        "tokens_per_second_at_100_percent": weighted / per_token,
    }
    if speed > 0:
        result |= {
            "tokens_per_second": speed,
            "achieved_gflops": speed * per_token / 1e9,
            "share": speed * per_token / weighted,
            "share_of_best_product": speed * per_token / rates.best,
        }
    return result


def needs(
    chosen: examples.Selection, shape: operations.Shape, budget: int
) -> tuple[operations.Work, operations.Work, int, int]:
    """(operations needed, the same with the whole last layer, rows and targets of a mean pack)."""
    from vicuna.data.pack import build_packs

    needed, every_row = operations.Work(), operations.Work()
    rows = targets = count = 0
    ordered = [i.example for i in chosen.ordered]
    for start in range(0, len(ordered), chosen.batch):
        packs = build_packs(ordered[start : start + chosen.batch], chosen.end_id, budget)
        needed.add(operations.of_packs(packs, shape))
        every_row.add(operations.of_packs(packs, shape, "all"))
        rows += sum(len(p.ids) for p in packs)
        targets += sum(len(p.target_rows) for p in packs)
        count += len(packs)
    return needed, every_row, max(1, rows // count), max(1, targets // count)


def markdown(r: dict[str, Any]) -> str:
    """The result for people."""
    shares = ", ".join(f"{k} {v:.1%}" for k, v in r["operations"].items())
    rows = [
        ["needed per real token", f"{r['gflop_per_token']:.3f} GFLOP"],
        ["made up of", shares],
        [f"matrix rate at the model's shapes, {r['dtype']}", f"{r['rate_gflops']:.1f} GFLOPS"],
        ["the best single product", f"{r['best_product_gflops']:.1f} GFLOPS"],
        ["real tokens/s at 100 %", f"{r['tokens_per_second_at_100_percent']:.1f}"],
    ]
    if "share" in r:
        rows += [
            ["real tokens/s of ours", f"{r['tokens_per_second']:.1f}"],
            ["share of the matrix rate", f"{r['share']:.1%}"],
            ["share of the best single product", f"{r['share_of_best_product']:.1%}"],
        ]
    return report.machine_words(r["machine"]) + "\n\n" + report.table(["what", "value"], rows)


def _dtype(wanted: str) -> str:
    """The type that ours computes in."""
    if wanted != "auto":
        return wanted
    import torch

    from vicuna.model import load

    return load.choose("auto", torch.device("cpu")).precision


def _job(
    options: argparse.Namespace, chosen: examples.Selection, folder: Path, renderer: Any, work: Path
) -> contenders.Job:
    examples.write(chosen, work)
    return contenders.Job(
        model=str(folder),
        pad_id=renderer.tokenizer.data.pad_id,
        examples=work / "examples.jsonl",
        records=work / "records.jsonl",
        template=examples.TEMPLATE,
        updates=chosen.updates,
        batch=chosen.batch,
        cutoff=options.cutoff,
        pack=options.rows,
        threads=options.threads,
        seed=options.seed,
        rank=options.rank,
    )


def _measured(job: contenders.Job, tokens: int) -> float:
    """Real tokens a second of one run of ours, in a process of its own."""
    ours = contenders.contenders()["ours"]
    done = contenders.run(ours, ours.variants[0], job, Path(sys.executable))
    if done.failure:
        raise SystemExit(f"ours did not run: {done.failure}")
    return float(tokens / done.result["seconds"])


if __name__ == "__main__":
    sys.exit(main())
