"""What a command that writes a model says of its result: on the screen, and in report.json.

report = Report("merge", result, "16bit")
with whole_folder(result) as aside:
    ...                                    # write
    report.measure(bytes_before, aside)
    report.verify(settings, before, after, tokenizer)   # raises where the gate is missed
    report.write(aside)
report.finish()                            # prints; raises where a failed result was kept
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vicuna import __version__
from vicuna.config import VerifySettings
from vicuna.data.tokenizer import Tokenizer
from vicuna.errors import UserError
from vicuna.json_yaml import write_json
from vicuna.terminal import say
from vicuna.verify.compare import Comparison, compare
from vicuna.verify.logits import LogitSource
from vicuna.verify.texts import texts_for

REPORT = "report.json"


@dataclass(frozen=True)
class Gate:
    """How far a result may be from what it was made of.

    exact: every score must be the same. max_kl: of the mean KL divergence, in nats.
    """

    max_kl: float
    max_perplexity_ratio: float
    exact: bool = False


# By the kind of result. A base of 135M parameters loses far more by few bits than one of 7B: these
# are set so that it passes and what is broken does not. Two bits are held to what three are: beyond
# that a model says nothing that makes sense.
GATES = {
    "exact": Gate(0.0, 1.0, exact=True),
    "32bit": Gate(1e-6, 1.001),
    "16bit": Gate(0.01, 1.02),
    "8bit": Gate(0.03, 1.03),
    "6bit": Gate(0.1, 1.05),
    "5bit": Gate(0.3, 1.2),
    "4bit": Gate(0.8, 1.6),
    "3bit": Gate(2.0, 5.0),
    "2bit": Gate(2.0, 5.0),
}


@dataclass
class Report:
    """What was done, and how well.

    Args:
        command: as typed, such as `merge`.
        result: the folder or file under its final name.
        kind: a key of `GATES`.
        about: what was read and how, for report.json (names, settings).
        notes: what the user should know, in words.
        answers: what the result said, by question, where it was asked any.
    """

    command: str
    result: Path
    kind: str
    about: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    answers: dict[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    peak_memory: int = 0
    peak_memory_verifying: int = 0
    comparison: Comparison | None = None
    gate: Gate | None = None
    misses: list[str] = field(default_factory=list)
    _began: float = field(default_factory=time.monotonic)

    def measure(self, bytes_before: int, written: Path) -> None:
        """Note sizes, and the process's peak memory, which comparing has not raised yet."""
        self.bytes_before, self.bytes_after = bytes_before, size_of(written)
        self.peak_memory = peak_memory()

    def verify(
        self,
        settings: VerifySettings,
        before: Callable[[], LogitSource],
        after: Callable[[], LogitSource],
        tokenizer: Callable[[], Tokenizer],
    ) -> None:
        """Compare, unless that is turned off.

        Raises: UserError where the gate is missed and the result is not to be kept.
        """
        if not settings.verify:
            return
        texts = texts_for(settings, tokenizer())
        one, two = before(), after()
        try:
            self.comparison = compare(one, two, texts)
        finally:
            for scorer in (one, two):
                getattr(scorer, "close", lambda: None)()
        self.peak_memory_verifying = peak_memory()
        self.gate = gate_of(self.kind, settings)
        self.misses = misses(self.comparison, self.gate)
        if self.misses and not settings.keep_failed:
            self.show(removed=True)
            raise self._failure("it was removed")

    def _failure(self, what_became: str) -> UserError:
        return UserError(
            "the result differs too much from its source: {misses}; {what_became}",
            misses="; ".join(self.misses),
            what_became=what_became,
            where=str(self.result),
            fix="--keep_failed keeps such a result; --max_kl and --max_perplexity_ratio move the "
            "gate.",
        )

    def to_json(self) -> dict[str, Any]:
        """For report.json."""
        return {
            "command": self.command,
            "vicuna": __version__,
            "result": self.result.name,
            **self.about,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "peak_memory_bytes": self.peak_memory,
            "peak_memory_verifying_bytes": self.peak_memory_verifying,
            "seconds": round(time.monotonic() - self._began, 3),
            "kind": self.kind,
            "verified": self.comparison is not None,
            "passed": None if self.comparison is None else not self.misses,
            "misses": self.misses,
            "gate": asdict(self.gate) if self.gate else None,
            "comparison": self.comparison.to_json() if self.comparison else None,
            "answers": self.answers,
            "notes": self.notes,
        }

    def write(self, folder: Path) -> Path:
        """Write report.json into a folder; returns where."""
        self.write_as(path := folder / REPORT)
        return path

    def write_as(self, path: Path) -> None:
        """Write the report under this name."""
        write_json(path, self.to_json())

    def finish(self) -> None:
        """Print it, and where it lies.

        Raises: UserError where the gate was missed and the result was kept.
        """
        self.show()
        say(f"report     {self.path}")
        if self.misses:
            raise self._failure("it was kept, as asked")

    @property
    def path(self) -> Path:
        """Where the report of a result lies: in its folder, or beside its file."""
        return self.result / REPORT if self.result.is_dir() else beside(self.result)

    def show(self, removed: bool = False) -> None:
        """A few lines for the terminal."""
        from vicuna.verify.screen import show

        show(self, removed)


def beside(file: Path) -> Path:
    """Where a file's report lies: report.json, unless that tells of another file."""
    plain = file.parent / REPORT
    try:
        of = json.loads(plain.read_text(encoding="utf-8")).get("result")
    except (OSError, ValueError, AttributeError):
        return plain
    return plain if of == file.name else file.with_name(f"{file.name}.{REPORT}")


def gate_of(kind: str, settings: VerifySettings) -> Gate:
    """The gate of a kind of result, moved by what the user gave."""
    gate = GATES[kind]
    kl, ratio = settings.max_kl, settings.max_perplexity_ratio
    if kl is None and ratio is None:
        return gate
    return Gate(
        kl if kl is not None else max(gate.max_kl, GATES["16bit"].max_kl),
        ratio if ratio is not None else max(gate.max_perplexity_ratio, 1.01),
    )


def misses(found: Comparison, gate: Gate) -> list[str]:
    """Where a comparison misses a gate, in words; empty where it passes."""
    if gate.exact:
        off = found.largest_logit_difference
        return [f"scores differ by up to {off:.3g}, but must be the same"] if off else []
    wrong = []
    if found.mean_kl > gate.max_kl:
        wrong.append(f"mean KL divergence {found.mean_kl:.4g}, at most {gate.max_kl:g} passes")
    if found.perplexity_ratio > gate.max_perplexity_ratio:
        wrong.append(
            f"perplexity {found.perplexity_ratio:.4g} times that before, at most "
            f"{gate.max_perplexity_ratio:g} passes"
        )
    return wrong


# -- sizes ----


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def peak_memory() -> int:
    """The largest resident memory this process had so far, in bytes."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
