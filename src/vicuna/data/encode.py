"""Text to token ids as the base's own tokenizer gives them, but no text becomes a control token.

A rendered conversation is a list of segments. *Marks* are the template's own words: special tokens
in them are parsed. *Text* is what people and models wrote: `<|im_end|>` typed by a user stays eight
harmless pieces. Only tokens that the tokenizer marks special are control tokens; its other added
tokens (`<think>`, `<tool_call>`) are text.

What stands between two control tokens is a *run*. Its marks and texts are encoded together, as the
tokenizer encodes them in one string: a space or a newline at a border joins what it would join
there. A run is cut in one place only, where an answer begins and where it ends: the model has to
begin exactly behind its prompt, so the tokens of a prompt are always a strict prefix of the tokens
of the same conversation in training.

Needs only `tokenizers` and numpy: worker processes import this module and nothing heavier.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

# Labels of a position: what it must predict.
NO_TARGET, NEXT_TOKEN, END_TOKEN = 0, 1, 2
_LEARNED = bytes([NEXT_TOKEN])


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a rendered conversation.

    kind: `mark` (template's words), `text` (somebody's words), `bos`, `end` (the token a turn ends
    with), or `silent_end`: the end is a target of the position before, but does not stand in the
    sequence (the 2023 project's chat prompt separates past turns by blank lines only).
    cut: whether it is encoded apart from what stands before it: an answer begins or has ended here.
    """

    kind: Literal["mark", "text", "bos", "end", "silent_end"]
    text: str = ""
    supervised: bool = False
    cut: bool = False


@dataclass(slots=True)
class Example:
    """Token ids and labels of one conversation.

    ids: int32 (T,). labels: uint8 (T,), what position t must predict: nothing, the next id, or the
    end token.
    """

    ids: np.ndarray
    labels: np.ndarray


_OF_TEMPLATES = ("chat_template", "template", "named_tokens")


