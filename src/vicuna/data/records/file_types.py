"""What a file is, by its first bytes: read as text or a table, or named with the way out.

Names lie (a workbook called .csv), and what is not text would be read as broken text.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Literal

from vicuna.messages import Message

Kind = Literal["text", "parquet", "arrow"]

HEAD = 1 << 12  # bytes that are looked at

# What it is called, and what to do; the reason that stands in the report.
WORKBOOK = Message("an Excel workbook (save its sheet as CSV UTF-8 and give that)")
OLD_OFFICE = Message("an old Excel or Word file (save it as CSV UTF-8 or as plain text)")
CALC = Message("an OpenDocument spreadsheet (save its sheet as CSV UTF-8)")
NUMBERS = Message("an Apple Numbers or Pages file (export it as CSV or plain text)")
WORD = Message("a Word document (save it as plain text)")
SLIDES = Message("a presentation (save its words as plain text)")
WRITER = Message("an OpenDocument text (save it as plain text)")
EBOOK = Message("an e-book (save it as plain text)")
NUMPY = Message("numpy arrays (write their records as JSONL)")
TORCH = Message("a PyTorch file (a pickle is never opened; write its records as JSONL)")
PICKLE = Message("a pickle (never opened; write its records as JSONL)")
ARCHIVE = Message("an archive (unpack it and give the folder)")
SQLITE = Message("an SQLite database (export its table as CSV)")
PDF = Message("a PDF (save its words as plain text)")
RTF = Message("a rich text document (save it as plain text)")
HDF5 = Message("an HDF5 file (write its records as JSONL or Parquet)")
OTHER_TABLE = Message("a table of another system (write it as Parquet or JSONL)")
MEDIA_FILE = Message("an image, a recording or a film (there is no text in it)")
WEIGHTS = Message("weights of a model (not data)")
PROGRAM = Message("a program (not data)")
BINARY = Message("binary data of no kind that is known here")
WEB_PAGE = Message("a web page (save its words as plain text, or its table as CSV)")
XML = Message("XML (write its records as JSONL)")
YAML = Message("YAML (write its records as JSONL)")
LFS = Message("a pointer of Git LFS (git lfs pull fetches the file)")

_BEGINNINGS = (
    (b"7z\xbc\xaf\x27\x1c", ARCHIVE),
    (b"Rar!\x1a\x07", ARCHIVE),
    (b"\x04\x22\x4d\x18", ARCHIVE),
    (b"\x1f\x9d", ARCHIVE),
    (b"\x1f\xa0", ARCHIVE),
    (b"LZIP", ARCHIVE),
    (b"MSCF", ARCHIVE),
    (b"!<arch>\n", ARCHIVE),
    (b"SQLite format 3\0", SQLITE),
    (b"%PDF", PDF),
    (b"{\\rtf", RTF),
    (b"\x93NUMPY", NUMPY),
    (b"\x89HDF\r\n\x1a\n", HDF5),
    (b"ORC", OTHER_TABLE),
    (b"Obj\x01", OTHER_TABLE),
    (b"FEA1", OTHER_TABLE),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", OLD_OFFICE),
    (b"\x89PNG", MEDIA_FILE),
    (b"\xff\xd8\xff", MEDIA_FILE),
    (b"GIF8", MEDIA_FILE),
    (b"RIFF", MEDIA_FILE),
    (b"OggS", MEDIA_FILE),
    (b"fLaC", MEDIA_FILE),
    (b"ID3", MEDIA_FILE),
    (b"\x1a\x45\xdf\xa3", MEDIA_FILE),
    (b"GGUF", WEIGHTS),
    (b"\x7fELF", PROGRAM),
    (b"MZ\x90\0", PROGRAM),
    (b"version https://git-lfs.github.com/spec", LFS),
)
_WORDS = (b"LZIP", b"MSCF", b"ORC", b"RIFF", b"OggS", b"fLaC", b"ID3", b"GIF8", b"GGUF", b"FEA1")
_TEXT_BEGINNINGS = (
    ("<!doctype html", WEB_PAGE),
    ("<html", WEB_PAGE),
    ("<?xml", XML),
    ("mime-version:", WEB_PAGE),
    ("version https://git-lfs.github.com/spec", LFS),
)
_BOMS = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff", b"\xef\xbb\xbf")


def kind_of(head: bytes, path: Path) -> Kind | str:
    """How to read a file that begins with `head` (unpacked), or what it is instead of data."""
    if head[:4] == b"PAR1":
        return "parquet"
    if head[:6] == b"ARROW1":
        return "arrow"
    if head[:4] == b"\xff\xff\xff\xff" and len(head) >= 8:
        length = int.from_bytes(head[4:8], "little")
        return "arrow" if 0 < length < 1 << 28 else BINARY
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08"):
        return _zipped(path)
    for beginning, reason in _BEGINNINGS:
        # Words that a text may begin with count only where what follows is no text.
        if head.startswith(beginning) and (beginning not in _WORDS or b"\0" in head[:64]):
            return reason
    if head[257:262] == b"ustar":
        return ARCHIVE
    if head[4:8] == b"ftyp":
        return MEDIA_FILE
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return PICKLE
    if head[8:9] == b"{" and b"\0\0" in head[:8]:
        return WEIGHTS  # safetensors: the length of its header stands first
    return BINARY if _binary(head) else "text"


def _binary(head: bytes) -> bool:
    """Whether bytes are no text in any usual encoding: NULs without the pattern of UTF-16 or 32."""
    sample = head[: len(head) // 4 * 4]
    if not sample or head.startswith(_BOMS) or b"\0" not in sample:
        return False
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    total = len(sample) // 2
    wide = max(even, odd) > 0.02 * total and min(even, odd) <= 0.1 * max(even, odd)
    quads = [sample[i::4].count(0) for i in range(4)]
    return not wide and sum(q > 0.9 * len(sample) // 4 for q in quads) < 2


def _zipped(path: Path) -> str:
    """What a zip file holds: many formats are one."""
    try:
        with zipfile.ZipFile(path) as file:
            names = file.namelist()
            mime = file.read("mimetype")[:100] if "mimetype" in names else b""
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, NotImplementedError, KeyError):
        names, mime = [], b""
    starts = {name.split("/")[0] for name in names}
    if "xl" in starts or path.suffix.lower() in (".xlsx", ".xlsm", ".xlsb"):
        return WORKBOOK
    if b"spreadsheet" in mime or path.suffix.lower() == ".ods":
        return CALC
    if "word" in starts or path.suffix.lower() == ".docx":
        return WORD
    if "ppt" in starts or b"presentation" in mime:
        return SLIDES
    if b"opendocument" in mime:
        return WRITER
    if b"epub" in mime:
        return EBOOK
    if "Index" in starts or "Index.zip" in names:
        return NUMBERS
    if names and all(name.endswith(".npy") for name in names):
        return NUMPY
    if any(name.endswith("data.pkl") for name in names):
        return TORCH
    return ARCHIVE


def text_kind(start: str, name: str) -> str | None:
    """What a text is instead of records, by how it begins; None where it may be records."""
    begin = start[:4096].lstrip().lower()
    for beginning, reason in _TEXT_BEGINNINGS:
        if begin.startswith(beginning):
            return reason
    if name.endswith((".yaml", ".yml")) and begin[:1] not in ("{", "["):
        return YAML
    return None
