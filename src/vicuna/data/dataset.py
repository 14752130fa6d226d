"""All sources of a run together: which examples there are, which are held out, what was lost.

Nothing here loads a model. The report is complete before training starts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from vicuna.config import DatasetEntry, DataSettings
from vicuna.data import duplicates
from vicuna.data.example_store import Store
from vicuna.data.loss_mask import Example
from vicuna.data.prepare import PreparationSpec, ReadingProgress, prepare_file
from vicuna.data.records import columns, encodings
from vicuna.data.records.find_files import expand_noting
from vicuna.data.records.read_file import read
from vicuna.data.report import DataReport, FileReport
from vicuna.data.sampler import Sampler, WeightedIndices, split_validation
from vicuna.data.templates.renderer import Renderer
from vicuna.errors import UserError
from vicuna.messages import Message

Overlong = Literal["drop", "split", "cut"]
Say = Callable[[str], None]


@dataclass
class PreparedFile:
    """One file's store, which of its examples are usable, and the entry it came from."""

    path: Path
    store: Store
    keep: np.ndarray  # int64, indices into the store
    entry: int
    report: FileReport


@dataclass
class Dataset:
    """Examples of several sources under one numbering: source by source, in the file's order."""

    files: list[PreparedFile]
    cutoff: int
    _starts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        sizes = [len(s.keep) for s in self.files]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, i: int) -> Example:
        s = int(np.searchsorted(self._starts, i, side="right")) - 1
        source = self.files[s]
        return source.store.example(int(source.keep[i - self._starts[s]]), self.cutoff)

    def column(self, name: str) -> np.ndarray:
        """A column of the stores' indices for all usable examples."""
        parts = [s.store.index[name][s.keep] for s in self.files]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def lengths(self) -> Lengths:
        """How long all usable examples are."""
        return Lengths(self.column("length"), self.column("first_target"))

    def digest(self) -> str:
        """A hash of exactly which examples these are, in order: of their tokens and labels."""
        digest = hashlib.sha256(f"{self.cutoff};".encode())
        for source in self.files:
            digest.update(source.store.digest().encode())
            digest.update(source.keep.tobytes())
        return digest.hexdigest()[:32]

    def groups(self, entries: Sequence[DatasetEntry], chosen: np.ndarray) -> list[WeightedIndices]:
        """The chosen examples by data set, with its weight."""
        owner = np.repeat(
            np.array([s.entry for s in self.files], np.int64), [len(s.keep) for s in self.files]
        )
        groups = []
        for n, entry in enumerate(entries):
            mine = chosen[owner[chosen] == n]
            if len(mine):
                groups.append(WeightedIndices(mine, entry.weight))
        return groups


def preparation_spec(
    settings: DataSettings,
    renderer: Renderer,
    max_samples: int = 0,
    own_columns: columns.Columns = (),
) -> PreparationSpec:
    """What decides how records become examples under these settings."""
    return PreparationSpec(
        vocabulary=renderer.tokenizer.data,
        template=renderer.template.to_dict(),
        train_turns=settings.train_turns,
        split_at=settings.cutoff_len if settings.overlong == "split" else 0,
        max_samples=max_samples or settings.max_samples,
        encoding=settings.encoding,
        columns=own_columns,
    )


def check_sources(entries: Sequence[DatasetEntry], encoding: str) -> None:
    """Look whether all sources are there and have the columns that were named for them.

    Raises: UserError.
    """
    if encoding:
        encodings.check(encoding, "encoding")
    for entry in entries:
        named = columns.settled(entry.columns)
        for path in expand_noting(entry.path, []):
            if named:
                seen = columns.keys_of(read(path, [], encoding or None))
                columns.check(path, named, seen)


def load(
    entries: Sequence[DatasetEntry],
    settings: DataSettings,
    renderer: Renderer,
    say: Say = lambda _: None,
) -> tuple[Dataset, DataReport]:
    """Prepare all sources; the examples and what happened to every record.

    Args:
        say: told what is being worked on.

    Raises: UserError where a source does not exist or, with `strict`, a record is bad.
    """
    check_sources(entries, settings.encoding)
    files: list[PreparedFile] = []
    for n, entry in enumerate(entries):
        notes: list[str] = []
        own = columns.settled(entry.columns)
        for path in expand_noting(entry.path, notes):
            spec = preparation_spec(settings, renderer, entry.max_samples, own)
            store = prepare_file(path, spec, ReadingProgress(path.name, say))
            report = FileReport.from_json({**store.report, "path": str(path)})
            report.source_notes, notes = [*report.source_notes, *notes], []
            keep = _usable(store, settings.cutoff_len, settings.overlong, report)
            _warn_duplicates(store, report)
            if settings.strict:
                _refuse_dropped(path, report)
            files.append(PreparedFile(path, store, keep, n, report))
    return Dataset(files, settings.cutoff_len), DataReport([f.report for f in files])


