"""The records of one file, streamed: bytes -> text -> `Raw`, whatever the file is called.

The content decides the format: JSONL, one JSON array, JSON objects one after another, CSV or TSV,
Parquet, plain text, each also gzipped and in any usual encoding of Chinese. No file is ever loaded
whole; what cannot be used becomes a `Problem`, and the rest of the file is still read.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from vicuna.data.json_values import DECODER, LIMIT, json_values, unfinished
from vicuna.data.sources import digest, expand
from vicuna.data.text import BLANK, CUT, MARK, Text, lines, magic
from vicuna.data.types import Problem, Raw

__all__ = ["digest", "expand", "read"]

HEAD = 1 << 20  # characters that the layout is decided on
PARAGRAPH = 1 << 20  # characters of one paragraph of plain text

_OPEN = re.compile(rf"[{BLANK}\[]*")

Layout = Literal["lines", "values", "csv", "tsv", "text"]


def read(path: Path, problems: list[Problem], encoding: str | None = None) -> Iterator[Raw]:
    """Stream the records of a file.

    Args:
        path: a file of any format and ending.
        problems: what was dropped or repaired is appended here while the file is read.
        encoding: a name Python knows; None detects it.

    Yields: JSON text with the line it starts on, not parsed (lines of a JSONL file are not even
        checked); a dict for CSV (physical line), Parquet (row from 1), and plain text, whose
        paragraphs become {"text": ...}.

    Raises: UserError where the file cannot be opened or the encoding is unknown. Content raises
        nothing.
    """
    if magic(path) == b"PAR1":
        yield from _parquet(path, problems)
        return
    known = len(problems)
    text = Text(path, encoding, problems)
    line = 0
    for raw in _records(path, text, problems):
        line = raw.line
        yield raw
    if text.fault and all(p.reason != CUT for p in problems[known:]):
        problems.append(Problem(line + 1, "", text.fault, "dropped"))


def _records(path: Path, text: Text, problems: list[Problem]) -> Iterator[Raw]:
    """The records of a text file of any layout."""
    blocks = iter(text)
    head, size = [], 0
    for block in blocks:
        head.append(block)
        if (size := size + len(block)) >= HEAD:
            break
    start = "".join(head)
    layout = _layout(path.name.lower().removesuffix(".gz"), start)
    texts = chain([start], blocks)
    if layout == "lines":
        return _json_lines(texts, text, problems)
    if layout == "values":
        return json_values(texts, text, problems)
    if layout == "text":
        return _paragraphs(texts, text, problems)
    return _table(texts, text, problems, "," if layout == "csv" else "\t")


def _layout(name: str, head: str) -> Layout:
    """How the records lie in a text, from its beginning and, where that is not JSON, its name."""
    for ending, layout in ((".csv", "csv"), (".tsv", "tsv"), (".txt", "text")):
        if name.endswith(ending) and not _starts_with_object(head):
            return layout  # type: ignore[return-value]
    head = head.lstrip(BLANK)
    first, _, after = head.partition("\n")
    following = after.lstrip(BLANK)[:1]
    if head[:1] not in ("{", "["):
        return "lines"
    try:
        _, end = DECODER.raw_decode(first)
    except (ValueError, RecursionError):
        return "lines" if head[0] == following == "{" else "values"
    if first[end:].strip(BLANK):  # `{..}{..}` or `{..},`: not JSONL, but a row of values
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


# Tables and plain text


def _table(
    texts: Iterable[str], text: Text, problems: list[Problem], delimiter: str
) -> Iterator[Raw]:
    """The rows of a CSV file under the names of its first row."""
    csv.field_size_limit(LIMIT)  # the default of 128 KiB is less than one long conversation
    ended: list[bool] = []
    # The reader asks for a line behind the last one only where a quote is still open.
    rows = csv.reader(chain(lines(texts), _noting(ended)), delimiter=delimiter)
    header: list[str] | None = None
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as e:
            problems.append(Problem(line, "", f"not valid CSV: {e}", "dropped"))
            continue
        if row is None:
            return
        if not any(row):
            continue
        if ended:
            reason = "a quote opens here and is not closed, the rest of the file is lost"
            problems.append(Problem(line, "", reason, "dropped"))
        elif MARK in "".join(row):
            text.drop(line)
        elif header is None:
            header = [name.strip() for name in row]
        elif any(row[len(header) :]):
            reason = f"more fields than the {len(header)} of the header"
            problems.append(Problem(line, "", reason, "dropped"))
        else:
            yield Raw(line, {k: v for k, v in zip(header, row) if k})


def _noting(asked: list[bool]) -> Iterator[str]:
    """No lines, and a note that one was asked for."""
    asked.append(True)
    yield from ()


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
                reason = f"no blank line in {PARAGRAPH:,} characters, split at a line's end"
                problems.append(Problem(number, "", reason, "warned"))
                split = True
            held = []
        if not blank:
            if not held:
                begin, size = number, 0
            held.append(line.rstrip("\r\n"))
            size += len(line)


def _parquet(path: Path, problems: list[Problem]) -> Iterator[Raw]:
    """The rows of a Parquet file, a small batch in memory at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for record in _rows(batch):
                    row += 1
                    if record is None:
                        problems.append(Problem(row, "", "row cannot be read", "dropped"))
                    else:
                        yield Raw(row, record)
    except (pa.ArrowException, OSError, ValueError) as e:
        reason = f"damaged Parquet file: {str(e).splitlines()[0] if str(e) else type(e).__name__}"
        problems.append(Problem(row + 1, "", reason, "dropped"))


def _rows(batch: Any) -> Iterator[dict[str, Any] | None]:
    """The rows of a batch; None for one that Python has no value for (a string not in UTF-8)."""
    try:
        yield from batch.to_pylist()
        return
    except (ValueError, OverflowError):
        pass
    for i in range(batch.num_rows):
        try:
            yield batch.slice(i, 1).to_pylist()[0]
        except (ValueError, OverflowError):
            yield None
