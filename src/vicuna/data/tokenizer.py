"""Text to token ids as the base's own tokenizer gives them, but no text becomes a control token.

A rendered conversation is a list of pieces. *Marks* are the template's own words: special tokens
in them are parsed. *Text* is what people and models wrote: `<|im_end|>` typed by a user stays eight
ordinary tokens. Only tokens that the tokenizer marks special are control tokens; its other added
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
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import accumulate, chain, groupby, pairwise
from typing import Any, Literal, NamedTuple

import numpy as np

from vicuna.data.loss_mask import END_TOKEN, NO_TARGET, Example
from vicuna.data.tokenizer_quirks import LineCuts, prefixes_each, without_dummy_prefix

_PLANS = 2048  # shapes of conversations that are remembered


class Piece(NamedTuple):
    """A piece of a rendered conversation.

    kind: `mark` (template's words), `text` (somebody's words), `bos`, `end` (the token a turn ends
    with), or `silent_end`: the end is a target of the position before, but does not stand in the
    sequence (the 2023 project's chat prompt separates past turns by blank lines only).
    cut: whether it is encoded apart from what stands before it: an answer begins or has ended here.
    """

    kind: Literal["mark", "text", "bos", "end", "silent_end"]
    text: str = ""
    in_loss: bool = False
    cut: bool = False


_OF_TEMPLATES = ("chat_template", "template", "named_tokens")


@dataclass(frozen=True)
class TokenizerData:
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


class _RunPart(NamedTuple):
    """A part of a run. source: its text, or the number of the conversation's text that it is.

    literal: whether these are a template's own words.
    """

    text: str
    in_loss: bool
    literal: bool
    source: str | int


def _strip(run: list[_RunPart], side: Literal[0, -1], cut: Callable[[str], str]) -> None:
    """Take white space off one side of a run."""
    while run:
        piece = run[side]
        rest = cut(piece.text)
        if rest == piece.text:
            return
        if rest:
            run[side] = piece._replace(text=rest, source=rest)
            return
        run.pop(side)


class _TokenRun(NamedTuple):
    """Tokens in a row: known, or a text to encode.

    ids: None where they depend on the conversation's texts. sources: what the text is put together
    from, see `_RunPart`. mixed: of each source whether it is learned, where they differ.
    silent: no tokens; the one before must predict an end that does not stand here.
    """

    ids: list[int] | None
    in_loss: bool
    begins: bool = False
    sources: tuple[str | int, ...] = ()
    mixed: tuple[bool, ...] = ()
    silent: bool = False


def _source(source: str | int, pieces: Sequence[Piece]) -> str:
    return source if isinstance(source, str) else pieces[source].text


def _filled(token_run: _TokenRun, pieces: Sequence[Piece]) -> str:
    """The text of a token run of a conversation."""
    if len(token_run.sources) == 1:
        return _source(token_run.sources[0], pieces)
    return "".join([_source(source, pieces) for source in token_run.sources])


def _joined(token_runs: Sequence[_TokenRun]) -> list[_TokenRun]:
    """The same token runs, known tokens that follow each other as one."""
    plan: list[_TokenRun] = []
    for token_run in token_runs:
        last = plan[-1] if plan else None
        alike = last is not None and last.in_loss == token_run.in_loss
        if last and alike and last.ids is not None and token_run.ids is not None:
            plan[-1] = last._replace(ids=last.ids + token_run.ids)
        else:
            plan.append(token_run)
    return plan


class _Chunk:
    """Conversations that are being encoded: runs of tokens, one behind the other."""

    def __init__(self) -> None:
        self.runs: list[list[int]] = []
        self.in_loss: list[bool] = []  # of each run
        self.starts: list[int] = [0]  # the number of runs in front of each conversation
        # Of silent ends that are learned: the runs in front of it, and in front of its conversation
        self.silent: list[tuple[int, int]] = []

    def add(self, ids: list[int], in_loss: bool) -> None:
        self.runs.append(ids)
        self.in_loss.append(in_loss)

    def examples(self) -> list[Example]:
        """An example for each conversation; all of them are views into two arrays."""
        stops = np.array([0, *accumulate(map(len, self.runs))], np.int64)
        ids = _int32(self.runs, int(stops[-1]))
        # What a token is learned for is said at the position before it, which predicts it.
        labels = np.zeros(len(ids), np.uint8)
        labels[:-1] = np.repeat(np.array(self.in_loss, np.uint8), np.diff(stops))[1:]
        borders = stops[self.starts]
        labels[borders[1:][np.diff(borders) > 0] - 1] = NO_TARGET
        for here, start in self.silent:
            at = int(stops[here]) - 1
            if at >= stops[start] and labels[at] == NO_TARGET:
                labels[at] = END_TOKEN
        places = borders.tolist()
        return [Example(ids[i:j], labels[i:j]) for i, j in pairwise(places)]


def _int32(rows: list[list[int]], count: int) -> np.ndarray:
    """All numbers of the rows as one array; `struct` is twice as fast at it as numpy."""
    ids = np.empty(count, np.int32)
    struct.pack_into(f"{count}i", ids.data, 0, *chain.from_iterable(rows))
    return ids


class Tokenizer:
    """Encodes pieces into ids and labels, and ids back into text."""

    def __init__(self, data: TokenizerData) -> None:
        from tokenizers import Tokenizer as FastTokenizer

        self.data = data
        spec = json.loads(data.tokenizer_json)
        spec.update(truncation=None, padding=None, post_processor=None)
        rest = without_dummy_prefix(spec)

        def build(s: dict[str, Any]) -> FastTokenizer:
            tokenizer = FastTokenizer.from_str(json.dumps(s))
            tokenizer.encode_special_tokens = True
            return tokenizer

        # Both know no special token. The first puts the dummy space in front, if there is one.
        self._begin = build(spec)
        self._within = self._begin if rest is spec else build(rest)
        self._each = prefixes_each(spec)
        self.vocab_size: int = self._begin.get_vocab_size(with_added_tokens=True)
        special = {t["content"]: t for t in spec["added_tokens"] if t["special"]}
        self.control_ids = frozenset(t["id"] for t in special.values())
        names = sorted(special, key=lambda t: (-len(t), t))
        self._control = re.compile("|".join(map(re.escape, names))) if names else None
        self._control_id = {name: int(t["id"]) for name, t in special.items()}
        # Special tokens that swallow the white space beside them.
        self._swallow_after = frozenset(t["id"] for t in special.values() if t["rstrip"])
        self._swallow_before = frozenset(t["id"] for t in special.values() if t["lstrip"])
        self._cuts = LineCuts(self._begin, self._within)
        self._literals: dict[tuple[str, bool], list[int]] = {}
        self._mark_parts: dict[str, list[str | int]] = {}
        self._plans: dict[tuple[object, ...], list[_TokenRun]] = {}

    @cached_property
    def _whole(self) -> Any:
        """The tokenizer that parses special tokens; worker processes never need it."""
        from tokenizers import Tokenizer as FastTokenizer

        spec = json.loads(self.data.tokenizer_json)
        spec.update(truncation=None, padding=None, post_processor=None)
        return FastTokenizer.from_str(json.dumps(spec))

    # -- encoding -------------------------------------------------------------------------------

    def mark(self, text: str, first: bool = False) -> list[int]:
        """Ids of a template's own words by themselves; special tokens in them are parsed."""
        pieces = [Piece("mark", text, cut=True)]
        return self._encode([pieces], self.data.eos_id, first)[0].ids.tolist()

    def text(self, text: str, first: bool = False) -> list[int]:
        """Ids of somebody's words; never a control token."""
        tokenizer = self._begin if first else self._within
        return tokenizer.encode(text, add_special_tokens=False).ids

    def reference(self, text: str) -> list[int]:
        """Ids of a rendered conversation as `apply_chat_template` gives them: the whole text in one
        call, whatever spells a special token in it parsed."""
        return self._whole.encode(text, add_special_tokens=False).ids

    def encode(self, pieces: Sequence[Piece], end_id: int) -> Example:
        """One rendered conversation to ids (T,) and labels (T,)."""
        return self.encode_many([pieces], end_id)[0]

    def encode_many(self, rendered: Iterable[Sequence[Piece]], end_id: int) -> list[Example]:
        """Many rendered conversations at once: one call of the tokenizer for all their texts."""
        return self._encode(rendered, end_id, True)

    def _encode(
        self, rendered: Iterable[Sequence[Piece]], end_id: int, first: bool
    ) -> list[Example]:
        chunk = _Chunk()
        # (run, text) of what is to be encoded, for each of the two tokenizers
        waiting: tuple[list[tuple[int, str]], list[tuple[int, str]]] = ([], [])
        for pieces in rendered:
            for token_run in self._plan(pieces, end_id, first):
                if token_run.ids is not None:
                    chunk.add(token_run.ids, token_run.in_loss)
                elif token_run.silent:
                    if token_run.in_loss:
                        chunk.silent.append((len(chunk.runs), chunk.starts[-1]))
                elif token_run.mixed:
                    self._mixed(token_run, pieces, chunk)
                else:
                    which = token_run.begins and self._begin is not self._within
                    waiting[which].append((len(chunk.runs), _filled(token_run, pieces)))
                    chunk.add([], token_run.in_loss)
            chunk.starts.append(len(chunk.runs))
        for tokenizer, some in zip((self._within, self._begin), waiting):
            texts = [text for _, text in some]
            found = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            for (run, _), encoding in zip(some, found):
                chunk.runs[run] = encoding.ids
        return chunk.examples()

    def _plan(self, pieces: Sequence[Piece], end_id: int, begins: bool) -> list[_TokenRun]:
        """How a conversation is encoded; made once for all that differ in nothing but their texts.

        White space at an end of a text decides where it may be cut from its neighbours: such a
        text belongs to the plan, which is not kept then.
        """
        shape: list[object] = [end_id, begins]
        kept = True
        for piece in pieces:
            kind, text, in_loss, cut = piece
            if kind != "text" or not text:
                shape.append(piece)
            else:
                shape.append((in_loss, cut))
                kept = kept and not (text[0].isspace() or text[-1].isspace())
        if not kept:
            return _joined(self._token_runs(pieces, end_id, begins))
        key = tuple(shape)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            plan = self._plans[key] = _joined(self._token_runs(pieces, end_id, begins))
        return plan

    def _token_runs(self, pieces: Sequence[Piece], end_id: int, begins: bool) -> list[_TokenRun]:
        """A conversation cut up into control tokens and runs.

        begins: whether the first run gets the dummy space.
        """
        token_runs: list[_TokenRun] = []
        run: list[_RunPart] = []

        def control(token_id: int, in_loss: bool) -> None:
            nonlocal begins
            self._close(run, begins, token_runs, token_id)
            token_runs.append(_TokenRun([token_id], in_loss))
            begins = self._each

        for n, (kind, text, in_loss, cut) in enumerate(pieces):
            if kind == "text" or kind == "mark":
                if cut and run:
                    self._close(run, begins, token_runs)
                    begins = False
                if kind == "text":
                    if text:
                        run.append(_RunPart(text, in_loss, False, n))
                    continue
                for part in self._parts(text):
                    if isinstance(part, int):
                        control(part, in_loss)
                    else:
                        run.append(_RunPart(part, in_loss, True, part))
            elif kind == "end":
                control(end_id, in_loss)
            elif kind == "bos":
                if self.data.bos_id is not None:
                    control(self.data.bos_id, in_loss)
                begins = True
            elif kind == "silent_end":
                if run:
                    self._close(run, begins, token_runs)
                    begins = False
                token_runs.append(_TokenRun(None, in_loss, silent=True))
        self._close(run, begins, token_runs)
        return token_runs

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
        run: list[_RunPart],
        begins: bool,
        token_runs: list[_TokenRun],
        control: int | None = None,
    ) -> None:
        """Make token runs of a run, and empty it. control: the control token that follows it."""
        if self._swallow_after or self._swallow_before:
            before = token_runs[-1].ids if token_runs else None
            if before and len(before) == 1 and before[0] in self._swallow_after:
                _strip(run, 0, str.lstrip)
            if control in self._swallow_before:
                _strip(run, -1, str.rstrip)
        held: list[_RunPart] = []
        last = ""

        def emit() -> None:
            nonlocal begins
            if held:
                token_runs.append(self._token_run(held, begins))
                begins = False
                held.clear()

        # A run may be cut behind the end of a line wherever that changes no token: what is a
        # template's own is then encoded once for all conversations.
        for piece in run:
            if last and self._cuts.between(last, piece.text):
                emit()
            if not piece.literal:
                held.append(piece)
            else:
                for n, line in enumerate(self._cuts.split(piece.text)):
                    if n:
                        emit()
                    held.append(piece._replace(text=line, source=line))
            last = piece.text
        emit()
        run.clear()

    def _token_run(self, held: Sequence[_RunPart], begins: bool) -> _TokenRun:
        flags = tuple(piece.in_loss for piece in held)
        ids = None
        if len(held) == 1 and held[0].literal:
            ids = self._literal(held[0].text, begins)
        mixed = flags if len(set(flags)) > 1 else ()
        return _TokenRun(ids, flags[0], begins, tuple(piece.source for piece in held), mixed)

    def _literal(self, text: str, begins: bool) -> list[int]:
        """Ids of words that many conversations share."""
        key = (text, begins)
        if key not in self._literals:
            self._literals[key] = self.text(text, begins)
        return self._literals[key]

    def _mixed(self, token_run: _TokenRun, pieces: Sequence[Piece], chunk: _Chunk) -> None:
        """A text of which a part is learned: a token counts as the part that it begins in."""
        tokenizer = self._begin if token_run.begins else self._within
        parts = [_source(source, pieces) for source in token_run.sources]
        encoding = tokenizer.encode("".join(parts), add_special_tokens=False)
        flags = [flag for part, flag in zip(parts, token_run.mixed) for _ in part]
        in_loss = (flags[min(start, len(flags) - 1)] for start, _ in encoding.offsets)
        for flag, group in groupby(zip(in_loss, encoding.ids), lambda pair: pair[0]):
            chunk.add([token_id for _, token_id in group], flag)

    # -- decoding -------------------------------------------------------------------------------

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens left out, as transformers' `skip_special_tokens` has it."""
        return self._whole.decode([int(i) for i in ids], skip_special_tokens=True)

    def spelled(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens among it."""
        return self._whole.decode([int(i) for i in ids], skip_special_tokens=False)

    def token(self, token_id: int) -> str:
        """The vocabulary's own spelling of an id, for display."""
        return self._begin.id_to_token(int(token_id)) or f"<{token_id}>"

    def token_id(self, token: str) -> int | None:
        """The id of a control token by name, or None where it is not one in this vocabulary."""
        found = self._begin.token_to_id(token)
        return found if found in self.control_ids else None
