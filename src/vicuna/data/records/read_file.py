"""The records of one file, streamed: bytes -> text -> `Raw`, whatever the file is called.

The content decides the format: JSONL, one JSON array, JSON objects one after another, an object
that holds them (`json_layouts.py`), CSV with any delimiter (`tables.py`), Parquet, Arrow, plain
text; those of text also compressed and in any usual encoding. Anything else is named for what it is
(`file_types.py`). No file is ever loaded whole; what cannot be used becomes a `Problem`, and the
rest is still read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Literal

from vicuna.data.conversation import Problem, Raw
from vicuna.data.records import file_types
from vicuna.data.records.encodings import MARK
from vicuna.data.records.find_files import digest, expand
from vicuna.data.records.json_layouts import open_shape
from vicuna.data.records.json_stream import DECODER, json_values, unfinished
from vicuna.data.records.parse_values import printed
from vicuna.data.records.tables import arrow, delimiter_of, parquet, rows
from vicuna.data.records.text_stream import BLANK, CUT, Position, Text, head, lines, unwatched
from vicuna.messages import Message

__all__ = ["digest", "expand", "read"]

HEAD = 1 << 20  # characters that the layout is decided on
PARAGRAPH = 1 << 20  # characters of one paragraph of plain text

_JSON = (".json", ".jsonl", ".ndjson")
_OPEN = re.compile(rf"[{BLANK}\[]*")

Layout = Literal["lines", "values", "table", "text"]


def read(
    path: Path,
    problems: list[Problem],
    encoding: str | None = None,
    position: Position = unwatched,
) -> Iterator[Raw]:
    """Stream the records of a file.

    Args:
        path: a file of any format and ending.
        problems: what was dropped or repaired is appended here while the file is read.
        position: told how many bytes of the file have been read.
        encoding: a name Python knows; None detects it.

    Yields: JSON text with the line it starts on, not parsed (lines of a JSONL file are not even
        checked); a dict for CSV (physical line), Parquet (row from 1), and plain text, whose
        paragraphs become {"text": ...}.

    Raises: UserError where the file cannot be opened or the encoding is unknown. Content raises
        nothing.
    """
    text = Text(path, encoding, problems, position)
    kind = file_types.kind_of(head(path, file_types.HEAD), path)
    if kind == "parquet":
        yield from parquet(path, problems, position)
        return
    if kind == "arrow":
        yield from arrow(path, problems, position)
        return
    if kind != "text" and not (kind == file_types.BINARY and encoding):
        problems.append(Problem(1, "", kind, "dropped"))
        return
    known = len(problems)
    line = 0
    for raw in _records(path, text, problems):
        line = raw.line
        yield raw
    if text.fault and all(p.reason != CUT for p in problems[known:]):
        problems.append(Problem(line + 1, "", text.fault, "dropped"))


def _records(path: Path, text: Text, problems: list[Problem]) -> Iterator[Raw]:
    """The records of a text file of any layout."""
    blocks = iter(text)
    first, size = [], 0
    for block in blocks:
        first.append(block)
        if (size := size + len(block)) >= HEAD:
            break
    start = "".join(first)
    name = _bare_name(path)
    reason = file_types.text_kind(start, name)
    if reason and (not name.endswith(".txt") or reason == file_types.LFS):
        problems.append(Problem(1, "", reason, "dropped"))
        return iter(())
    layout = _layout(name, start)
    texts = chain([start], blocks)
    if layout == "lines":
        return _json_lines(texts, text, problems)
    if layout == "values":
        return json_values(texts, text, problems, open_shape)
    if layout == "text":
        return _paragraphs(texts, text, problems)
    return rows(texts, text, problems, delimiter_of(start, name))


def _bare_name(path: Path) -> str:
    """The name of a file in lower case, without the endings of compression."""
    name = path.name.lower()
    for ending in (".gz", ".bz2", ".xz", ".zst"):
        name = name.removesuffix(ending)
    return name


def _layout(name: str, head: str) -> Layout:
    """How the records lie in a text, from its beginning and, where that is not JSON, its name."""
    if not _starts_with_object(head):
        if name.endswith((".csv", ".tsv", ".tab", ".psv", ".xls", ".xlsx")):
            return "table"
        if name.endswith(".txt"):
            return "text"
    head = head.lstrip(BLANK)
    first, _, after = head.partition("\n")
    following = after.lstrip(BLANK)[:1]
    if head[:1] not in ("{", "["):
        return "table" if not name.endswith(_JSON) and delimiter_of(head, "") else "lines"
    try:
        _, end = DECODER.raw_decode(first)
    except (ValueError, RecursionError):
        if head[0] == "{" and not following and printed(first.strip()):
            return "lines"
        return "lines" if head[0] == following == "{" else "values"
    if first[end:].strip(BLANK):  # `{..}{..}` or `{..},`: not JSONL, but a row of values
        return "values"
    if not following:  # one value: a record, or what holds them all
        return "values"
    return "lines" if head[0] == "{" or following == "[" else "values"


def _starts_with_object(head: str) -> bool:
    """Whether a whole JSON object stands first, behind any opening brackets."""
    match = _OPEN.match(head)
    at = match.end() if match else 0
    try:
        return head[at : at + 1] == "{" and bool(DECODER.raw_decode(head, at)[0])
    except (ValueError, RecursionError):
        return False


def _json_lines(texts: Iterable[str], text: Text, problems: list[Problem]) -> Iterator[Raw]:
    """Every line that is not blank. Only a last line without line feed is looked into."""
    for number, line in enumerate(lines(texts), 1):
        record = line.strip(BLANK)
        if not record:
            continue
        if line[-1] != "\n" and _cut_off(record):
            problems.append(Problem(number, "", CUT, "dropped"))
        elif MARK in record:
            text.drop(number)
        else:
            yield Raw(number, record)


def _cut_off(record: str) -> bool:
    try:
        DECODER.raw_decode(record)
    except json.JSONDecodeError as e:
        return unfinished(e)
    except RecursionError:
        return False
    return record.endswith(MARK)


# Plain text


def _paragraphs(texts: Iterable[str], text: Text, problems: list[Problem]) -> Iterator[Raw]:
    """Runs of lines between blank ones, as {"text": ...}."""
    begin, size, split = 1, 0, False
    held: list[str] = []
    for number, line in enumerate(chain(lines(texts), [""]), 1):
        blank = not line.strip()
        if held and (blank or size >= PARAGRAPH):
            paragraph = "\n".join(held)
            if MARK in paragraph:
                text.drop(begin)
            else:
                yield Raw(begin, {"text": paragraph})
            if not blank and not split:
                reason = Message(
                    "no blank line in {reason:,} characters, split at a line's end",
                    reason=PARAGRAPH,
                )
                problems.append(Problem(number, "", reason, "warned"))
                split = True
            held = []
        if not blank:
            if not held:
                begin, size = number, 0
            held.append(line.rstrip("\r\n"))
            size += len(line)
