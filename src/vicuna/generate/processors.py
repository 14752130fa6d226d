"""What changes the logits of a step, depending on what each branch has said.

A processor keeps what it must know of each row in a form that forks cheaply: small tensors that are
gathered by parents, or linked cells that share their past. The order is that of transformers'
`generate`: bias, repetition, frequency and presence, n-grams, banned words, minimum length.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from vicuna.data.tokenizer import Tokenizer
from vicuna.errors import SettingsError
from vicuna.generate.settings import Settings
from vicuna.generate.stream import token_bytes
from vicuna.messages import Message


class Processor(Protocol):
    """Changes logits; knows what each row has said."""

    def __call__(self, logits: Tensor) -> Tensor:
        """Change logits (n, V) in place or anew."""
        ...

    def advance(self, parents: Sequence[int], token_ids: Sequence[int], /) -> None:
        """Go on to new rows: each grows from a row of before by a token."""
        ...


class Processors:
    """All processors that the settings ask for, in order; false where there are none.

    Args:
        prompt_ids: count as said for repetition and n-grams, as in transformers; not for
            frequency and presence, as in OpenAI's API.
        end_ids: what `min_new_tokens` forbids at first.

    Raises: SettingsError where tokens are named that the vocabulary does not have.
    """

    def __init__(
        self,
        settings: Settings,
        prompt_ids: Sequence[int],
        end_ids: Collection[int],
        tokenizer: Tokenizer,
    ) -> None:
        s = settings
        self._all: list[Processor] = []
        if s.logit_bias:
            self._all.append(Bias(_biases(s, tokenizer)))
        if s.repetition_penalty != 1:
            self._all.append(Repetition(s.repetition_penalty, prompt_ids))
        if s.frequency_penalty or s.presence_penalty:
            self._all.append(Frequency(s.frequency_penalty, s.presence_penalty))
        if s.no_repeat_ngram_size:
            self._all.append(NoRepeat(s.no_repeat_ngram_size, prompt_ids))
        if s.banned_words:
            self._all.append(Banned(s.banned_words, token_bytes(tokenizer).all()))
        if s.min_new_tokens and end_ids:
            self._all.append(MinLength(s.min_new_tokens, end_ids))

    def __bool__(self) -> bool:
        return bool(self._all)

    @torch.inference_mode()
    def __call__(self, logits: Tensor) -> Tensor:
        """Changed logits (n, V); those given stay as they are."""
        if self._all:
            logits = logits.clone()
        for processor in self._all:
            logits = processor(logits)
        return logits

    @torch.inference_mode()
    def advance(self, parents: Sequence[int], token_ids: Sequence[int]) -> None:
        for processor in self._all:
            processor.advance(parents, token_ids)


def token_of(token: int | str, tokenizer: Tokenizer) -> int | None:
    """The id of a token given by its id or its spelling; None where there is no such token."""
    if isinstance(token, int) or token.isdecimal():
        return int(token) if 0 <= int(token) < tokenizer.vocab_size else None
    ids = tokenizer.mark(token)
    return ids[0] if len(ids) == 1 else None


def tokens_of(tokens: Sequence[int | str], tokenizer: Tokenizer, setting: str) -> list[int]:
    """The ids of tokens given by id or spelling.

    Raises: SettingsError naming all that are not one token of the vocabulary.
    """
    found = [token_of(t, tokenizer) for t in tokens]
    wrong = [
        Message(
            "{setting}: {value!r} is not one token of this vocabulary of {vocab_size}",
            setting=setting,
            value=t,
            vocab_size=tokenizer.vocab_size,
        )
        for t, i in zip(tokens, found)
        if i is None
    ]
    if wrong:
        raise SettingsError(wrong)
    return [i for i in found if i is not None]


def _biases(settings: Settings, tokenizer: Tokenizer) -> dict[int, float]:
    ids = tokens_of(list(settings.logit_bias), tokenizer, "logit_bias")
    return dict(zip(ids, settings.logit_bias.values()))


class Bias:
    """Adds a number to the logits of some tokens (`logit_bias` of OpenAI's API)."""

    def __init__(self, biases: dict[int, float]) -> None:
        self._biases = biases
        self._row: Tensor | None = None  # (V,)

    def __call__(self, logits: Tensor) -> Tensor:
        if self._row is None:
            self._row = torch.zeros_like(logits[0])
            for token_id, bias in self._biases.items():
                if token_id < len(self._row):
                    self._row[token_id] += bias
        return logits.add_(self._row)

    def advance(self, parents: Sequence[int], token_ids: Sequence[int]) -> None:
        """Nothing depends on what was said."""


class Repetition:
    """Repetition penalty of CTRL (Keskar et al. 2019, arXiv 1909.05858): of tokens in the prompt
    or the answer so far, positive logits are divided by it and negative ones multiplied."""

    def __init__(self, penalty: float, prompt_ids: Sequence[int]) -> None:
        self._penalty = penalty
        self._prompt = sorted(set(prompt_ids))
        self._factors: Tensor | None = None  # (n, V): the penalty where a row has the token, else 1

    def __call__(self, logits: Tensor) -> Tensor:
        if self._factors is None:
            self._factors = torch.ones_like(logits)
            # An embedding may have more rows than there are logits.
            known = [i for i in self._prompt if i < logits.shape[1]]
            self._factors[:, known] = self._penalty
        # Sums instead of torch.where, which is several times slower.
        positive = logits.clamp(min=0).div_(self._factors)
        return logits.clamp_(max=0).mul_(self._factors).add_(positive)

    def advance(self, parents: Sequence[int], token_ids: Sequence[int]) -> None:
        assert self._factors is not None
        self._factors = _gathered(self._factors, parents)
        self._factors[range(len(token_ids)), list(token_ids)] = self._penalty


class Frequency:
    """Frequency and presence penalty as OpenAI's API defines them: off the score of a token goes
    frequency times its count in the answer, and presence where it is in the answer at all."""

    def __init__(self, frequency: float, presence: float) -> None:
        self._frequency, self._presence = frequency, presence
        self._counts: Tensor | None = None  # float (n, V)

    def __call__(self, logits: Tensor) -> Tensor:
        if self._counts is None:
            self._counts = torch.zeros_like(logits)
        if self._frequency:
            logits.sub_(self._counts, alpha=self._frequency)
        if self._presence:
            logits.sub_(self._counts.clamp(max=1), alpha=self._presence)
        return logits

    def advance(self, parents: Sequence[int], token_ids: Sequence[int]) -> None:
        assert self._counts is not None
        self._counts = _gathered(self._counts, parents)
        self._counts[range(len(token_ids)), list(token_ids)] += 1


def _gathered(state: Tensor, parents: Sequence[int]) -> Tensor:
    """The rows of the parents; the same tensor where each row goes on by itself."""
    if list(parents) == list(range(len(state))):
        return state
    return state.index_select(0, torch.tensor(parents, device=state.device))


class _Cell:
    """A token of a branch: its last n - 1 tokens, and a link that makes ancestors quick to find.

    `jump` skips back so that an ancestor at any depth is found in O(log depth) links (Myers 1983,
    "An applicative random-access stack").
    """

    __slots__ = ("depth", "jump", "parent", "suffix", "token_id")

    def __init__(self, parent: _Cell | None, token_id: int, suffix: tuple[int, ...]) -> None:
        self.parent, self.token_id, self.suffix = parent, token_id, suffix
        self.depth: int = parent.depth + 1 if parent else 0
        self.jump: _Cell = self
        if parent is not None:
            far = parent.jump
            even = parent.depth - far.depth == far.depth - far.jump.depth
            self.jump = far.jump if even else parent

    def ancestor(self, depth: int) -> _Cell:
        """The cell of this branch at a depth, at most its own."""
        cell = self
        while cell.depth > depth:
            assert cell.parent is not None
            cell = cell.jump if cell.jump.depth >= depth else cell.parent
        return cell


class NoRepeat:
    """No n tokens in a row stand twice in prompt and answer (Paulus et al. 2017, arXiv 1705.04304).

    The branches' tokens form a tree. A table says which cells follow each n - 1 tokens anywhere in
    it; those on a row's own branch name the tokens that it may not say now.
    """

    def __init__(self, size: int, prompt_ids: Sequence[int]) -> None:
        self._known = size - 1  # tokens that decide which are forbidden
        self._in_prompt: dict[tuple[int, ...], set[int]] = {}
        self._in_tree: dict[tuple[int, ...], list[_Cell]] = {}
        prompt = list(prompt_ids)
        for end in range(self._known, len(prompt)):
            before = tuple(prompt[end - self._known : end])
            self._in_prompt.setdefault(before, set()).add(prompt[end])
        self._rows = [_Cell(None, -1, tuple(prompt[max(0, len(prompt) - self._known) :]))]
        if not self._known:
            self._rows[0].suffix = ()

    def __call__(self, logits: Tensor) -> Tensor:
        rows: list[int] = []
        ids: list[int] = []
        for row, cell in enumerate(self._rows):
            banned = self._banned(cell)
            rows += [row] * len(banned)
            ids += banned
        if ids:
            logits[rows, ids] = -math.inf
        return logits

    def _banned(self, cell: _Cell) -> list[int]:
        if len(cell.suffix) < self._known:
            return []
        banned = list(self._in_prompt.get(cell.suffix, ()))
        for other in self._in_tree.get(cell.suffix, ()):
            if other.depth <= cell.depth and cell.ancestor(other.depth) is other:
                banned += [other.token_id]
        return banned

    def advance(self, parents: Sequence[int], token_ids: Sequence[int]) -> None:
        self._rows = [self._grown(self._rows[p], t) for p, t in zip(parents, token_ids)]

    def _grown(self, cell: _Cell, token_id: int) -> _Cell:
        grown = (*cell.suffix, token_id)
        suffix = grown[len(grown) - self._known :] if len(grown) > self._known else grown
        new = _Cell(cell, token_id, suffix)
        if len(cell.suffix) == self._known:
            self._in_tree.setdefault(cell.suffix, []).append(new)
        return new


class Banned:
    """Texts that no answer contains, however they are cut into tokens.

    A token is forbidden where it holds a banned text, or where it completes one that the branch has
    begun: where the branch ends with its first i bytes and the token begins with the others. Bytes
    instead of characters, because a token may hold a part of a character.
    """

    def __init__(self, words: Sequence[str], spelled: Sequence[bytes]) -> None:
        self._words = [w.encode() for w in words]
        self._longest = max(map(len, self._words))
        order = sorted((i for i, s in enumerate(spelled) if s), key=spelled.__getitem__)
        self._order = torch.tensor(order)
        self._sorted = [spelled[i] for i in order]
        self._spelled = spelled
        inside = [i for i, s in enumerate(spelled) if any(w in s for w in self._words)]
        self._inside = torch.tensor(inside, dtype=torch.long)
        self._beginning: dict[bytes, Tensor] = {}
        self._tails = [b""]

    def __call__(self, logits: Tensor) -> Tensor:
        _forbid(logits, self._inside)
        for row, tail in enumerate(self._tails):
            for rest in self._missing(tail):
                _forbid(logits[row : row + 1], self._begin(rest))
        return logits

    def _missing(self, tail: bytes) -> set[bytes]:
        """What would complete a banned text behind `tail`."""
        return {
            word[begun:]
            for word in self._words
            for begun in range(1, len(word))
            if tail.endswith(word[:begun])
        }

    def _begin(self, prefix: bytes) -> Tensor:
        """The tokens whose bytes begin with `prefix`."""
        if prefix not in self._beginning:
            first = bisect_left(self._sorted, prefix)
            last = bisect_right(self._sorted, prefix, lo=first, key=lambda s: s[: len(prefix)])
            self._beginning[prefix] = self._order[first:last]
        return self._beginning[prefix]

    def advance(self, parents: Sequence[int], token_ids: Sequence[int]) -> None:
        keep = self._longest - 1
        spelled = [self._spelled[t] if t < len(self._spelled) else b"" for t in token_ids]
        said = [self._tails[p] + s for p, s in zip(parents, spelled)]
        self._tails = [s[max(0, len(s) - keep) :] for s in said]


class MinLength:
    """No end token among the first tokens of an answer."""

    def __init__(self, tokens: int, end_ids: Collection[int]) -> None:
        self._left = tokens
        self._ends = torch.tensor(sorted(end_ids))

    def __call__(self, logits: Tensor) -> Tensor:
        if self._left > 0:
            _forbid(logits, self._ends)
        return logits

    def advance(self, _parents: Sequence[int], _token_ids: Sequence[int], /) -> None:
        self._left -= 1


def _forbid(logits: Tensor, ids: Tensor) -> None:
    """Set the logits of some tokens to -inf; a tokenizer may know more than the model logits."""
    logits.index_fill_(1, ids[ids < logits.shape[1]].to(logits.device), -math.inf)