@dataclass(frozen=True)
class Vocabulary:
    """All that is needed to encode and decode, as plain data that travels to worker processes.

    tokenizer_json: the `tokenizer.json` text. `bos_id` is None where the tokenizer does not itself
    put one in front; `end_ids` are all ids that generation may stop at, the template's first;
    `template` is the one that a merged model brings (`Template.to_dict`); `named_tokens` are those
    that a chat template may name (`unk_token` and others).
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
    named_tokens: dict[str, str] = field(default_factory=dict)

    def digest(self) -> str:
        """A hash of everything that decides which ids a text becomes."""
        parts = {k: v for k, v in asdict(self).items() if k not in _OF_TEMPLATES}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


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


def _prefixes_each(spec: dict[str, Any]) -> bool:
    """Whether the dummy space stands behind every special token too, not only in front of all."""

    def first_only(part: Any) -> bool:
        if not isinstance(part, dict):
            return False
        if part.get("type") == "Metaspace":
            return part.get("prepend_scheme", "always") == "first"
        return any(first_only(p) for p in part.get("pretokenizers", []))

    return not first_only(spec.get("pre_tokenizer"))


def _strip(
    run: list[tuple[str, bool, bool]], side: Literal[0, -1], cut: Callable[[str], str]
) -> None:
    """Take white space off one side of a run."""
    while run:
        text, supervised, literal = run[side]
        rest = cut(text)
        if rest:
            run[side] = (rest, supervised, literal)
            return
        run.pop(side)


class _LineCuts:
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


@dataclass(slots=True)
class _Atom:
    """Tokens in a row: known, or a text to encode.

    supervised: one flag for all of them, or (length of text, flag) of the parts of the text.
    """

    ids: list[int] | None
    supervised: bool
    text: str = ""
    begins: bool = False
    parts: list[tuple[int, bool]] | None = None
    silent: bool = False


class Encoder:
    """Encodes segments into ids and labels, and ids back into text."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        from tokenizers import Tokenizer

        self.vocabulary = vocabulary
        spec = json.loads(vocabulary.tokenizer_json)
        spec.update(truncation=None, padding=None, post_processor=None)
        rest = _without_dummy_prefix(spec)

        def build(s: dict[str, Any], words_only: bool = True) -> Tokenizer:
            tokenizer = Tokenizer.from_str(json.dumps(s))
            tokenizer.encode_special_tokens = words_only
            return tokenizer

        self._whole = build(spec, words_only=False)
        # Both know no special token. The first puts the dummy space in front, if there is one.
        self._begin = build(spec)
        self._within = self._begin if rest is spec else build(rest)
        self._each = _prefixes_each(spec)
        self.vocab_size: int = self._whole.get_vocab_size(with_added_tokens=True)
        special = {t["content"]: t for t in spec["added_tokens"] if t["special"]}
        self.control_ids = frozenset(t["id"] for t in special.values())
        names = sorted(special, key=lambda t: (-len(t), t))
        self._control = re.compile("|".join(map(re.escape, names))) if names else None
        self._control_id = {name: int(t["id"]) for name, t in special.items()}
        # Special tokens that swallow the white space beside them.
        self._swallow_after = frozenset(t["id"] for t in special.values() if t["rstrip"])
        self._swallow_before = frozenset(t["id"] for t in special.values() if t["lstrip"])
        self._cuts = _LineCuts(self._begin, self._within)
        self._literals: dict[tuple[str, bool], list[int]] = {}
        self._mark_parts: dict[str, list[str | int]] = {}

    # -- encoding -------------------------------------------------------------------------------

    def mark(self, text: str, first: bool = False) -> list[int]:
        """Ids of a template's own words by themselves; special tokens in them are parsed."""
        segments = [Segment("mark", text, cut=True)]
        return self._encode([segments], self.vocabulary.eos_id, first)[0].ids.tolist()

    def text(self, text: str, first: bool = False) -> list[int]:
        """Ids of somebody's words; never a control token."""
        tokenizer = self._begin if first else self._within
        return tokenizer.encode(text, add_special_tokens=False).ids

    def reference(self, text: str) -> list[int]:
        """Ids of a rendered conversation as `apply_chat_template` gives them: the whole text in one
        call, whatever spells a special token in it parsed."""
        return self._whole.encode(text, add_special_tokens=False).ids

    def encode(self, segments: Sequence[Segment], end_id: int) -> Example:
        """One rendered conversation to ids (T,) and labels (T,)."""
        return self.encode_many([segments], end_id)[0]

    def encode_many(self, rendered: Iterable[Sequence[Segment]], end_id: int) -> list[Example]:
        """Many rendered conversations at once: one call of the tokenizer for all their texts."""
        return self._encode(rendered, end_id, True)

    def _encode(
        self, rendered: Iterable[Sequence[Segment]], end_id: int, first: bool
    ) -> list[Example]:
        conversations = [self._atoms(segments, end_id, first) for segments in rendered]
        waiting: tuple[list[_Atom], list[_Atom]] = ([], [])
        for atoms in conversations:
            for atom in atoms:
                if atom.ids is None and atom.parts is None:
                    waiting[atom.begins and self._begin is not self._within].append(atom)
        for tokenizer, some in zip((self._within, self._begin), waiting):
            texts = [atom.text for atom in some]
            found = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            for atom, encoding in zip(some, found):
                atom.ids = encoding.ids
        return [self._assemble(atoms) for atoms in conversations]

    def _atoms(self, segments: Sequence[Segment], end_id: int, begins: bool) -> list[_Atom]:
        """A conversation cut up into control tokens and runs.

        begins: whether the first run gets the dummy space.
        """
        atoms: list[_Atom] = []
        run: list[tuple[str, bool, bool]] = []  # (text, supervised, literal)

        def control(token_id: int, supervised: bool) -> None:
            nonlocal begins
            self._close(run, begins, atoms, token_id)
            atoms.append(_Atom([token_id], supervised))
            begins = self._each

        for segment in segments:
            kind, text = segment.kind, segment.text
            if kind == "text" or kind == "mark":
                if segment.cut and run:
                    self._close(run, begins, atoms)
                    begins = False
                if kind == "text":
                    if text:
                        run.append((text, segment.supervised, False))
                    continue
                for part in self._parts(text):
                    if isinstance(part, int):
                        control(part, segment.supervised)
                    else:
                        run.append((part, segment.supervised, True))
            elif kind == "end":
                control(end_id, segment.supervised)
            elif kind == "bos":
                if self.vocabulary.bos_id is not None:
                    control(self.vocabulary.bos_id, segment.supervised)
                begins = True
            elif segment.kind == "silent_end":
                if run:
                    self._close(run, begins, atoms)
                    begins = False
                atoms.append(_Atom([], segment.supervised, silent=True))
        self._close(run, begins, atoms)
        return atoms

    def _parts(self, mark: str) -> list[str | int]:
        """A mark as the ids of its control tokens and what stands between them."""
        known = self._mark_parts.get(mark)
        if known is None:
            known, at = [], 0
            for found in self._control.finditer(mark) if self._control else ():
                known += [mark[at : found.start()]] if found.start() > at else []
                known.append(self._control_id[found[0]])
                at = found.end()
            known += [mark[at:]] if mark[at:] else []
            self._mark_parts[mark] = known
        return known

    def _close(
        self,
        run: list[tuple[str, bool, bool]],
        begins: bool,
        atoms: list[_Atom],
        control: int | None = None,
    ) -> None:
        """Make atoms of a run, and empty it. control: the control token that follows it."""
        if self._swallow_after or self._swallow_before:
            before = atoms[-1].ids if atoms and not atoms[-1].silent else None
            if before and len(before) == 1 and before[0] in self._swallow_after:
                _strip(run, 0, str.lstrip)
            if control in self._swallow_before:
                _strip(run, -1, str.rstrip)
        held: list[tuple[str, bool, bool]] = []
        last = ""

        def emit() -> None:
            nonlocal begins
            if held:
                atoms.append(self._atom(held, begins))
                begins = False
                held.clear()

        # A run may be cut behind the end of a line wherever that changes no token: what is a
        # template's own is then encoded once for all conversations.
        for piece in run:
            text, supervised, literal = piece
            if last and self._cuts.between(last, text):
                emit()
            if not literal:
                held.append(piece)
            else:
                lines = self._cuts.split(text)
                for n, line in enumerate(lines):
                    if n:
                        emit()
                    held.append((line, supervised, True))
            last = text
        emit()
        run.clear()

    def _atom(self, held: Sequence[tuple[str, bool, bool]], begins: bool) -> _Atom:
        if len(held) == 1:
            text, supervised, literal = held[0]
            ids = self._literal(text, begins) if literal else None
            return _Atom(ids, supervised, text, begins)
        text = "".join(piece[0] for piece in held)
        flags = {piece[1] for piece in held}
        parts = [(len(piece[0]), piece[1]) for piece in held] if len(flags) > 1 else None
        return _Atom(None, held[0][1], text, begins, parts)

    def _literal(self, text: str, begins: bool) -> list[int]:
        """Ids of words that many conversations share."""
        key = (text, begins)
        if key not in self._literals:
            self._literals[key] = self.text(text, begins)
        return self._literals[key]

    def _assemble(self, atoms: Sequence[_Atom]) -> Example:
        ids: list[int] = []
        labels = bytearray()  # a byte a token: numpy takes them as they are
        for atom in atoms:
            if atom.silent:
                if atom.supervised and labels:
                    labels[-1] = END_TOKEN
                continue
            if atom.parts is not None:
                self._mixed(atom, ids, labels)
                continue
            new = atom.ids
            if not new:
                continue
            if atom.supervised:
                if labels:
                    labels[-1] = NEXT_TOKEN
                labels += _LEARNED * (len(new) - 1)
            else:
                labels += bytes(len(new) - 1)
            ids += new
            labels.append(NO_TARGET)
        return Example(np.asarray(ids, np.int32), np.frombuffer(labels, np.uint8))

    def _mixed(self, atom: _Atom, ids: list[int], labels: bytearray) -> None:
        """A text of which a part is learned: a token counts as the part that it begins in."""
        assert atom.parts is not None
        tokenizer = self._begin if atom.begins else self._within
        encoding = tokenizer.encode(atom.text, add_special_tokens=False)
        flags = [flag for length, flag in atom.parts for _ in range(length)]
        for token_id, (start, _) in zip(encoding.ids, encoding.offsets):
            if labels and flags[min(start, len(flags) - 1)]:
                labels[-1] = NEXT_TOKEN
            ids.append(token_id)
            labels.append(NO_TARGET)

    # -- decoding -------------------------------------------------------------------------------

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens left out, as transformers' `skip_special_tokens` has it."""
        return self._whole.decode([int(i) for i in ids], skip_special_tokens=True)

    def spelled(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens among it."""
        return self._whole.decode([int(i) for i in ids], skip_special_tokens=False)

    def token(self, token_id: int) -> str:
        """The vocabulary's own spelling of an id, for display."""
        return self._whole.id_to_token(int(token_id)) or f"<{token_id}>"

    def token_id(self, token: str) -> int | None:
        """The id of a control token by name, or None where it is not one in this vocabulary."""
        found = self._whole.token_to_id(token)
        return found if found in self.control_ids else None