def _usable(store: Store, cutoff: int, overlong: Overlong, report: FileReport) -> np.ndarray:
    """Indices of examples that can be learned from; the others are dropped in the report."""
    index = store.index
    good = index["targets"] > 0
    long = index["length"] > cutoff
    lost = long & (index["first_target"] >= cutoff)
    if overlong == "drop":
        good &= ~long
    elif overlong == "cut":
        good &= ~lost
    outranked = set(store.report.get("outranked", ()))
    if outranked:
        good &= ~np.isin(index["record"], list(outranked))
    used = set(index["record"][good].tolist())
    seen: set[int] = set()
    for i in np.flatnonzero(~good | long):
        record, line, n = (int(index[c][i]) for c in ("record", "line", "length"))
        if record in seen:
            continue
        seen.add(record)
        if record in outranked:
            report.drop_used(line, "", Message("there is a better answer to the same question"))
        elif good[i]:
            report.warn(
                line,
                "",
                Message(
                    "cut to cutoff_len: {count} tokens, cutoff_len is {cutoff}",
                    count=n,
                    cutoff=cutoff,
                ),
            )
        elif record in used:
            report.warn(
                line,
                "",
                Message(
                    "a turn is too long: {count} tokens, cutoff_len is {cutoff}",
                    count=n,
                    cutoff=cutoff,
                ),
            )
        elif index["targets"][i] == 0:
            report.drop_used(line, "", Message("nothing to learn"))
        else:
            answer = "; no token of the answer would be left after cutting" if lost[i] else ""
            report.drop_used(
                line,
                "",
                Message(
                    "too long: {count} tokens, cutoff_len is {cutoff}{answer}",
                    count=n,
                    cutoff=cutoff,
                    answer=answer,
                ),
            )
    return np.flatnonzero(good)


def _refuse_dropped(path: Path, report: FileReport) -> None:
    """What `strict` asks for: stop at the first record that cannot be used."""
    dropped = [p for p in report.problems if p.action == "dropped"]
    if dropped:
        first = min(dropped, key=lambda p: p.line)
        field = f" (field {first.field})" if first.field else ""
        raise UserError(
            "{reason}{field}",
            reason=first.reason,
            field=field,
            where=f"{path}:{first.line}",
            fix="Mend the record, or leave out --strict to go on without it.",
        )


def _warn_duplicates(store: Store, report: FileReport) -> None:
    """Duplicates within one file; what repeats between files is often meant."""
    exact, near = duplicates.find_duplicates(store.exact, store.near)
    for found, reason in ((exact, Message("exact duplicate")), (near, Message("near duplicate"))):
        for i in np.flatnonzero(found >= 0):
            report.warn(
                int(store.lines[i]),
                "",
                Message("{reason}: of line {line}", reason=reason, line=store.lines[found[i]]),
            )


def cutoff_words(lengths: Lengths, cutoff: int) -> str:
    """What a cutoff costs, in words: `cutoff_len 256: 39 % of records are longer ...`."""
    if not len(lengths):
        return ""
    lost = lengths.lost(cutoff)
    text = f"cutoff_len {cutoff:,}: {lost.longer:.0%} of examples are longer"
    if not lost.longer:
        return text
    text += f", {lost.answer_lost:.0%} would lose the whole answer"
    kept = {c: 1 - lengths.lost(c).longer for c in CUTOFFS if c > cutoff}
    enough = [c for c in kept if kept[c] >= 0.95]
    if enough:
        text += f"; {enough[0]:,} keeps {kept[enough[0]]:.0%}"
    return text


_DROPPED = Message(
    "The table above says why each record was dropped; vicuna data check lists them."
)


