"""A file of questions to a JSONL file of answers, one line each, continued where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from vicuna.append_lines import Lines
from vicuna.data.conversation import Problem, Turn
from vicuna.data.templates.renderer import Renderer
from vicuna.errors import UserError
from vicuna.generate.chat import fit
from vicuna.generate.decode import decode
from vicuna.generate.engines.base import Engine
from vicuna.generate.events import Finished, answer_json
from vicuna.generate.prompt_file import Question, questions
from vicuna.generate.settings import Settings
from vicuna.generate.thoughts import split
from vicuna.interrupts import keeps
from vicuna.system_errors import cannot_read, cannot_write
from vicuna.terminal import say

# What an answer adds to its record.
_ADDED = ("output", "finish_reason", "reasoning_content", "outputs", "dropped_turns", "error")


class Tally(NamedTuple):
    """Records answered now, answered before, and not answerable."""

    answered: int
    before: int
    failed: int


def answer_file(
    engine: Engine,
    renderer: Renderer,
    settings: Settings,
    input: Path,
    output: Path,
    system: str = "",
    say: Callable[[str], None] = say,
) -> Tally:
    """Answer every record of `input` into `output`.

    A line is the record as it was given, and `output`, `finish_reason`; an answer that the record
    already had moves to `reference`. Where several answers or log-probabilities are asked for,
    `outputs` holds all answers as `vicuna generate --json` prints them, best first.

    The thought of a reasoning model lies apart from its answer, in `reasoning_content`.

    A record that asks nothing, or that fits no context, gets a line too, with `finish_reason`
    "error" and the reason in `error`. Each line is written when its answer is whole, and whole
    lines are not computed again.

    Args:
        system: system prompt of the records that bring none.
        say: told what is skipped, what is wrong, and each answer.

    Raises: UserError where `output` holds answers to something else.
    """
    problems: list[Problem] = []
    records = questions(input, problems)
    before = _resume(records, input, output)
    if before:
        say(f"{output} already has {before} answers: going on after them")
    answered = failed = 0
    with Lines(output) as lines:
        for question in records:
            added = _answer(engine, renderer, settings, question, system)
            line = {**_without_answer(question.given), **added}
            lines.add(json.dumps(line, ensure_ascii=False, default=str))
            failed += "error" in added
            answered += "error" not in added
            done = before + answered + failed
            keeps(f"{done} answers are kept in {output}; the same command goes on after them")
            say(f"{input}:{question.line}: {added.get('error') or added['finish_reason']}")
    for problem in problems:
        say(f"{input}:{problem.line}: {problem.reason} ({problem.action})")
    return Tally(answered, before, failed)


def _answer(
    engine: Engine, renderer: Renderer, settings: Settings, question: Question, system: str
) -> dict[str, Any]:
    """What is added to a record."""
    if not question.turns:
        return {"output": "", "finish_reason": "error", "error": question.reason}
    turns = question.turns
    if system and turns[0].role != "system":
        turns = [Turn("system", system), *turns]
    try:
        fitted = fit(turns, renderer, engine.context_length, settings.max_new_tokens)
        events = decode(engine, fitted.prompt_ids, settings, renderer)
    except UserError as e:  # this record is too long; the next may not be
        return {"output": "", "finish_reason": "error", "error": e.what}
    *_, last = events
    assert isinstance(last, Finished)
    thought, text = split(last.text, renderer.template.thought_marks())
    added: dict[str, Any] = {"output": text, "finish_reason": last.finish_reason}
    if thought:
        added["reasoning_content"] = thought
    if settings.num_return_sequences > 1 or settings.logprobs:
        added["outputs"] = [answer_json(a) for a in last.answers]
    if fitted.dropped:
        added["dropped_turns"] = len(fitted.dropped)
    return added


def _without_answer(given: dict[str, Any]) -> dict[str, Any]:
    """The record with the answer it had, if any, under another name."""
    kept = {k: v for k, v in given.items() if k not in _ADDED}
    return {**kept, "reference": given["output"]} if given.get("output") else kept


def _resume(records: Iterator[Question], input: Path, output: Path) -> int:
    """Pass the records that `output` has whole lines for and cut off a line written in part.

    Returns: how many were passed.

    Raises: UserError where the lines do not belong to the records, before anything is changed.
    """
    if not output.exists():
        return 0
    try:
        lines, size = _whole_lines(output)
    except OSError as e:
        raise cannot_read(e, output) from e
    passed = 0
    with output.open("rb") as file:
        for question, line in zip(islice(records, lines), file):
            if not _belongs(line, question):
                raise _other(input, output, passed + 1)
            passed += 1
        if passed < lines or not _begins_object(output, size):
            raise _other(input, output, passed + 1)
    try:
        with output.open("rb+") as file:
            file.truncate(size)
    except OSError as e:
        raise cannot_write(e, output) from e
    return passed


def _whole_lines(path: Path) -> tuple[int, int]:
    """Lines that end in a line feed, and their bytes."""
    count = size = 0
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                count, size = count + 1, size + len(line)
    return count, size


def _begins_object(path: Path, size: int) -> bool:
    """Whether what stands behind `size` bytes is nothing or the beginning of a line of ours."""
    with path.open("rb") as file:
        file.seek(size)
        return file.read(1) in (b"", b"{")


def _belongs(line: bytes, question: Question) -> bool:
    """Whether a line of the output is this record's."""
    try:
        found = json.loads(line)
    except ValueError:
        return False
    if not isinstance(found, dict) or "finish_reason" not in found:
        return False
    given = json.loads(json.dumps(_without_answer(question.given), default=str))
    return bool({k: v for k, v in found.items() if k not in _ADDED} == given)


def _other(input: Path, output: Path, line: int) -> UserError:
    return UserError(
        "this file holds something else than answers to {path}, and is left as it is",
        path=input,
        where=f"{output}:{line}",
        fix="Give another --output, or delete the file to answer everything anew.",
    )
