"""`vicuna data convert`: any format to another, with nothing of its meaning lost."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from vicuna import config
from vicuna.config import DataConvertSettings, DatasetEntry
from vicuna.data import duplicates
from vicuna.data.conversation import Conversation, Turn
from vicuna.data.dataset import check_sources
from vicuna.data.records import columns, formats
from vicuna.data.records.find_files import expand_noting
from vicuna.data.records.read_file import read
from vicuna.data.report import DataReport, FileReport
from vicuna.errors import SettingsError, UserError
from vicuna.files import whole_file
from vicuna.terminal import say


def convert(words: Sequence[str]) -> int:
    """Write all usable records of the files in one format."""
    files: list[str] = []
    settings, _ = config.parse(DataConvertSettings, words, free=files)
    if not files:
        raise SettingsError(["which file? Give files, folders, globs or hub ids"])
    if not settings.output:
        raise SettingsError(["output is missing: give the file to write (--output new.jsonl)"])
    output = Path(settings.output)
    if output.exists() and not settings.force:
        raise UserError("the file exists", where=str(output), fix="Add --force to replace it.")
    entries = config.dataset_entries(files)
    check_sources(entries, settings.encoding)
    _refuse_reading(output, entries)
    reports: list[FileReport] = []
    with whole_file(output) as aside:
        with aside.open("w", encoding="utf-8", errors="replace") as out:
            ranks: list[tuple[int, int, float]] = []
            written = 0
            for conversation in _conversations(entries, settings, reports):
                record = as_format(conversation, settings.to)
                out.write(json.dumps(record, ensure_ascii=False) + "\n")
                if conversation.merit is not None:
                    ranks.append(
                        (written, duplicates.prompt_hash(conversation), conversation.merit)
                    )
                written += 1
        worse = _leave_out_worse(aside, ranks)
        if not written:
            raise UserError(
                "no usable records", where=", ".join(files), fix="See vicuna data check."
            )
    dropped = sum(f.dropped for f in reports) + worse
    say(f"{written - worse:,} records written to {output}, {dropped:,} dropped")
    for note in DataReport(reports).notes():
        say(note)
    return 0


def _refuse_reading(output: Path, entries: Sequence[DatasetEntry]) -> None:
    """Raises: UserError where the file to write is one of those to read, by whatever name."""
    if not output.exists():
        return
    for entry in entries:
        for path in expand_noting(entry.path, []):
            if path.exists() and path.samefile(output):
                raise UserError(
                    "this file is among those to read, and would be replaced",
                    where=str(output),
                    fix="Give another name to --output.",
                )


def _conversations(
    entries: Sequence[DatasetEntry], settings: DataConvertSettings, reports: list[FileReport]
) -> Iterator[Conversation]:
    """The usable records of all files; what became of the others goes into `reports`."""
    for entry in entries:
        own = columns.settled(entry.columns)
        notes: list[str] = []
        for path in expand_noting(entry.path, notes):
            report = FileReport(str(path))
            report.source_notes, notes = notes, []
            reports.append(report)
            problems: list[Any] = []
            for raw in read(path, problems, settings.encoding or None):
                parsed = formats.parse(raw, own)
                report.add(parsed)
                if parsed.conversation is not None:
                    yield parsed.conversation
                    if entry.max_samples and report.used >= entry.max_samples:
                        break
            for problem in problems:
                report.file_problem(problem, is_record=problem.action == "dropped")


def _leave_out_worse(path: Path, ranks: list[tuple[int, int, float]]) -> int:
    """Take the records out of a written file that have a better sibling; how many there were."""
    if not ranks:
        return 0
    prompts = np.array([r[1] for r in ranks], np.uint64)
    worse = duplicates.outranked(prompts, np.array([r[2] for r in ranks]))
    lost = {ranks[i][0] for i in np.flatnonzero(worse)}
    if lost:
        better = path.with_name(f"{path.name}2")
        try:
            with path.open(encoding="utf-8") as old, better.open("w", encoding="utf-8") as new:
                new.writelines(line for i, line in enumerate(old) if i not in lost)
            os.replace(better, path)
        finally:
            better.unlink(missing_ok=True)
    return len(lost)


def as_format(conversation: Conversation, to: str) -> dict[str, Any]:
    """A conversation as a record of another format.

    Formats of one turn (alpaca, pair) take a longer conversation's last turn and put what came
    before into `history`, so that nothing is lost. A thought stands beside its answer as
    `reasoning_content`, an answer that is not learned has `weight` 0; `chat`, which has no place
    for either, becomes `messages` then.
    """
    if conversation.kind == "text":
        return {"text": conversation.turns[-1].text}
    turns = conversation.turns
    system = turns[0].text if turns[0].role == "system" else ""
    pairs = [(q, a) for q, a in pairwise(turns) if q.role == "user" and a.role == "assistant"]
    if to == "chat" and any(_beside(a) for _, a in pairs):
        to = "messages"
    record: dict[str, Any] = {"system": system} if system else {}
    if to == "messages":
        messages = [{"role": "system", "content": system}] if system else []
        for q, a in pairs:
            messages.append({"role": "user", "content": _said(q)})
            messages.append({"role": "assistant", "content": a.text, **_beside(a)})
        return {"messages": messages}
    if to == "sharegpt":
        said_by = [{"from": "system", "value": system}] if system else []
        for q, a in pairs:
            said_by.append({"from": "human", "value": _said(q)})
            said_by.append({"from": "gpt", "value": a.text, **_beside(a)})
        return {"conversations": said_by}
    if to == "chat":
        questions, answers = [_said(q) for q, _ in pairs], [a.text for _, a in pairs]
        return {**record, "input": questions, "output": answers}
    history = [{"input": _said(q), "output": a.text, **_beside(a)} for q, a in pairs[:-1]]
    question, answer = pairs[-1]
    if _beside(answer).get("weight") == 0:  # beside a record it would drop all of it
        history.append({"input": _said(question), "output": answer.text, **_beside(answer)})
        return {**record, "history": history}
    if to == "history" or history:
        fields = {"history": history, "input": _said(question), "output": answer.text}
        return {**record, **fields, **_beside(answer)}
    if to == "alpaca":
        fields = {"instruction": question.text, "input": question.input, "output": answer.text}
        return {**record, **fields, **_beside(answer)}
    return {**record, "prompt": _said(question), "response": answer.text, **_beside(answer)}


def _said(q: Turn) -> str:
    return f"{q.text}\n{q.input}" if q.input and q.text else q.text or q.input


def _beside(answer: Turn) -> dict[str, Any]:
    """What stands beside an answer: its thought, and that it is not learned."""
    found: dict[str, Any] = {"reasoning_content": answer.thought} if answer.thought else {}
    return found if answer.in_loss else {**found, "weight": 0}
