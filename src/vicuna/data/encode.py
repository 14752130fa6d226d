"""Text to token ids, so that no text can ever become a control token.

A rendered conversation is a list of segments. *Marks* are the template's own words: special tokens
in them are parsed. *Text* is what people and models wrote: it is encoded by a tokenizer that knows
no special tokens at all, so `<|im_end|>` typed by a user stays eight harmless pieces.

Each segment is encoded by itself; the tokens of a prompt are therefore always a strict prefix of
the tokens of the same conversation in training. SentencePiece-style tokenizers put a dummy space
before whatever they are given; only the first words of a sequence (or after BOS) get it here.

Needs only `tokenizers` and numpy: worker processes import this module and nothing heavier.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

# Labels of a position: what it must predict.
NO_TARGET, NEXT_TOKEN, END_TOKEN = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a rendered conversation.

    kind: `mark` (template's words), `text` (somebody's words), `bos`, `end` (the token a turn ends
    with), or `silent_end`: the end is a target of the position before, but does not stand in the
    sequence (the 2023 project's chat prompt separates past turns by blank lines only).
    """

    kind: Literal["mark", "text", "bos", "end", "silent_end"]
    text: str = ""
    supervised: bool = False


@dataclass(slots=True)
class Example:
    """Token ids and labels of one conversation.

    ids: int32 (T,). labels: uint8 (T,), what position t must predict: nothing, the next id, or the
    end token.
    """

    ids: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Vocabulary:
    """All that is needed to encode and decode, as plain data that travels to worker processes.

    tokenizer_json: the `tokenizer.json` text. `bos_id` is None where the tokenizer does not itself
    put one in front; `end_ids` are all ids that generation may stop at, the template's first;
    `template` is the one that a merged model brings (`Template.to_dict`).
    """

    tokenizer_json: str
    bos_id: int | None
    eos_id: int
    pad_id: int
    bos_token: str = ""
    eos_token: str = ""
    chat_template: str | None = None
    end_ids: tuple[int, ...] = field(default_factory=tuple)
    special_tokens: dict[str, int] = field(default_factory=dict)
    template: dict[str, Any] | None = None

    def digest(self) -> str:
        """A hash of everything that decides which ids a text becomes."""
        parts = {k: v for k, v in asdict(self).items() if k not in ("chat_template", "template")}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def looks_like_control(content: str) -> bool:
    """Whether a token is spelled like a control token, whatever it is marked as."""
    return bool(re.fullmatch(r"<.*>|\[/?[A-Z_ ]+\]|<<.*>>", content, re.S))


