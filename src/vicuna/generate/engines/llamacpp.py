"""The llama.cpp engine: a GGUF file of any quantisation, on the CPU or where the wheel computes.

The tree of `engines.base` lies in one cache. A row owns a sequence of it; rows that share tokens
share cells. The first row that grows from another takes over its sequence, a further one gets a
sequence that shares its cells, and a row that nothing grows from gives its sequence back. So the
prompt is there once, and no key or value is ever copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vicuna.errors import UserError
from vicuna.generate.engines.base import Cancelled, OutOfMemory, never
from vicuna.generate.engines.rows import check_rows
from vicuna.llamacpp.context import Context, Model
from vicuna.llamacpp.cores import physical_cores
from vicuna.llamacpp.library import complaint

# Tokens of a prompt computed by one call. llama.cpp asks within a call, too, whether to go on.
CHUNK = 512
# A model made for 131,072 tokens would take gigabytes for an empty cache.
LONGEST = 8192
_FULL, _STOPPED, _NO_MEMORY = 1, 2, -2


@dataclass(frozen=True, slots=True)
class _Node:
    """A token of the tree, and the one before it; None at the trunk's end."""

    token: int
    before: _Node | None


@dataclass(slots=True)
class _Row:
    """A live row: its sequence in the cache, and its tokens behind the trunk."""

    sequence: int
    tail: _Node | None = None


