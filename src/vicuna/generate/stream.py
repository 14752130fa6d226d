"""Token ids to text while they come: never half a character, never a part of a stop string.

Work and memory for a token do not depend on how long the text is already.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence

from vicuna.data.encode import Encoder

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BROKEN = "\ufffd"


class TextStream:
    """Text of an answer, token by token.

    Each token is turned into its bytes, and these into characters as soon as they are complete. A
    Hanzi or an emoji may take several tokens. Bytes that can never become a character are shown as
    U+FFFD, as any decoder shows them; a character that is unfinished at the end is left out.

    The pieces together are `encoder.decode` of all ids, less one leading space: the one that a
    template puts before an answer, or that SentencePiece puts before a first word.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        # A decoder treats the first token apart; behind this one, each is as within a text.
        self._before = encoder.text("a")
        self._skip = len(encoder.decode(self._before))
        self._bytes: dict[int, bytes] = {}
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._started = False

    def push(self, token_id: int) -> str:
        """The text that became certain with this token, often ""."""
        if token_id in self._encoder.control_ids:
            return ""
        if token_id not in self._bytes:
            self._bytes[token_id] = self._bytes_of(token_id)
        text = self._characters.decode(self._bytes[token_id])
        if text and not self._started:
            self._started = True
            return text.removeprefix(" ")
        return text

    def finish(self) -> str:
        """The rest, after the last token; always "", because half a character is never shown."""
        self._characters.reset()
        return ""

    def _bytes_of(self, token_id: int) -> bytes:
        text = self._encoder.decode([*self._before, token_id])[self._skip :]
        if _BROKEN not in text:
            return text.encode()
        # A part of a character, or a character of which only a part is missing.
        spelled = self._encoder.token(token_id)
        if byte := _BYTE.fullmatch(spelled):
            return bytes([int(byte[1], 16)])
        try:
            return bytes(_BYTE_OF[c] for c in spelled)
        except KeyError:
            return text.encode()


def _byte_level_alphabet() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for (GPT-2's table): printable
    bytes are themselves, the others the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()


class StopStrings:
    """Lets text through up to the first stop string, and holds back what may begin one.

    The stop string that is complete first wins, so that the result does not depend on how the text
    is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that may be shown now. After a stop string `found` is true and nothing comes."""
        if self.found:
            return ""
        held = self._held + text
        ends = [(at + len(s), at) for s in self._stops if (at := held.find(s)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return held[: min(ends)[1]]
        cut = self._safe(held)
        self._held = held[cut:]
        return held[:cut]

    def finish(self) -> str:
        """What was held back, where the answer ended without a stop string."""
        rest, self._held = self._held, ""
        return rest

    def _safe(self, held: str) -> int:
        """Up to where no stop string can have begun."""
        for cut in range(max(0, len(held) - self._longest + 1), len(held)):
            if any(s.startswith(held[cut:]) for s in self._stops):
                return cut
        return len(held)
