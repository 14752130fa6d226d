"""Does cost grow with real tokens only? Ours alone, at cutoffs from 256 to 4,096.

The records are made from the sample data: its turns joined until an example is as long as the
cutoff, so that every cutoff has the same number of real tokens in fewer, longer examples. What may
grow is attention, which sees pairs of tokens: its share is computed from the operations. Prefixes
are not shared here: sharing saves more where examples are short.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from benchkit import operations, report
from benchkit.contenders import Run, Variant
from benchkit.examples import Selection
from vicuna.data.pack import build_packs

# Updates of a run: the records are split evenly between them.
UPDATES = 2
WAY = Variant("auto", {"share_prefixes": False})
# Tokens left free for the template's own words and for pieces that are cut badly.
ROOM = 80

RunAt = Callable[[int, Path, int], tuple[Run, Selection]]


def run(
    sample: Path, renderer: Any, model: Path, cutoffs: Sequence[int], tokens: int, work: Path,
    run_at: RunAt, say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Train at every cutoff.

    Args:
        tokens: real tokens at each cutoff, about.
        run_at: runs ours: (cutoff, data file, records) to its run and what it trained on.
    """
    shape = operations.shape_of(json.loads((model / "config.json").read_text(encoding="utf-8")))
    rows = []
    for cutoff in cutoffs:
        count = max(UPDATES, tokens // cutoff // UPDATES * UPDATES)
        path = work / f"long-{cutoff}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_long(sample, path, renderer, cutoff, count)
        done, chosen = run_at(cutoff, path, count)
        if done.failure:
            rows.append({"cutoff": cutoff, "missing": done.failure})
            say(f"cutoff {cutoff}: {done.failure}")
            continue
        rows.append(_row(cutoff, done.result, chosen, shape))
        say(f"cutoff {cutoff}: {rows[-1]['milliseconds_per_token']:.3f} ms a real token")
    return {"rows": _relative(rows)}


def write_long(sample: Path, path: Path, renderer: Any, cutoff: int, count: int) -> None:
    """`count` records of nearly `cutoff` tokens: turns of the sample data joined, one half of them
    the question, the other the answer, so that the same share is supervised at every cutoff."""
    lines = sample.read_text(encoding="utf-8").splitlines()
    source = cycle([json.loads(line) for line in lines])
    with path.open("w", encoding="utf-8") as f:
        for n in range(count):
            half = (cutoff - ROOM) // 2
            line = {
                "instruction": f"{n}: " + _joined(source, renderer, half),
                "input": "",
                "output": _joined(source, renderer, half),
            }
            f.write(json.dumps(line, ensure_ascii=False) + "\n")


def _joined(source: Iterator[dict[str, str]], renderer: Any, size: int) -> str:
    """Turns of about `size` tokens; where the next one is too long, full stops fill up."""
    parts: list[str] = []
    used = 0
    while True:
        record = next(source)
        text = f"{record['instruction']}\n{record['output']}"
        tokens = len(renderer.tokenizer.text(text)) + 1
        if used + tokens > size:
            break
        parts.append(text)
        used += tokens
    return "\n".join(parts) + "。" * max(1, (size - used) // _cost(renderer))


def _cost(renderer: Any) -> int:
    """Tokens of one full stop, rounded up."""
    return max(1, -(-len(renderer.tokenizer.text("。" * 32)) // 32))


def _row(
    cutoff: int, result: dict[str, Any], chosen: Selection, shape: operations.Shape
) -> dict[str, Any]:
    work = operations.Work()
    for k in range(chosen.updates):
        step = [i.example for i in chosen.ordered[k * chosen.batch : (k + 1) * chosen.batch]]
        packs = build_packs(step, chosen.end_id, result["cut"]["tokens"], share=False)
        work.add(operations.of_packs(packs, shape))
    return {
        "cutoff": cutoff,
        "real_tokens": chosen.tokens,
        "mean_length": round(chosen.tokens / len(chosen.order), 1),
        "milliseconds_per_token": result["seconds"] / chosen.tokens * 1e3,
        "peak_gib": result["peak_gib"],
        "gflop_per_token": work.total / chosen.tokens / 1e9,
        "attention_share": work.attention / work.total,
    }


def _relative(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Time a token against the shortest cutoff, and what the operations alone would make of it."""
    first = next((r for r in rows if "missing" not in r), None)
    for row in rows:
        if first is None or "missing" in row:
            continue
        row["time_against_first"] = row["milliseconds_per_token"] / first["milliseconds_per_token"]
        row["operations_against_first"] = row["gflop_per_token"] / first["gflop_per_token"]
    return rows


def markdown(result: dict[str, Any]) -> str:
    """The table for people."""
    head = [
        "cutoff", "real tokens", "mean length", "ms per real token", "against the first",
        "operations against the first", "attention's share of operations", "peak GiB",
    ]  # fmt: skip
    rows = []
    for r in result["rows"]:
        if "missing" in r:
            rows.append([r["cutoff"], r["missing"], *[""] * 6])
            continue
        rows.append(
            [
                r["cutoff"], r["real_tokens"], r["mean_length"],
                f"{r['milliseconds_per_token']:.3f}", f"{r['time_against_first']:.2f} x",
                f"{r['operations_against_first']:.2f} x", f"{r['attention_share']:.1%}",
                f"{r['peak_gib']:.2f}",
            ]
        )  # fmt: skip
    return report.machine_words(result["machine"]) + "\n\n" + report.table(head, rows)
