"""What tokenizers do at borders: the space they put before a text, and where a text may be cut."""

from __future__ import annotations

import re
from typing import Any


def without_dummy_prefix(spec: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer without the space it puts before its input; the same object if it has none."""

    def strip(part: Any) -> Any:
        if not isinstance(part, dict):
            return part
        if part.get("type") == "Prepend":
            return None
        if part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") != "never":
            return {**part, "prepend_scheme": "never"}
        if part.get("type") == "ByteLevel" and part.get("add_prefix_space"):
            return {**part, "add_prefix_space": False}
        for key in ("normalizers", "pretokenizers"):
            if key in part:
                inner = [s for s in map(strip, part[key]) if s is not None]
                return {**part, key: inner} if inner != part[key] else part
        return part

    changed = {k: strip(spec.get(k)) for k in ("normalizer", "pre_tokenizer")}
    if all(changed[k] == spec.get(k) for k in changed):
        return spec
    return {**spec, **changed}


def prefixes_each(spec: dict[str, Any]) -> bool:
    """Whether the dummy space stands behind every special token too, not only in front of all."""

    def first_only(part: Any) -> bool:
        if not isinstance(part, dict):
            return False
        if part.get("type") == "Metaspace":
            return part.get("prepend_scheme", "always") == "first"
        return any(first_only(p) for p in part.get("pretokenizers", []))

    return not first_only(spec.get("pre_tokenizer"))


class LineCuts:
    """Where a text can be cut behind the end of a line so that its parts, encoded apart, have the
    tokens of the whole.

    That is so where no token of the vocabulary has anything but white space behind a line feed, and
    where the rule that cuts words apart ends one there. The second is tried, for a line feed behind
    other characters and behind white space; a tokenizer that does neither is never cut.
    """

    def __init__(self, begin: Any, within: Any) -> None:
        self._one = self._many = False
        if any(map(_spans_lines, begin.get_vocab(with_added_tokens=False))):
            return
        words = ["a", "你", "1", "。", ".", ":", ")", "é", "'s"]
        others = ["A", "a", "1", "好", "“", ".", "#", "<", "[", "(", "'s", "-", "_", "é", "😀"]

        def same(left: str) -> bool:
            alone = begin.encode(left, add_special_tokens=False).ids
            return all(
                begin.encode(left + right, add_special_tokens=False).ids
                == alone + within.encode(right, add_special_tokens=False).ids
                for right in others
            )

        self._one = all(same(f"{word}\n") for word in words)
        ends = ["\n", "\n\n", " \n", " \n\n", "\t\n", "\r\n", "\n \n"]
        self._many = self._one and all(same(w + end) for w in ["", *words[:4]] for end in ends)
        self._split = re.compile(r"(?<=\n)(?=\S)")
        self._known: dict[str, list[str]] = {}

    def between(self, left: str, right: str) -> bool:
        """Whether two texts may be cut apart."""
        if not self._one or left[-1] != "\n" or right[0].isspace():
            return False
        return self._many or (len(left) > 1 and not left[-2].isspace())

    def split(self, text: str) -> list[str]:
        """The lines of a text, those of them together that may not be cut."""
        if not self._one:
            return [text]
        known = self._known.get(text)
        if known is None:
            lines = self._split.split(text)
            if not self._many:
                whole, lines = lines, lines[:1]
                for line in whole[1:]:
                    if self.between(lines[-1], line):
                        lines.append(line)
                    else:
                        lines[-1] += line
            # Between the first and the last line nothing can change: one piece.
            known = lines if len(lines) < 3 else [lines[0], "".join(lines[1:-1]), lines[-1]]
            self._known[text] = known
        return known


def _spans_lines(piece: str) -> bool:
    """Whether a token has a line feed before something else than white space; byte-level
    vocabularies spell a line feed U+010A."""
    if "\n" not in piece and "\u010a" not in piece:
        return False
    return re.search(r"[\n\u010a](?=[^\s\u010a\u010d\u0120\u0109▁])", piece) is not None