def _without_added(spec: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer without special or control-looking added tokens."""
    kept = [
        t for t in spec["added_tokens"] if not t["special"] and not looks_like_control(t["content"])
    ]
    return {**spec, "added_tokens": kept}


def _without_dummy_prefix(spec: dict[str, Any]) -> dict[str, Any]:
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


class Encoder:
    """Encodes segments into ids and labels, and ids back into text."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        from tokenizers import Tokenizer

        self.vocabulary = vocabulary
        spec = json.loads(vocabulary.tokenizer_json)
        spec.update(truncation=None, padding=None, post_processor=None)
        rest = _without_dummy_prefix(spec)

        def build(s: dict[str, Any]) -> Tokenizer:
            return Tokenizer.from_str(json.dumps(s))

        self._mark_first = build(spec)
        self._mark_rest = self._mark_first if rest is spec else build(rest)
        self._text_first = build(_without_added(spec))
        self._text_rest = self._text_first if rest is spec else build(_without_added(rest))
        self.vocab_size: int = self._mark_first.get_vocab_size(with_added_tokens=True)
        # Control tokens are told apart by name: added_tokens of kinds that text may not contain.
        self.control_ids = frozenset(
            t["id"]
            for t in spec["added_tokens"]
            if t["special"] or looks_like_control(t["content"])
        )
        controls = sorted(
            (t["content"] for t in spec["added_tokens"] if t["id"] in self.control_ids),
            key=len,
            reverse=True,
        )
        self._control = re.compile("|".join(map(re.escape, controls))) if controls else None
        self._marks: dict[tuple[str, bool], list[int]] = {}

    # -- encoding -------------------------------------------------------------------------------

    def mark(self, text: str, first: bool = False) -> list[int]:
        """Ids of a template's own words; special tokens in them are parsed."""
        key = (text, first)
        if key not in self._marks:
            self._marks[key] = self._encode_mark(text, first)
        return self._marks[key]

    def _encode_mark(self, text: str, first: bool) -> list[int]:
        if first or self._mark_rest is self._mark_first:
            return self._mark_first.encode(text, add_special_tokens=False).ids
        found = self._control.search(text) if self._control else None
        cut = found.start() if found else len(text)
        head = self._mark_rest.encode(text[:cut], add_special_tokens=False).ids if cut else []
        # What follows a control token inside a mark is a new beginning, as in Llama 2's turns.
        tail = self._mark_first.encode(text[cut:], add_special_tokens=False).ids if found else []
        return head + tail

    def text(self, text: str, first: bool = False) -> list[int]:
        """Ids of somebody's words; never a control token."""
        tokenizer = self._text_first if first else self._text_rest
        return tokenizer.encode(text, add_special_tokens=False).ids

    def encode(self, segments: Sequence[Segment], end_id: int) -> Example:
        """One rendered conversation to ids (T,) and labels (T,)."""
        return self.encode_many([segments], end_id)[0]

    def encode_many(self, rendered: Iterable[Sequence[Segment]], end_id: int) -> list[Example]:
        """Many rendered conversations at once: one call of the tokenizer for all their texts."""
        rendered = list(rendered)
        places: list[tuple[int, int]] = []
        texts: list[str] = []
        firsts: dict[tuple[int, int], list[int]] = {}
        for i, segments in enumerate(rendered):
            for j, segment in enumerate(segments):
                if segment.kind != "text" or not segment.text:
                    continue
                if self._starts(segments, j) and self._text_first is not self._text_rest:
                    firsts[i, j] = self.text(segment.text, first=True)
                else:
                    places.append((i, j))
                    texts.append(segment.text)
        encodings = self._text_rest.encode_batch_fast(texts, add_special_tokens=False)
        pieces = dict(zip(places, (e.ids for e in encodings)))
        pieces.update(firsts)
        return [self._assemble(segments, i, pieces, end_id) for i, segments in enumerate(rendered)]

    def _starts(self, segments: Sequence[Segment], j: int) -> bool:
        """Whether nothing, or only BOS, stands directly before segment j."""
        while j > 0 and segments[j - 1].kind in ("mark", "text") and not segments[j - 1].text:
            j -= 1
        return j == 0 or segments[j - 1].kind == "bos"

    def _assemble(
        self,
        segments: Sequence[Segment],
        i: int,
        pieces: dict[tuple[int, int], list[int]],
        end_id: int,
    ) -> Example:
        ids: list[int] = []
        labels: list[int] = []
        for j, segment in enumerate(segments):
            if segment.kind == "silent_end":
                if segment.supervised and labels:
                    labels[-1] = END_TOKEN
                continue
            if segment.kind == "text":
                new = pieces.get((i, j), [])
            elif segment.kind == "mark":
                new = self.mark(segment.text, self._starts(segments, j)) if segment.text else []
            elif segment.kind == "end":
                new = [end_id]
            else:
                bos = self.vocabulary.bos_id
                new = [] if bos is None else [bos]
            if not new:
                continue
            if segment.supervised and labels:
                labels[-1] = NEXT_TOKEN
            ids += new
            labels += [NEXT_TOKEN if segment.supervised else NO_TARGET] * (len(new) - 1)
            labels.append(NO_TARGET)
        return Example(np.asarray(ids, np.int32), np.asarray(labels, np.uint8))

    # -- decoding -------------------------------------------------------------------------------

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens left out."""
        return self._mark_first.decode(
            [int(i) for i in ids if int(i) not in self.control_ids], skip_special_tokens=True
        )

    def token(self, token_id: int) -> str:
        """The vocabulary's own spelling of an id, for display."""
        return self._mark_first.id_to_token(int(token_id)) or f"<{token_id}>"

    def token_id(self, token: str) -> int | None:
        """The id of a control token by name, or None where it is not one in this vocabulary."""
        found = self._mark_first.token_to_id(token)
        return found if found in self.control_ids else None
