"""Which encoding bytes are in: Unicode's own, and those of Chinese, Japanese, Korean and Europe.

A multi-byte encoding is told by what its characters are: each of the old standards has the common
characters in rows of their own, so that a text read as another one turns into rare characters,
characters for private use, and faults. Western text is told by letters that stand alone among
ASCII, which in no Chinese encoding they do.
"""

from __future__ import annotations

import codecs
import re

from vicuna.errors import UserError

# Stands for bytes that do not decode. A lone surrogate: no valid file decodes to it, so it marks
# the records to drop, and the text around it stays readable.
MARK = "\udcff"
codecs.register_error("vicuna.mark", lambda e: (MARK, e.end))  # type: ignore[attr-defined]

_BOMS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_FAULTS = 0.05  # of a multi-byte encoding's characters, so many may be damaged
_VERY_COMMON = {
    "GB18030": "的一是不了在人有我他这个们中来上大为和国地到以说时"
    "要就出会可也你对生能而子那得于着下自之，。？、",
    "Big5": "的一是不了在人有我他這個們中來上大為和國地到以說時"
    "要就出會可也你對生能而子那得於著下自之，。？、",
    "Shift_JIS": "のにはをたがでてとしれさいるもなすあっかりこ、。ー",
    "EUC-JP": "のにはをたがでてとしれさいるもなすあっかりこ、。ー",
    "EUC-KR": "이다는의에을를가고하지은한로도기사서어나인",
}
# Bytes that lead the rows of common characters, in each encoding.
_COMMON_LEADS = {
    "GB18030": (0xB0, 0xD7),
    "Big5": (0xA4, 0xC6),
    "EUC-JP": (0xB0, 0xCF),
    "EUC-KR": (0xB0, 0xC8),
    "Shift_JIS": (0x88, 0x97),
}
_CODECS = {"Shift_JIS": "cp932", "EUC-KR": "cp949"}
_KANA = re.compile("[\u3041-\u30fe]")
_PRIVATE = re.compile("[\ue000-\uf8ff]")
_HALF_KANA = re.compile("[\uff61-\uff9f]")
_HIGH_RUN = re.compile(rb"[\x80-\xff]+")
# What people write: ASCII and its neighbours, Cyrillic, kana, common Chinese characters, Hangul.
_WRITTEN = re.compile(
    "[\t\n\r -~\u00a0-\u024f\u0400-\u04ff\u2010-\u2027\u3000-\u30ff\u4e00-\u9fa5"
    "\uac00-\ud7a3\uff00-\uffef]"
)
# A high byte as Western text has it: beside a letter, or a sign such as € £ ° “ –.
_PLACED = re.compile(
    rb"(?<=[A-Za-z])[\x80-\xff]{1,3}|[\x80-\xff]{1,3}(?=[A-Za-z])|[\x80\x85\x91-\x97\xa3\xa7\xa9\xab\xb0\xbb\xbf]"
)
_CYRILLIC = "оеаинтсрвлкмдпуяыьгзбчйхжшю"
_SAMPLE = 1 << 16  # bytes that the old encodings are compared on


def decoder(encoding: str) -> codecs.IncrementalDecoder:
    """A decoder that puts MARK for what it cannot decode."""
    return codecs.getincrementaldecoder(encoding)(errors="vicuna.mark")


def check(encoding: str, where: str) -> None:
    """Raises: UserError where no encoding of text has this name."""
    try:
        info = codecs.lookup(encoding)
        if getattr(info, "_is_text_encoding", True):
            decoder(encoding).decode("abc".encode(encoding), final=True)
            return
    except (LookupError, ValueError, UnicodeError, NotImplementedError, AssertionError):
        pass
    raise UserError(
        "unknown encoding {encoding!r}",
        encoding=encoding,
        where=where,
        fix="Name one that Python knows, such as utf-8, gb18030, big5, cp1252 or utf-16.",
    )


def settled(encoding: str, begin: bytes) -> str:
    """An encoding that was named, for a file that begins so: UTF-16 and 32 without their mark."""
    name = codecs.lookup(encoding).name
    if name not in ("utf-16", "utf-32") or begin.startswith(tuple(bom for bom, _ in _BOMS)):
        return encoding
    wide = _wide(begin).lower()
    return wide if wide.startswith(name) else f"{name}-le"


