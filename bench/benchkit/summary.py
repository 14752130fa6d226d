"""From single runs to what a comparison says: medians, ratios, the loss check, the bars."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchkit import report

LOSS_AGREES = 0.01
# What the comparison is meant to reach: ours against others.
BARS = {"original": 7.0, "plain": 4.0, "packed": 2.5}
MEMORY_BARS = {"original": 0.2, "best": 0.5}
SHARE_BAR = 0.65


@dataclass
class Entry:
    """One contender's results. missing: why it has none."""

    name: str
    title: str
    variant: str = ""
    probe: dict[str, float | str] | None = None
    runs: Sequence[dict[str, Any]] = ()
    tokens: int = 0
    examples: int = 0
    updates: int = 0
    missing: str = ""
    disagreeing: int = 0

    @property
    def speeds(self) -> list[float]:
        """Real tokens a second of every repeat."""
        return [self.tokens / r["seconds"] for r in self.runs]

    def to_json(self) -> dict[str, Any]:
        """The entry of the result file."""
        head = {"title": self.title, "variant": self.variant, "probe": self.probe or {}}
        if self.missing or not self.runs:
            return head | {"missing": self.missing or "no run ended"}
        speed = statistics.median(self.speeds)
        return head | {
            "tokens_per_second": speed,
            "tokens_per_second_of_runs": self.speeds,
            "examples_per_second": speed * self.examples / self.tokens,
            "peak_gib": max(r["peak_gib"] for r in self.runs),
            "before_gib": max(r["before_gib"] for r in self.runs),
            "process_peak_gib": max(r["process_peak_gib"] for r in self.runs),
            "loss": statistics.median(r["loss"] for r in self.runs),
            "examples_tokenised_otherwise": self.disagreeing,
            "updates": self.runs[0].get("updates", self.updates),
            "updates_asked": self.updates,
            "runs": list(self.runs),
        }


def compare(entries: Sequence[Entry]) -> dict[str, Any]:
    """Every contender's figures with ours against it, and what does not agree."""
    found = {e.name: e.to_json() for e in entries}
    there = {n: f for n, f in found.items() if "missing" not in f}
    ours = there.get("ours")
    if ours:
        for figures in there.values():
            speed = ours["tokens_per_second"] / figures["tokens_per_second"]
            figures["ours_is_faster"] = speed
            figures["ours_memory_share"] = ours["peak_gib"] / figures["peak_gib"]
    flags = _losses(there)
    flags += [
        f"{n}: {f['examples_tokenised_otherwise']} examples came out with other token ids"
        for n, f in there.items()
        if f["examples_tokenised_otherwise"]
    ]
    flags += [
        f"{n}: made {f['updates']} updates, not {f['updates_asked']}"
        for n, f in there.items()
        if f["updates"] != f["updates_asked"]
    ]
    return {"contenders": found, "flags": flags}


def _losses(there: dict[str, dict[str, Any]]) -> list[str]:
    if not there:
        return []
    reference = next(n for n in ("original", "plain", "ours", *there) if n in there)
    wanted = there[reference]["loss"]
    flags = []
    for name, figures in there.items():
        off = figures["loss"] / wanted - 1
        figures["loss_against"] = {reference: off}
        if not abs(off) <= LOSS_AGREES:
            flags.append(f"{name}: loss {figures['loss']:.4f}, but {reference} has {wanted:.4f}")
    return flags


def bars(found: dict[str, dict[str, Any]], share: float | None) -> list[tuple[str, float, bool]]:
    """(what, value, reached) of every bar that can be told from these contenders."""
    there = {n: f for n, f in found.items() if "missing" not in f}
    lines: list[tuple[str, float, bool]] = []
    if "ours" not in there:
        return lines
    for name in ("original", "plain"):
        if name in there:
            value = there[name]["ours_is_faster"]
            lines.append((f"speed, at least {BARS[name]} x {name}", value, value >= BARS[name]))
    packed = [there[n]["ours_is_faster"] for n in ("trl", "llamafactory") if n in there]
    if packed:
        bar = BARS["packed"]
        words = f"speed, at least {bar} x the better of TRL and LLaMA-Factory"
        lines.append((words, min(packed), min(packed) >= bar))
    if "original" in there:
        value, bar = there["original"]["ours_memory_share"], MEMORY_BARS["original"]
        lines.append((f"memory, at most {bar} of the original's", value, value <= bar))
    others = [f["ours_memory_share"] for n, f in there.items() if n not in ("ours", "original")]
    if others:
        bar = MEMORY_BARS["best"]
        words = f"memory, at most {bar} of the best of the others"
        lines.append((words, max(others), max(others) <= bar))
    if share is not None:
        words = f"matrix rate, at least {SHARE_BAR:.0%} of what was measured"
        lines.append((words, share, share >= SHARE_BAR))
    return lines


def markdown(result: dict[str, Any]) -> str:
    """The table for people, with what it was measured on and what each peer ran with."""
    rows = []
    notes = []
    for figures in result["contenders"].values():
        title = figures["title"]
        if "missing" in figures:
            notes.append(f"- {title}: missing, {figures['missing']}")
            continue
        speeds = figures["tokens_per_second_of_runs"]
        rows.append(
            [
                f"{title} ({figures['variant']})",
                f"{figures['tokens_per_second']:.0f} ({min(speeds):.0f} to {max(speeds):.0f})",
                f"{figures['examples_per_second']:.3f}",
                f"{figures['peak_gib']:.2f}",
                f"{figures['before_gib']:.2f}",
                f"{figures['loss']:.4f}",
                _times(figures.get("ours_is_faster")),
                _times(figures.get("ours_memory_share")),
            ]
        )
        if figures["probe"]:
            tried = ", ".join(f"{k}: {v}" for k, v in figures["probe"].items())
            notes.append(f"- {title} was tried in short as {tried} (real tokens a second)")
    head = [
        "contender", "real tokens/s", "examples/s", "peak GiB", "before GiB", "loss",
        "ours is faster by", "ours needs of its memory",
    ]  # fmt: skip
    data = result["data"]
    parts = [
        f"{data['examples_trained_on']} examples of at most {data['cutoff']} tokens "
        f"({data['real_tokens']:,} real tokens, mean {data['mean_length']}), {data['updates']} "
        f"updates of {data['batch']}; median of {result['repeats']} (lowest to highest). "
        + report.machine_words(result["machine"]),
        report.table(head, rows),
        "\n".join(notes),
        "\n".join(f"- does not agree: {flag}" for flag in result["flags"]),
        "\n".join(
            f"- {'reached' if ok else 'not reached'}: {what} (here {value:.2f})"
            for what, value, ok in result["bars"]
        ),
    ]
    return "\n\n".join(p for p in parts if p)


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} x"