class LlamaCppEngine:
    """An `Engine` over a GGUF file.

    Args:
        path: the GGUF file.
        context_length: tokens that a prompt and its answer may have together; 0: what the model was
            made for, at most `LONGEST`.
        max_rows: rows that `step` takes at most.
        spare: from the context's length, how many tokens more the cache has room for: for rows that
            part early. With n beams (n - 1) times the longest answer is always enough.
        threads: that compute; 0: what `physical_cores` finds.
        cache_type: of keys and values: f16, f32 or q8_0.

    Raises: UserError where the wheel is missing, the file cannot be read, or the cache does not fit
        into memory.
    """

    def __init__(
        self,
        path: Path,
        context_length: int = 0,
        max_rows: int = 16,
        spare: Callable[[int], int] = lambda _: 0,
        threads: int = 0,
        cache_type: str = "f16",
    ) -> None:
        self._trunk: list[int] = []
        self._rows: list[_Row] = []
        self._free: list[int] = []  # sequences that no row owns
        self._depth = 0  # tokens of each row behind the trunk
        self._model = Model(path)
        self._adapters: dict[str, int] = {}
        self._wanted: tuple[tuple[int, float], ...] = ()
        self.path = path
        self.max_rows = max_rows
        self.threads = threads or physical_cores()
        self.trained_context = self._model.trained_context
        self.context_length = context_length or min(self.trained_context, LONGEST)
        self.computed = 0  # tokens computed so far, for tests and measurements
        cells = self.context_length + spare(self.context_length)
        try:
            self._context = Context(self._model, cells, max_rows, CHUNK, self.threads, cache_type)
        except MemoryError as e:
            self._model.close()
            raise UserError(
                f"no memory for a context of {cells} tokens ({e})",
                where=str(path),
                fix="Choose a smaller --context_length.",
            ) from e
        self._reset()

    # -- the interface of engines.base ----

    def prefill(self, prompt_ids: Sequence[int], cancel: Callable[[], bool] = never) -> Tensor:
        """See `Engine.prefill`. `cancel` is also asked while a piece of the prompt is computed."""
        prompt = list(prompt_ids)
        with self._whole_or_forgotten():
            sequence = self._keep_longest(prompt)
            for start in range(len(self._trunk), len(prompt), CHUNK):
                if cancel():
                    raise Cancelled
                self._read(prompt[start : start + CHUNK], sequence, cancel)
        return self._scores(1)[0]

    def step(self, token_ids: Sequence[int], parents: Sequence[int]) -> Tensor:
        """See `Engine.step`."""
        check_rows(token_ids, parents, len(self._rows), self.max_rows)
        with self._whole_or_forgotten():
            sequences = self._assign(parents)
            tails = [_Node(t, self._rows[p].tail) for t, p in zip(token_ids, parents)]
            self._rows = [_Row(s, tail) for s, tail in zip(sequences, tails)]
            self._depth += 1
            position = len(self._trunk) + self._depth - 1
            n = len(sequences)
            self._decode(token_ids, [position] * n, sequences, n)
        return self._scores(n)

    def forget(self) -> None:
        """Drop everything. The cache's memory stays: it is one block, made once."""
        self._context.clear()
        self._reset()

    # -- adapters, and the end ----

    def load_adapter(self, name: str, path: Path) -> None:
        """Load a GGUF LoRA beside the base under a name. It changes nothing until it is chosen.

        Raises: UserError where it does not fit the base.
        """
        if name not in self._adapters:
            self._adapters[name] = self._model.load_adapter(path)

    def drop_adapter(self, name: str) -> None:
        """Forget an adapter; none is chosen now. llama.cpp frees it with the model."""
        self.use_adapters({})
        del self._adapters[name]

    def use_adapters(self, mix: Mapping[str, float]) -> None:
        """Add these adapters to the base from now on, each scaled. What was read is forgotten.

        Args:
            mix: strength by name; empty: the base alone.

        Raises: UserError where no adapter of a name was loaded.
        """
        for name in mix:
            if name not in self._adapters:
                known = ", ".join(self._adapters) or "none"
                raise UserError(f"no adapter {name!r} is loaded", fix=f"Loaded: {known}.")
        wanted = tuple((self._adapters[name], strength) for name, strength in mix.items())
        if wanted == self._wanted:
            return
        self.forget()
        self._context.use_adapters(wanted)
        self._wanted = wanted

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text as llama.cpp's own tokenizer has them; to compare with ours."""
        return self._model.tokenize(text)

    def close(self) -> None:
        """Free weights, adapters and cache, now. The engine is of no use afterwards."""
        if hasattr(self, "_context"):
            self._context.close()
        self._model.close()

    def __enter__(self) -> LlamaCppEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the tree ----

    def _reset(self) -> None:
        self._trunk, self._rows, self._depth = [], [], 0
        self._free = list(range(self.max_rows))

    def _path(self, row: _Row) -> list[int]:
        """All tokens of a row, the trunk's included."""
        tail: list[int] = []
        node = row.tail
        while node is not None:
            tail.append(node.token)
            node = node.before
        return self._trunk + tail[::-1]

    def _keep_longest(self, prompt: list[int]) -> int:
        """Keep of the tree only the longest path that `prompt` begins with, as the new trunk.

        Returns: the sequence that holds it.
        """
        best, length = None, 0
        for row in self._rows:
            # The last token is always computed: its scores are what is asked for.
            common = min(_common(self._path(row), prompt), len(prompt) - 1)
            if best is None or common > length:
                best, length = row, common
        if best is None or not length:
            return self._start([], 0)
        for row in self._rows:
            if row is not best:
                self._context.remove(row.sequence)
        if not self._context.remove(best.sequence, length):
            return self._start([], 0)  # a recurrent state knows no way back
        return self._start(prompt[:length], best.sequence)

    def _start(self, trunk: list[int], sequence: int) -> int:
        """Begin a tree: `trunk` is what the sequence holds already."""
        if trunk:
            self._reset()
        else:
            self.forget()
        self._free.remove(sequence)
        self._trunk, self._rows = trunk, [_Row(sequence)]
        return sequence

    def _assign(self, parents: Sequence[int]) -> list[int]:
        """A sequence for each new row; those of rows that nothing grows from become free."""
        growing = set(parents)
        for i, row in enumerate(self._rows):
            if i not in growing:
                self._context.remove(row.sequence)
                self._free.append(row.sequence)
        inherited: set[int] = set()
        sequences = []
        for parent in parents:
            sequence = self._rows[parent].sequence
            if parent in inherited:
                twin = self._free.pop()
                self._context.copy(sequence, twin)
                sequence = twin
            inherited.add(parent)
            sequences.append(sequence)
        return sequences

    # -- computing ----

    def _read(self, piece: list[int], sequence: int, cancel: Callable[[], bool]) -> None:
        """Append a piece of the prompt to the trunk; the scores after its last token."""
        start = len(self._trunk)
        positions = range(start, start + len(piece))
        try:
            self._decode(piece, positions, [sequence] * len(piece), 1, cancel)
        except Cancelled:
            self._context.remove(sequence, start)
            raise
        self._trunk += piece

    def _decode(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[int],
        scored: int,
        stop: Callable[[], bool] | None = None,
    ) -> None:
        code = self._context.decode(tokens, positions, sequences, scored, stop)
        if code == _STOPPED:
            raise Cancelled
        if code == _FULL:
            raise OutOfMemory(f"the cache of {self._context.cells} tokens is full")
        if code == _NO_MEMORY:
            raise OutOfMemory(complaint())
        if code:
            raise RuntimeError(f"llama_decode failed with {code}: {complaint()}")
        self.computed += len(tokens)

    def _scores(self, rows: int) -> Tensor:
        """Scores (rows, V) of the last call: llama.cpp's own memory, not a copy."""
        return torch.from_numpy(self._context.scores(rows))

    @contextmanager
    def _whole_or_forgotten(self) -> Iterator[None]:
        """A change of the tree that fails, or that Ctrl-C stops half way, leaves no tree at all."""
        try:
            yield
        except Cancelled:
            raise
        except BaseException:
            self.forget()
            raise


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest prefix that both have."""
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return min(len(a), len(b))
