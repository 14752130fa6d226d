"""The table of `docs/memory.md`: what fits which card, from the plan alone; no GPU is used.

    python bench/memory_table.py [--write-docs] [--out table.json]

For each base, precision and length the peak of a step over one example of that length (no less is
possible without cutting examples), and, for each card, the least costly checkpointing with which
it fits: as it is, (s)elective, (f)ull, (o)ffload, or a dash. Peaks are those of the card's own data
types, kernels and allocator; the column shows the smallest card's that has bf16, an RTX 3090's.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from memory import write_docs

BASES = ("llama-2-7b", "llama-2-13b", "llama-30b", "llama-2-70b")
PRECISIONS = ("nf4", "int8", "16 bits")
LENGTHS = (256, 512, 2048)
CARDS = ("RTX 2080 Ti", "RTX 3090", "RTX 4090", "A100 80GB", "H200")
SHORT = {"none": "fits", "selective": "s", "full": "f", "offload": "o"}
MARKS = ("<!-- table -->", "<!-- /table -->")
REFERENCE = "RTX 3090"


def rows_of(base: str, cards: tuple[str, ...] = CARDS) -> list[dict[str, Any]]:
    """All cells of a base: one row a precision and length."""
    from vicuna.memory import devices, model_shapes
    from vicuna.memory.footprint import Planner

    config = model_shapes.config_of(base)
    # Cards with the same data types and kernels differ in nothing but their runtime.
    alike: dict[tuple[Any, ...], Planner] = {}
    planners = {}
    for card in cards:
        device = devices.by_name(card)
        key = (device.fastest()[0], device.capability >= (8, 0))
        planners[device] = alike.setdefault(key, Planner(config, device))
    rows = []
    for precision in PRECISIONS:
        for length in LENGTHS:
            row: dict[str, Any] = {"base": base, "precision": precision, "length": length}
            row["cards"] = {d.name: cell(p, d, precision, length) for d, p in planners.items()}
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def cell(planner: Any, device: Any, precision: str, length: int) -> dict[str, Any]:
    """The peaks on a card by checkpointing, in bytes, and the cheapest that fits ("" for none)."""
    from vicuna.memory.traced_step import StepSpec

    own = device.fastest()[0] if precision == "16 bits" else precision
    other = device.runtime - planner.device.runtime
    peaks = {
        way: planner.footprint(StepSpec(own, way, length, length)).peak + other
        for way in ("none", "selective", "full", "offload")
    }
    fitting = [way for way, peak in peaks.items() if peak <= device.memory]
    return {"precision": own, "peaks": peaks, "fits": fitting[0] if fitting else ""}


def table(rows: list[dict[str, Any]]) -> str:
    gib = 1 << 30
    lines = [
        "| base | precision | tokens | peak GiB: none | full | " + " | ".join(CARDS) + " |",
        "|---|---|---|---|---|" + "---|" * len(CARDS),
    ]
    for row in rows:
        peaks = row["cards"][REFERENCE]["peaks"]
        cells = [SHORT.get(row["cards"][card]["fits"], "-") for card in CARDS]
        numbers = [f"{peaks[way] / gib:.1f}" for way in ("none", "full")]
        words = [row["base"], row["precision"], f"{row['length']:,}", *numbers, *cells]
        lines.append("| " + " | ".join(words) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bases", default=",".join(BASES))
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    parser.add_argument("--write-docs", action="store_true", help="put the table into the docs")
    args = parser.parse_args()
    rows = [row for base in args.bases.split(",") for row in rows_of(base)]
    print(table(rows))
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
    if args.write_docs:
        write_docs(table(rows), marks=MARKS)


if __name__ == "__main__":
    main()
