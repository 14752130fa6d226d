"""Files to examples: read, parse, check, render, encode; once a file, template and tokenizer.

Large files are parsed and encoded by worker processes that import nothing heavy; what comes back
is appended to a store in the cache, so memory stays flat at any size. The cache's key is the
content of the file and everything that decides the result.
"""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from vicuna.data import duplicates
from vicuna.data.conversation import Conversation, Problem, Raw, Turn
from vicuna.data.example_store import Store, StoreWriter, index_rows
from vicuna.data.loss_mask import Example, TrainTurns, windows
from vicuna.data.records import formats, text_warnings
from vicuna.data.records.columns import Columns
from vicuna.data.records.read_file import read
from vicuna.data.report import FileReport
from vicuna.data.templates.registry import template_from_dict
from vicuna.data.templates.renderer import Renderer
from vicuna.data.tokenizer import Piece, Tokenizer, TokenizerData
from vicuna.files import cache_dir, file_hash, whole_folder
from vicuna.interrupts import children_spared
from vicuna.messages import Message

# Counts up when anything here changes what a record becomes.
FORMAT = 12
CHUNK = 512
# Below this, starting worker processes costs more than it saves.
SMALL = 8 << 20
MAX_WORKERS = 8


@dataclass(frozen=True)
class PreparationSpec:
    """All that decides what a record becomes; plain data that travels to worker processes."""

    vocabulary: TokenizerData
    template: dict[str, Any]
    train_turns: TrainTurns = "all"
    split_at: int = 0  # split conversations longer than this many tokens; 0 never
    max_samples: int = 0
    encoding: str = ""
    columns: Columns = ()  # the file's own names for ours

    def key(self, content: str) -> str:
        """The name of the result for a file of this content."""
        parts = [
            FORMAT,
            content,
            self.vocabulary.digest(),
            self.template,
            self.train_turns,
            self.split_at,
            self.max_samples,
            self.encoding,
            self.columns,
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@dataclass
class Batch:
    """What a chunk of records became."""

    ids: np.ndarray
    labels: np.ndarray
    index: np.ndarray
    lines: np.ndarray
    exact: np.ndarray
    near: np.ndarray
    ranked: np.ndarray  # RANKED, of records with a score or rank
    report: FileReport


# A record of the batch, the hash of what it answers, and how good its answer is said to be.
RANKED = np.dtype([("record", np.int64), ("prompt", np.uint64), ("merit", np.float64)])

# Told how many records are done, and which share of the file they take; 0 if nobody knows.
Progress = Callable[[int, float], None]


def prepare_file(path: Path, spec: PreparationSpec, progress: Progress | None = None) -> Store:
    """The store of one file, from the cache where it was made before.

    Args:
        progress: told how far it is, now and then.

    Raises: UserError where the disk is full.
    """
    target = cache_dir("data", spec.key(file_hash(path)))
    if not (target / "report.json").is_file():
        with whole_folder(target) as aside:
            _make(path, spec, aside, progress or (lambda _records, _share: None))
    return Store(target)


def _make(path: Path, spec: PreparationSpec, folder: Path, progress: Progress) -> None:
    report = FileReport(str(path))
    writer = StoreWriter(folder)
    exact: list[np.ndarray] = []
    near: list[np.ndarray] = []
    ranked: list[np.ndarray] = []
    found: list[Problem] = []
    done = records = 0
    position = [0]
    size = max(path.stat().st_size, 1)
    records_of_file = read(
        path, found, spec.encoding or None, lambda at: position.__setitem__(0, at)
    )
    for batch, share in _work_through(path, records_of_file, spec, lambda: position[0] / size):
        writer.add(batch.ids, batch.labels, batch.index, batch.lines)
        exact.append(batch.exact)
        near.append(batch.near)
        batch.ranked["record"] += records
        ranked.append(batch.ranked)
        records += len(batch.lines)
        report.merge(batch.report)
        done += batch.report.records
        progress(done, share)
    for problem in found:
        report.file_problem(problem, is_record=problem.action == "dropped")
    writer.finish(
        np.concatenate(exact) if exact else np.zeros(0, np.uint64),
        np.concatenate(near) if near else np.zeros((0, duplicates.SIGNATURE), np.uint32),
        {**report.to_json(), "outranked": _outranked(ranked)},
    )


def _outranked(ranked: list[np.ndarray]) -> list[int]:
    """The records with a better answer to the same question in the file."""
    rows = np.concatenate(ranked) if ranked else np.zeros(0, RANKED)
    if not len(rows):
        return []
    worse = duplicates.outranked(rows["prompt"], rows["merit"])
    found: list[int] = rows["record"][worse].tolist()
    return found


def _work_through(
    path: Path, records: Iterator[Raw], spec: PreparationSpec, share: Callable[[], float]
) -> Iterator[tuple[Batch, float]]:
    """Batches in the order of the file, made here or by worker processes.

    Args:
        share: of the file that is read by now.

    Yields: a batch, and the share of the file that had been read when its records were.
    """
    if spec.max_samples:
        yield from _limited(path, records, spec)
        return
    workers = min(_cores(), MAX_WORKERS)
    if path.stat().st_size < SMALL or workers < 2:
        state = Work(spec)
        while chunk := list(islice(records, CHUNK)):
            yield state.batch(str(path), chunk), share()
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start, (spec,)) as pool, _ending(pool):
        # A bounded window: the reader must not run ahead and fill the memory.
        waiting: deque[tuple[Future[Batch], float]] = deque()
        while chunk := list(islice(records, CHUNK)):
            with children_spared():
                # Lines and values apart travel faster than as many records.
                lines, values = zip(*chunk)
                waiting.append((pool.submit(_batch, str(path), lines, values), share()))
            if len(waiting) > 2 * workers:
                batch, read_by_then = waiting.popleft()
                yield batch.result(), read_by_then
        while waiting:
            batch, read_by_then = waiting.popleft()
            yield batch.result(), read_by_then


