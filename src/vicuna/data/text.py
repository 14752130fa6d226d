"""A file as text, streamed: unpacked, decoded, and cut into lines.

The encoding is detected where none is given. Nothing here fails on content: bytes that do not
decode become MARK in the text, and a broken gzip ends it.
"""

from __future__ import annotations

import codecs
import io
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from vicuna.data.types import Problem
from vicuna.errors import UserError

BUFFER = 1 << 18  # bytes read at once
SAMPLE = 1 << 20  # bytes that the encoding is decided on

BLANK = " \t\r\n\ufeff"  # the BOM too: files with BOMs get concatenated
CUT = "file is cut off here"
# Stands for bytes that do not decode. A lone surrogate: no valid file decodes to it, so it marks
# the records to drop, and the text around it stays readable.
MARK = "\udcff"
codecs.register_error("vicuna.mark", lambda e: (MARK, e.end))  # type: ignore[attr-defined]


class Text:
    """A file as blocks of text, unpacked and decoded while it is read.

    After the iteration `encoding` says what the file is in and `fault` what is wrong with its gzip.
    """

    def __init__(self, path: Path, encoding: str | None, problems: list[Problem]) -> None:
        self.path, self.problems = path, problems
        self.given = encoding is not None
        self.encoding = encoding or "UTF-8"
        self.fault = ""
        try:
            self.decoder = _decoder(self.encoding)
        except (LookupError, ValueError) as e:
            raise UserError(
                f"unknown encoding {encoding!r}",
                where=str(path),
                fix="Name one that Python knows, such as utf-8, gb18030, big5 or utf-16.",
            ) from e

    def __iter__(self) -> Iterator[str]:
        texts = self._decode(self._unpack())
        yield next(texts, "").removeprefix("\ufeff")
        yield from texts

    def drop(self, line: int) -> None:
        """Note a record that does not decode."""
        self.problems.append(Problem(line, "", f"bytes that are not {self.encoding}", "dropped"))

    def _unpack(self) -> Iterator[bytes]:
        packed = magic(self.path)[:2] == b"\x1f\x8b"
        yield from self._inflate(_blocks(self.path)) if packed else _blocks(self.path)

    def _inflate(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        """Gunzip one or several members. The gzip module would lose what comes before a fault."""
        engine = zlib.decompressobj(wbits=31)
        for block in blocks:
            while block:
                if engine.eof:  # another member, or the zeros that tapes pad with
                    if not (block := block.lstrip(b"\0")):
                        break
                    engine = zlib.decompressobj(wbits=31)
                try:
                    yield engine.decompress(block, max(BUFFER, 1024))
                except zlib.error:
                    self.fault = "gzip data are damaged here"
                    return
                block = engine.unused_data if engine.eof else engine.unconsumed_tail
        yield engine.flush()
        if not engine.eof:
            self.fault = CUT

    def _decode(self, blocks: Iterator[bytes]) -> Iterator[str]:
        """Text, in the encoding given or in the one that the first non-ASCII megabyte tells."""
        held, first = b"", True
        for block in () if self.given else blocks:
            held += block
            if held.isascii():
                yield held.decode("ascii")
                held, first = b"", False
            elif len(held) >= SAMPLE and not held[:-3].isascii():  # more than a cut character
                break
        if not self.given and (name := _guess(held, first)) != "UTF-8":
            self.encoding, self.decoder = name, _decoder(name)
            self.problems.append(Problem(1, "", f"encoding is {name}, decoded", "warned"))
        for block in chain([held], blocks):
            yield self.decoder.decode(block)
        yield self.decoder.decode(b"", final=True)


def magic(path: Path) -> bytes:
    """The first four bytes of a file."""
    try:
        with path.open("rb") as f:
            return f.read(4)
    except OSError as e:
        raise _unreadable(path, e) from e


def _blocks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as f:
            while block := f.read(BUFFER):
                yield block
    except OSError as e:
        raise _unreadable(path, e) from e


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot read: {error.strerror or error}",
        where=str(path),
        fix="Check the path and that you may read the file.",
    )


def _decoder(encoding: str) -> codecs.IncrementalDecoder:
    """A decoder that puts MARK for what it cannot decode."""
    return codecs.getincrementaldecoder(encoding)(errors="vicuna.mark")


def _guess(sample: bytes, first: bool) -> str:
    """The encoding of bytes, which may end within a character; `first`: the file begins here.

    A damaged UTF-8 file stays UTF-8: its characters outnumber its faults, while GB18030 read as
    UTF-8 is mostly faults.
    """
    if first and sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    for name, tolerated in (("UTF-8", 1.0), ("GB18030", 0.05)):
        text = _decoder(name).decode(sample)
        faults = text.count(MARK)
        if not faults or faults < tolerated * (sum(c > "\x7f" for c in text) - faults):
            return name
    return "UTF-8"


def lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines with their line feed, which only the last may lack."""
    held: list[str] = []
    for block in texts:
        if end := block.rfind("\n") + 1:
            # Not str.splitlines, for which U+2028 and others end a line too.
            yield from io.StringIO("".join(held) + block[:end], newline="\n")
            held = [block[end:]]
        else:
            held.append(block)
    if last := "".join(held):
        yield last