def guess(sample: bytes, first: bool) -> str:
    """The encoding of bytes, which may end within a character; `first`: the file begins here.

    A damaged UTF-8 file stays UTF-8: its characters outnumber its faults, while other encodings
    read as UTF-8 are mostly faults.
    """
    if first:
        for bom, name in _BOMS:
            if sample.startswith(bom):
                return name
        if wide := _wide(sample):
            return wide
    text = decoder("UTF-8").decode(sample)
    faults = text.count(MARK)
    if not faults or faults < sum(c > "\x7f" for c in text) - faults:
        return "UTF-8"
    part = sample[:_SAMPLE] if len(sample) > _SAMPLE else sample
    if not first or part.isascii():
        # The first bytes that are not ASCII may stand anywhere in the sample.
        start = max(0, (_HIGH_RUN.search(sample) or re.search(b"", sample)).start() - 64)  # type: ignore[union-attr]
        part = sample[start : start + _SAMPLE]
    if western := _single_byte(part):
        return western
    scores = {name: _score(part, name) for name in _VERY_COMMON}
    best = max(scores, key=lambda name: scores[name])  # the first of them where they are equal
    if scores[best] > 0:
        return best
    return _cyrillic(part) or "UTF-8"


def _wide(sample: bytes) -> str:
    """UTF-16 or UTF-32 without a mark: text in no other encoding has zeros; "" where it is none."""
    head = sample[: min(len(sample), 1 << 14) // 4 * 4]
    if b"\0" not in head:
        return ""
    quads = [head[i::4].count(0) for i in range(4)]
    n = len(head) // 4
    if quads[2] > 0.9 * n and quads[3] > 0.9 * n:
        return "UTF-32-LE"
    if quads[0] > 0.9 * n and quads[1] > 0.9 * n:
        return "UTF-32-BE"
    shares = {name: _readable(head, name) for name in ("UTF-16-LE", "UTF-16-BE")}
    best = max(shares, key=lambda name: shares[name])
    return best if shares[best] > 0.9 else ""


def _readable(head: bytes, name: str) -> float:
    text = decoder(name).decode(head)
    return len(_WRITTEN.findall(text)) / max(1, len(text))


def _single_byte(sample: bytes) -> str:
    """A Western encoding, where nearly all high bytes stand alone; "" otherwise.

    In the encodings of Chinese, Japanese and Korean they come in pairs, and in Cyrillic in words.
    """
    runs = [len(m[0]) for m in _HIGH_RUN.finditer(sample)]
    if not runs or sum(r for r in runs if r <= 3) < 0.95 * sum(runs):
        return ""
    if sum(r == 1 for r in runs) < 0.4 * len(runs):
        return ""
    placed = len(_PLACED.findall(sample))
    if placed < 0.5 * len(runs):
        return ""
    # Among letters, what is no letter in one of the two encodings betrays it.
    inside = re.findall(rb"(?<=[A-Za-z])[\x80-\xff](?=[a-z])", sample)
    if not inside:
        inside = re.findall(rb"[\x80-\xff]", sample)
    odd = {name: sum(not b.decode(name, "replace").isalpha() for b in inside) for name in _WESTERN}
    return min(_WESTERN, key=lambda name: odd[name])


_WESTERN = ("cp1252", "cp1250")


def _score(sample: bytes, name: str) -> float:
    """How much bytes look like text in an encoding; 0 or less where they do not."""
    text = decoder(_CODECS.get(name, name)).decode(sample)
    wide = [c for c in text if c > "\x7f"]
    if not wide:
        return 0.0
    faults = text.count(MARK)
    if faults > max(1, _FAULTS * len(wide)):
        return -1.0
    first, last = _COMMON_LEADS[name]
    codec = _CODECS.get(name, name)
    common = 0
    for c in wide:
        code = c.encode(codec, "ignore")
        common += len(code) >= 2 and first <= code[0] <= last
    known = frozenset(_VERY_COMMON[name])
    often = sum(c in known for c in wide)
    private = len(_PRIVATE.findall(text)) + len(_HALF_KANA.findall(text))
    kana = len(_KANA.findall(text))
    if name in ("Shift_JIS", "EUC-JP"):
        common += kana
        if kana < 0.1 * len(wide):  # Japanese without kana is no text
            return -0.5
    elif name in ("GB18030", "Big5"):
        private += kana if kana > 0.05 * len(wide) else 0
    return (common + 2 * often - 4 * private - 4 * faults) / len(wide)


def _cyrillic(sample: bytes) -> str:
    best, name_ = 0.3, ""
    for name in ("cp1251", "koi8-r"):
        text = sample.decode(name, "replace").lower()
        wide = [c for c in text if c > "\x7f"]
        share = sum(c in _CYRILLIC[:14] for c in wide) / max(1, len(wide))
        if share > best:
            best, name_ = share, name
    return name_
