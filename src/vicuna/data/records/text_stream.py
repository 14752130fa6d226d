"""A file as text, streamed: unpacked, decoded, and cut into lines.

The encoding is detected where none is given (`encodings.py`). Nothing here fails on content: bytes
that do not decode become MARK in the text, and broken compressed data end it.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from vicuna.data.conversation import Problem
from vicuna.data.records.encodings import MARK, check, decoder, guess, settled
from vicuna.errors import UserError
from vicuna.messages import Message

__all__ = ["BLANK", "BUFFER", "CUT", "MARK", "SAMPLE", "Text", "head", "lines", "magic", "unpacked"]

BUFFER = 1 << 18  # bytes read at once
SAMPLE = 1 << 20  # bytes that the encoding is decided on

BLANK = " \t\r\n\ufeff"  # the BOM too: files with BOMs get concatenated
CUT = Message("file is cut off here")
Fault = Callable[[str], None]
# Told how many bytes of a file have been read, packed ones if it is packed.
Position = Callable[[int], None]


def unwatched(_: int) -> None:
    """A position that nobody asks for."""


class Text:
    """A file as blocks of text, unpacked and decoded while it is read.

    After the iteration `encoding` says what the file is in and `fault` what is wrong with its gzip.
    """

    def __init__(
        self,
        path: Path,
        encoding: str | None,
        problems: list[Problem],
        position: Position = unwatched,
    ) -> None:
        self.path, self.problems, self._position = path, problems, position
        self.given = encoding is not None
        self.encoding = encoding or "UTF-8"
        self.fault = ""
        check(self.encoding, str(path))
        if encoding:
            self.encoding = settled(encoding, head(path, 1 << 12))
        self.decoder = decoder(self.encoding)

    def __iter__(self) -> Iterator[str]:
        texts = self._decode(self._unpack())
        yield next(texts, "").removeprefix("\ufeff")
        yield from texts

    def drop(self, line: int) -> None:
        """Note a record that does not decode."""
        self.problems.append(
            Problem(
                line,
                "",
                Message("bytes that are not {encoding}", encoding=self.encoding),
                "dropped",
            )
        )

    def _unpack(self) -> Iterator[bytes]:
        return unpacked(self.path, self._spoilt, self._position)

    def _spoilt(self, fault: str) -> None:
        self.fault = fault

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
        if not self.given and (name := guess(held, first)) != "UTF-8":
            self.encoding, self.decoder = name, decoder(name)
            self.problems.append(
                Problem(1, "", Message("encoding is {name}, decoded", name=name), "warned")
            )
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


def _blocks(path: Path, position: Position) -> Iterator[bytes]:
    done = 0
    try:
        with path.open("rb") as f:
            while block := f.read(BUFFER):
                position(done := done + len(block))
                yield block
    except OSError as e:
        raise _unreadable(path, e) from e


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(
        "cannot read: {reason}",
        reason=error.strerror or error,
        where=str(path),
        fix="Check the path and that you may read the file.",
    )


# Compressed files


def unpacked(path: Path, spoilt: Fault, position: Position = unwatched) -> Iterator[bytes]:
    """The bytes of a file, unpacked where it is compressed (.gz, .bz2, .xz, .zst).

    Args:
        spoilt: told what is wrong with the compressed data, which end there.
    """
    begin = magic(path)
    blocks = _blocks(path, position)
    if begin[:2] == b"\x1f\x8b":
        return _inflate(blocks, spoilt)
    if begin[:3] == b"BZh" and begin[3:4].isdigit():
        return _expand(blocks, bz2.BZ2Decompressor, "bzip2", spoilt)
    if begin == b"\xfd7zX":
        return _expand(blocks, lzma.LZMADecompressor, "xz", spoilt)
    if begin == b"\x28\xb5\x2f\xfd":
        return _zstd(path, spoilt)
    return blocks


def head(path: Path, size: int) -> bytes:
    """The first bytes of a file, unpacked."""
    found = b""
    for block in unpacked(path, lambda _: None):
        found += block
        if len(found) >= size:
            break
    return found[:size]


def _inflate(blocks: Iterable[bytes], spoilt: Fault) -> Iterator[bytes]:
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
                spoilt(Message("gzip data are damaged here"))
                return
            block = engine.unused_data if engine.eof else engine.unconsumed_tail
    yield engine.flush()
    if not engine.eof:
        spoilt(CUT)


def _expand(
    blocks: Iterable[bytes], make: Callable[[], Any], name: str, spoilt: Fault
) -> Iterator[bytes]:
    """Unpack one or several streams of bzip2 or xz, so much at a time."""
    engine = make()
    for block in blocks:
        while True:
            if engine.eof:
                if not (block := block.lstrip(b"\0")):
                    break
                engine = make()
            try:
                yield engine.decompress(block, max(BUFFER, 1024))
            except (OSError, lzma.LZMAError, ValueError):
                spoilt(Message("{name} data are damaged here", name=name))
                return
            block = engine.unused_data if engine.eof else b""
            if engine.needs_input if not engine.eof else not block:
                break
    if not engine.eof:
        spoilt(CUT)


def _zstd(path: Path, spoilt: Fault) -> Iterator[bytes]:
    import pyarrow as pa

    try:
        with pa.CompressedInputStream(pa.OSFile(str(path)), "zstd") as stream:
            while block := stream.read(BUFFER):
                yield bytes(block)
    except (OSError, pa.ArrowException):
        spoilt(Message("zstd data are damaged here"))


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