@contextmanager
def _ending(pool: ProcessPoolExecutor) -> Iterator[None]:
    """Whoever leaves early does not wait for chunks that nobody began."""
    try:
        yield
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _limited(
    path: Path, records: Iterator[Raw], spec: PreparationSpec
) -> Iterator[tuple[Batch, float]]:
    """Batches until `max_samples` records are used; never reads further than needed."""
    state = Work(spec)
    missing = spec.max_samples
    while missing and (chunk := list(islice(records, min(CHUNK, missing)))):
        batch = state.batch(str(path), chunk)
        missing -= batch.report.used
        yield batch, 1 - missing / spec.max_samples


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_state: Work | None = None


def _start(spec: PreparationSpec) -> None:
    global _state
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _state = Work(spec)


def _batch(path: str, lines: Sequence[int], values: Sequence[str | dict[str, Any]]) -> Batch:
    assert _state is not None
    return _state.batch(path, list(map(Raw, lines, values)))


@contextmanager
def _garbage_later() -> Iterator[None]:
    """No search for cycles of garbage inside: a chunk makes many objects, and no cycles."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class Work:
    """Turns chunks of raw records into batches; one in each worker process."""

    def __init__(self, spec: PreparationSpec) -> None:
        self.spec = spec
        self.renderer = Renderer(template_from_dict(spec.template), Tokenizer(spec.vocabulary))

    def batch(self, path: str, chunk: Sequence[Raw]) -> Batch:
        """Parse, check, render and encode a chunk."""
        with _garbage_later():
            return self._batch(path, chunk)

    def _batch(self, path: str, chunk: Sequence[Raw]) -> Batch:
        report = FileReport(path)
        conversations: list[Conversation] = []
        for raw in chunk:
            parsed = formats.parse(raw, self.spec.columns)
            if parsed.conversation is not None:
                parsed.problems += text_warnings.warnings(parsed.conversation)
                conversations.append(parsed.conversation)
            report.add(parsed)
        examples, owners = self._encode(conversations, report)
        lines = [c.line for c in conversations]
        questions = [duplicates.question_hash(c) for c in conversations]
        exact, near = duplicates.fingerprints(conversations)
        return Batch(
            np.concatenate([e.ids for e in examples]) if examples else np.zeros(0, np.int32),
            np.concatenate([e.labels for e in examples]) if examples else np.zeros(0, np.uint8),
            index_rows(examples, owners, lines, questions),
            np.array(lines, np.int32),
            exact,
            near,
            _ranked(conversations),
            report,
        )

    def _encode(
        self, conversations: Sequence[Conversation], report: FileReport
    ) -> tuple[list[Example], list[int]]:
        """Examples, and which conversation each comes from."""
        template, end = self.renderer.template, self.renderer.end_id
        rendered: list[list[Piece]] = []
        owners: list[int] = []
        for n, conversation in enumerate(conversations):
            before = len(rendered)
            for pieces in template.examples(conversation, self.spec.train_turns):
                rendered.append(pieces)
                owners.append(n)
            if len(rendered) == before:  # its last answer is not to be learned
                report.drop_used(conversation.line, "", Message("nothing to learn"))
            if template.oddity:
                report.warn(conversation.line, "", template.oddity)
        encoded = self.renderer.tokenizer.encode_many(rendered, end)
        examples: list[Example] = []
        records: list[int] = []
        split: set[int] = set()
        for n, example in zip(owners, encoded):
            conversation = conversations[n]
            limit = self.spec.split_at
            parts = [example]
            if limit and len(example.ids) > limit:
                if n in split:
                    continue
                split.add(n)
                parts = self._split(conversation, example, limit, report)
            examples += parts
            records += [n] * len(parts)
        return examples, records

    def _split(
        self, conversation: Conversation, example: Example, limit: int, report: FileReport
    ) -> list[Example]:
        """An overlong conversation as several, cut between turns; a text in windows."""
        if conversation.kind == "text":
            parts = windows(example, limit)
            report.warn(
                conversation.line, "", Message("split into {count} examples", count=len(parts))
            )
            return parts
        parts = []
        lost = 0
        for turns in self._spans(conversation, limit):
            fitting = self._render(turns, conversation)
            if all(len(e.ids) <= limit for e in fitting):
                parts += fitting
            else:
                lost += 1
        if parts:
            report.warn(
                conversation.line, "", Message("split into {count} examples", count=len(parts))
            )
        if lost and parts:
            report.warn(
                conversation.line,
                "",
                Message("turn longer than cutoff_len left out: {lost}", lost=lost),
            )
        if not parts:
            report.drop_used(
                conversation.line,
                "",
                Message(
                    "too long: {count} tokens in one turn, cutoff_len is {limit}",
                    count=len(example.ids),
                    limit=limit,
                ),
            )
        return parts

    def _spans(self, conversation: Conversation, limit: int) -> Iterator[list[Turn]]:
        """Runs of question-and-answer pairs, each as long as fits."""
        turns = conversation.turns
        head = turns[:1] if turns[0].role == "system" else []
        body = turns[len(head) :]
        pairs = [body[i : i + 2] for i in range(0, len(body), 2)]
        run: list[Turn] = []
        for pair in pairs:
            longer = head + run + pair
            if run and any(len(e.ids) > limit for e in self._render(longer, conversation)):
                yield head + run
                run = []
            run = run + pair
        if run:
            yield head + run

    def _render(self, turns: list[Turn], conversation: Conversation) -> list[Example]:
        part = Conversation(turns, conversation.line)
        pieces = self.renderer.template.examples(part, self.spec.train_turns)
        return self.renderer.tokenizer.encode_many(pieces, self.renderer.end_id)


def _ranked(conversations: Sequence[Conversation]) -> np.ndarray:
    rows = [
        (n, duplicates.prompt_hash(c), c.merit)
        for n, c in enumerate(conversations)
        if c.merit is not None
    ]
    return np.array(rows, RANKED)


_WIDTH = 12  # characters of the bar


class ReadingProgress:
    """Says how far one file is.

    say: given a line at each call. clock: seconds, from any beginning.
    """

    def __init__(
        self, name: str, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._name, self._say, self._clock = name, say, clock
        self._began = clock()

    def __call__(self, records: int, share: float) -> None:
        """Say a line: `my.jsonl ━━━━━━────── 48%  336,000 records, 3,100/s, 2 min left`.

        Args:
            records: done so far.
            share: of the file that they take, from 0 to 1; 0 if nobody knows.
        """
        seconds = max(self._clock() - self._began, 1e-9)
        text = f"{records:,} records, {records / seconds:,.0f}/s"
        if not 0 < share <= 1:
            self._say(f"{self._name}: {text}")
            return
        done = round(share * _WIDTH)
        bar = "━" * done + "─" * (_WIDTH - done)
        left = _left(seconds / share - seconds)
        self._say(f"{self._name} {bar} {share:4.0%}  {text}, {left} left")


def _left(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