@dataclass
class Split:
    """What a run learns from and what it is tested on."""

    dataset: Dataset
    sampler: Sampler
    validation: list[Example]
    train_examples: int
    digest: str
    report: DataReport
    notes: list[str]
    held_out: Dataset | None = None  # a data set of its own that is not trained on


def split(
    dataset: Dataset,
    report: DataReport,
    entries: Sequence[DatasetEntry],
    val_size: float,
    batch_size: int,
    seed: int,
    held_out: Dataset | None = None,
) -> Split:
    """Hold out `val_size` examples (or take `held_out`) and put the others in order.

    Raises: UserError when nothing is left to train on, or nothing is held out in `held_out`.
    """
    if not len(dataset):
        raise UserError(
            "no usable records: nothing to train on",
            where=", ".join(str(s.path) for s in dataset.files) or "dataset",
            fix=_DROPPED,
        )
    training = np.arange(len(dataset))
    validation: list[Example] = []
    if held_out is not None:
        if not len(held_out):
            raise UserError(
                "no usable records in val_dataset: nothing to evaluate on",
                where=", ".join(str(s.path) for s in held_out.files) or "val_dataset",
                fix=_DROPPED,
            )
        validation = [held_out[i] for i in range(len(held_out))]
    elif val_size:
        training, chosen = split_validation(dataset.column("question"), val_size, seed)
        validation = [dataset[int(i)] for i in chosen]
        if not len(training):
            raise UserError(
                "val_size {val_size:g} leaves nothing of {count} examples to train on",
                val_size=val_size,
                count=len(dataset),
                where="val_size",
                fix="Hold out fewer.",
            )
    sampler = Sampler(dataset.groups(entries, training), batch_size, seed)
    digest = hashlib.sha256(dataset.digest().encode())
    for group in sampler.groups:
        digest.update(group.indices.tobytes() + f";{group.weight};".encode())
    digest.update(held_out.digest().encode() if held_out is not None else b"")
    index = [s.store.index for s in dataset.files]
    lengths = Lengths(
        np.concatenate([i["length"] for i in index]),
        np.concatenate([i["first_target"] for i in index]),
    )
    words = cutoff_words(lengths, dataset.cutoff)
    return Split(
        dataset, sampler, validation, len(training), digest.hexdigest()[:32], report, [words],
        held_out,
    )  # fmt: skip


def describe(split: Split) -> dict[str, Any]:
    """data.json: the report, and how much there is to learn."""
    return {
        **split.report.to_json(),
        "examples": split.train_examples,
        "validation_examples": len(split.validation),
        "supervised_tokens": int(split.dataset.column("targets").sum()),
        "tokens": int(split.dataset.column("length").sum()),
        "notes": split.notes,
        "digest": split.digest,
    }


CUTOFFS = (256, 512, 1024, 2048, 4096)


class Lost(NamedTuple):
    """What a cutoff loses: shares of examples, and tokens.

    longer: examples beyond the cutoff. answer_lost: of whose answer nothing is left where they are
    cut. tokens_dropped: left out with `overlong: drop`. tokens_cut: with `overlong: cut`.
    """

    longer: float
    answer_lost: float
    tokens_dropped: int
    tokens_cut: int


@dataclass(frozen=True)
class Lengths:
    """Of each example: its tokens, and where the first that is learned stands."""

    tokens: np.ndarray
    first_target: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def lost(self, cutoff: int) -> Lost:
        """What a cutoff loses of these examples."""
        if not len(self):
            return Lost(0.0, 0.0, 0, 0)
        beyond = self.tokens > cutoff
        long = self.tokens[beyond].astype(np.int64)
        return Lost(
            float(beyond.mean()),
            float((self.first_target >= cutoff).mean()),
            int(long.sum()),
            int((long - cutoff).sum()),
        )

    def quantile(self, percent: float) -> int:
        return int(np.percentile(self.tokens, percent)) if len(self) else 0

    @property
    def longest(self) -> int:
        return int(self.tokens.max()) if len(self) else 0

    def histogram(self, limit: int, bars: int) -> list[int]:
        """Examples in bars of equal width from 0 to `limit`; the last holds all longer ones too."""
        width = limit / bars
        places = np.minimum((np.maximum(self.tokens - 1, 0) / width).astype(np.int64), bars - 1)
        counted: list[int] = np.bincount(places, minlength=bars).tolist()
        return counted
