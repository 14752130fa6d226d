"""Tables: CSV with whatever stands between its fields, Parquet and Arrow. Rows become dicts."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from vicuna.data.conversation import Problem, Raw
from vicuna.data.records.encodings import MARK
from vicuna.data.records.field_names import KNOWN
from vicuna.data.records.json_stream import LIMIT
from vicuna.data.records.text_stream import Position, Text, lines, unwatched
from vicuna.messages import Message

_DELIMITERS = (",", "\t", ";", "|")
_LOOKED_AT = 50  # rows that the delimiter is found by
_PREFIX = "sep="  # Excel's own line


def delimiter_of(start: str, name: str) -> str:
    """What stands between the fields of a table that begins with `start`; "" where it is no table.

    A header whose names are known here decides; else the delimiter that cuts all rows into the same
    number of fields, more than one. `name` (ending in .csv or .tsv) decides where neither does.
    """
    start = start.lstrip("\ufeff")
    if start[:4].lower() == _PREFIX and start[4:5].strip(" \r\n"):
        return start[4]
    best, most = "", 0.0
    for delimiter in _DELIMITERS:
        merit = _merit(start, delimiter)
        if merit > most:
            best, most = delimiter, merit
    if best or not name:
        return best
    return "\t" if name.endswith((".tsv", ".tab")) else ","


def _merit(start: str, delimiter: str) -> float:
    """How well a delimiter cuts the first rows; 0 where it cuts nothing."""
    found: list[list[str]] = []
    try:
        csv.field_size_limit(LIMIT)
        # Lines end in their line feed, which only the last, cut one may lack.
        reader = csv.reader(io.StringIO(start, newline="\n"), delimiter=delimiter)
        found = [row for row in islice(reader, _LOOKED_AT) if any(row)]
    except csv.Error:
        pass
    if not found or len(found[0]) < 2:
        return 0.0
    names = {field.strip().strip("\ufeff").lower() for field in found[0]}
    known = len(names & KNOWN)
    if not all(names) and not known:
        return 0.0
    width = len(found[0])
    fitting = sum(len(row) <= width for row in found) / len(found)
    same = sum(len(row) == width for row in found) / len(found)
    return 10.0 * known + 4.0 * same + fitting + 0.01 * width if same > 0.5 or known > 1 else 0.0


def rows(
    texts: Iterable[str], text: Text, problems: list[Problem], delimiter: str
) -> Iterator[Raw]:
    """The rows of a CSV file under the names of its first row."""
    csv.field_size_limit(LIMIT)  # the default of 128 KiB is less than one long conversation
    ended: list[bool] = []
    # The reader asks for a line behind the last one only where a quote is still open.
    reader = csv.reader(chain(lines(texts), _noting(ended)), delimiter=delimiter or ",")
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as e:
            problems.append(
                Problem(line, "", Message("not valid CSV: {error}", error=e), "dropped")
            )
            continue
        if row is None:
            return
        if not any(row):
            continue
        if header is None and line == 1 and "".join(row)[:4].lower() == _PREFIX:
            continue
        if ended:
            reason = Message("a quote opens here and is not closed, the rest of the file is lost")
            problems.append(Problem(line, "", reason, "dropped"))
        elif MARK in "".join(row):
            text.drop(line)
        elif header is None:
            header = [name.strip() for name in row]
        elif any(row[len(header) :]):
            reason = Message("more fields than the {count} of the header", count=len(header))
            problems.append(Problem(line, "", reason, "dropped"))
        else:
            yield Raw(line, {k: v for k, v in zip(header, row) if k})


def _noting(asked: list[bool]) -> Iterator[str]:
    """No lines, and a note that one was asked for."""
    asked.append(True)
    yield from ()


def arrow(path: Path, problems: list[Problem], position: Position = unwatched) -> Iterator[Raw]:
    """The rows of an Arrow file or stream, as `datasets` saves them."""
    import pyarrow as pa

    row = 0
    try:
        with pa.memory_map(str(path)) as source:
            try:
                file = pa.ipc.open_file(source)
                batches = (file.get_batch(i) for i in range(file.num_record_batches))
            except pa.ArrowInvalid:
                source.seek(0)
                batches = iter(pa.ipc.open_stream(source))
            for batch in batches:
                position(source.tell())
                for start in range(0, batch.num_rows, 1024):
                    for record in _rows(batch.slice(start, 1024)):
                        row += 1
                        if record is None:
                            problems.append(
                                Problem(row, "", Message("row cannot be read"), "dropped")
                            )
                        else:
                            yield Raw(row, record)
    except (pa.ArrowException, OSError, ValueError) as e:
        reason = f"damaged Arrow file: {str(e).splitlines()[0] if str(e) else type(e).__name__}"
        problems.append(Problem(row + 1, "", reason, "dropped"))


def parquet(path: Path, problems: list[Problem], position: Position = unwatched) -> Iterator[Raw]:
    """The rows of a Parquet file, a small batch in memory at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(path) as file:
            size, total = path.stat().st_size, max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(batch_size=1024):
                position(size * min(row + batch.num_rows, total) // total)
                for record in _rows(batch):
                    row += 1
                    if record is None:
                        problems.append(Problem(row, "", Message("row cannot be read"), "dropped"))
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
