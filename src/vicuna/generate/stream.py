"""Token ids to text while they come: never half a character, never a part of a stop string.

A stream's state is a small value: beams that fork share it, and each goes on from it in its own
way. Work and memory for a token do not depend on how long the text is already.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from vicuna.data.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BROKEN = "\ufffd"


class TokenBytes:
    """The bytes that each token adds to a text; control tokens add none."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # A decoder treats the first token apart; behind this one, each is as within a text.
        self._before = _ordinary(tokenizer)
        self._skip = len(tokenizer.decode(self._before))
        self._known: dict[int, bytes] = {}

    def __getitem__(self, token_id: int) -> bytes:
        known = self._known.get(token_id)
        if known is None:
            known = b"" if token_id in self._tokenizer.control_ids else self._spell(token_id)
            self._known[token_id] = known
        return known

    def all(self) -> list[bytes]:
        """Those of the whole vocabulary; slow the first time (a second for 100,000 tokens)."""
        return [self[i] for i in range(self._tokenizer.vocab_size)]

    def _spell(self, token_id: int) -> bytes:
        text = self._tokenizer.decode([*self._before, token_id])[self._skip :]
        if _BROKEN not in text:
            return text.encode()
        # A part of a character, or a character of which only a part is missing.
        spelled = self._tokenizer.token(token_id)
        if byte := _BYTE.fullmatch(spelled):
            return bytes([int(byte[1], 16)])
        try:
            return bytes(_BYTE_OF[c] for c in spelled)
        except KeyError:
            return text.encode()


def _ordinary(tokenizer: Tokenizer) -> list[int]:
    """Tokens of a word that none of the tokenizer's added tokens is."""
    for letter in "abcxyz01好":
        ids = tokenizer.text(letter)
        if not tokenizer.control_ids.intersection(ids) and letter in tokenizer.decode(ids):
            return ids
    return []


@lru_cache(maxsize=4)
def token_bytes(tokenizer: Tokenizer) -> TokenBytes:
    """The table of an tokenizer, one for all answers."""
    return TokenBytes(tokenizer)


def _byte_level_alphabet() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for (GPT-2's table): printable
    bytes are themselves, the others the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()


class StreamState(NamedTuple):
    """Where a text stands between two tokens.

    pending: bytes of an unfinished character, at most three.
    started: whether a character has come; the space before the first word is not shown.
    held: characters that may begin a stop string.
    stopped: a stop string is complete; nothing more is shown.
    """

    pending: bytes = b""
    started: bool = False
    held: str = ""
    stopped: bool = False


class TextStream:
    """Text of answers, token by token; it holds no state but the vocabulary's spelling.

    Each token is turned into its bytes, and these into characters as soon as they are complete. A
    Hanzi or an emoji may take several tokens. Bytes that can never become a character are shown as
    U+FFFD, as any decoder shows them; a character that is unfinished at the end is left out.

    The pieces together are `tokenizer.decode` of all ids, less one leading space (the one that a
    template puts before an answer, or that SentencePiece puts before a first word), up to the
    first stop string.

        stream, state = TextStream(tokenizer, stops=["User:"]), StreamState()
        for token_id in token_ids:
            piece, state = stream.push(state, token_id)
        rest = stream.finish(state)
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._bytes = token_bytes(tokenizer)
        self._stops = StopStrings(stops)
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, state: StreamState, token_id: int) -> tuple[str, StreamState]:
        """The text that became certain with this token, often "", and the state behind it."""
        pending, started, held, stopped = state
        new = self._bytes[token_id]
        if not new or stopped:
            return "", state
        self._characters.setstate((pending, 0))
        text = self._characters.decode(new)
        pending = self._characters.getstate()[0]
        if text and not started:
            started = True
            text = text.removeprefix(" ")
        shown, held, stopped = self._stops.push(held, text)
        return shown, StreamState(pending, started, held, stopped)

    def finish(self, state: StreamState) -> str:
        """What was held back and can be shown because nothing follows. Half a character cannot."""
        return "" if state.stopped else state.held


class StopStrings:
    """Lets text through up to the first stop string, and holds back what may begin one.

    The stop string that is complete first wins, so that the result does not depend on how the text
    is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)

    def push(self, held: str, text: str) -> tuple[str, str, bool]:
        """New text behind what is held back.

        Returns: what may be shown now, what is held back now, and whether a stop string is
            complete, behind which nothing is shown.
        """
        if not self._stops:
            return text, "", False
        held += text
        ends = [(at + len(s), at) for s in self._stops if (at := held.find(s)) >= 0]
        if ends:
            return held[: min(ends)[1]], "", True
        cut = self._safe(held)
        return held[:cut], held[cut:], False

    def _safe(self, held: str) -> int:
        """Up to where no stop string can have begun."""
        for cut in range(max(0, len(held) - self._longest + 1), len(held)):
            if any(s.startswith(held[cut:]) for s in self._stops):
                return cut
        return len(held)
