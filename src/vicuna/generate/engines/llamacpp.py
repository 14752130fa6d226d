"""The llama.cpp engine: a GGUF file of any quantisation, on the CPU or where the wheel computes.

The tree of `engines.base` lies in one cache. A row owns a sequence of it; rows that share tokens
share cells. The first row that grows from another takes over its sequence, a further one gets a
sequence that shares its cells, and a row that nothing grows from gives its sequence back. So the
prompt is there once, and no key or value is ever copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vicuna.config import AnswerSettings
from vicuna.config.precisions import PRECISIONS
from vicuna.errors import UserError
from vicuna.generate.engines.base import (
    CHUNK,
    Cancelled,
    Engine,
    OutOfMemory,
    check_adapter,
    check_loaded,
    check_rows,
    common_prefix,
    never,
    refuse_setting,
    reset_on_failure,
)
from vicuna.llamacpp.context import Context, Model
from vicuna.llamacpp.cores import physical_cores
from vicuna.llamacpp.library import complaint, library
from vicuna.model import adapter_fit
from vicuna.model.adapter import AdapterFiles
from vicuna.model.base import EMBEDDED, locate, locate_gguf, locate_vocabulary
from vicuna.model.config_files import read_config

# A model made for 131,072 tokens would take gigabytes for an empty cache.
LONGEST = 8192
_FULL, _STOPPED, _NO_MEMORY = 1, 2, -2


@dataclass(frozen=True, slots=True)
class _Node:
    """A token of the tree, and the one before it; None at the prompt's end."""

    token: int
    before: _Node | None


@dataclass(slots=True)
class _Row:
    """A live row: its sequence in the cache, and its tokens behind the prompt."""

    sequence: int
    tail: _Node | None = None


def load_engine(
    base: str, settings: AnswerSettings, files: AdapterFiles | None
) -> tuple[Engine, Path]:
    """An engine over a base, written as GGUF if need be: `base.load_engine` for "llama.cpp".

    A GGUF file that the user names is used as it is unless a precision is asked for; a folder is
    written as GGUF once. So is the embedded base: its own file, of 4 bits, is only how it travels,
    and llama.cpp would give other answers from it than torch does.
    """
    refuse_setting(settings, "device_map", "llama.cpp places the layers itself")
    library()  # a missing wheel is reported before a base is converted
    gguf = locate_gguf(base)
    if gguf is not None and settings.precision == "auto" and base != EMBEDDED:
        folder, about = locate_vocabulary(base), f"{gguf.name} as it is"
        check_adapter(files, base, folder, settings)
    else:
        auto = settings.precision == "auto"
        gguf_type = "f16" if auto else PRECISIONS[settings.precision].gguf
        if not gguf_type:
            raise UserError(
                "llama.cpp has no {precision}",
                precision=settings.precision,
                where="precision",
                fix="Use auto, fp32, bf16, fp16 or int8 (q8_0), or a .gguf file of a 4-bit type.",
            )
        from vicuna.export.gguf_cache import base_file

        folder, about = locate(base), f"{base} in {gguf_type.upper()}"
        gguf = base_file(folder, gguf_type)
        check_adapter(files, base, folder, settings)
    # Filters and penalties are torch's. Its threads would spin between two of them, on the cores
    # that llama.cpp computes on; a few rows of logits need no more than one.
    torch.set_num_threads(1)
    further = max(settings.num_beams, settings.num_return_sequences) - 1
    engine = LlamaCppEngine(
        gguf,
        context_length=settings.context_length,
        spare=lambda context: further * min(settings.max_new_tokens, context),
        threads=settings.threads,
        cache_type="f16" if settings.cache_type == "auto" else settings.cache_type,
        folder=folder,
    )
    many = "" if engine.threads == 1 else "s"
    engine.about = (
        f"llama.cpp: {about}, {engine.threads} thread{many}, a context of {engine.context_length} "
        f"tokens (the model was made for {engine.trained_context})"
    )
    return engine, folder


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
        folder: with the base's config.json, to convert adapters.

    Raises: UserError if the wheel is missing, the file cannot be read, or the cache does not fit
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
        folder: Path | None = None,
    ) -> None:
        self._prompt: list[int] = []
        self._rows: list[_Row] = []
        self._free: list[int] = []  # sequences that no row owns
        self._depth = 0  # tokens of each row behind the prompt
        self._model = Model(path)
        self._folder = folder
        self.about = ""
        self._adapters: dict[str, int] = {}
        self._in_use: tuple[tuple[int, float], ...] = ()
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
                "no memory for a context of {cells} tokens ({error})",
                cells=cells,
                error=e,
                where=str(path),
                fix="Choose a smaller --context_length.",
            ) from e
        self._clear_rows()

    # -- the interface of engines.base ----

    def prefill(self, prompt_ids: Sequence[int], cancel: Callable[[], bool] = never) -> Tensor:
        """As `Engine.prefill`; `cancel` is asked within a chunk, too."""
        prompt = list(prompt_ids)
        with reset_on_failure(self):
            sequence = self._keep_longest(prompt)
            for start in range(len(self._prompt), len(prompt), CHUNK):
                if cancel():
                    raise Cancelled
                self._read(prompt[start : start + CHUNK], sequence, cancel)
        return self._logits(1)[0]

    def step(self, token_ids: Sequence[int], parents: Sequence[int]) -> Tensor:
        check_rows(token_ids, parents, len(self._rows), self.max_rows)
        with reset_on_failure(self):
            sequences = self._assign(parents)
            tails = [_Node(t, self._rows[p].tail) for t, p in zip(token_ids, parents)]
            self._rows = [_Row(s, tail) for s, tail in zip(sequences, tails)]
            self._depth += 1
            position = len(self._prompt) + self._depth - 1
            n = len(sequences)
            self._decode(token_ids, [position] * n, sequences, n)
        return self._logits(n)

    def reset(self) -> None:
        """Drop everything. The cache's memory stays: it is one block, made once."""
        self._context.clear()
        self._clear_rows()

    # -- adapters, and the end ----

    def load_adapter(self, name: str, files: AdapterFiles | Path) -> None:
        """Load an adapter beside the base.

        Args:
            files: an adapter, which is converted once into a GGUF LoRA in the cache; or the path of
                a GGUF LoRA.

        Raises: UserError if it does not fit the base.
        """
        if name in self._adapters:
            return
        path = files if isinstance(files, Path) else self._converted(files)
        self._adapters[name] = self._model.load_adapter(path)

    def _converted(self, files: AdapterFiles) -> Path:
        from vicuna.export.gguf_cache import adapter_file

        assert self._folder is not None, "an engine over a bare GGUF file takes GGUF LoRAs"
        # Without weights in the folder a GGUF file is the base: llama.cpp compares the shapes.
        if any(self._folder.glob("*.safetensors")):
            adapter_fit.check_weights(files, self._folder)
        return adapter_file(files, read_config(self._folder))

    def drop_adapter(self, name: str) -> None:
        """Forget an adapter. llama.cpp frees its memory only with the model."""
        self.use_adapters({})
        del self._adapters[name]

    def use_adapters(self, mix: Mapping[str, float]) -> None:
        check_loaded(mix, self._adapters)
        in_use = tuple((self._adapters[name], strength) for name, strength in mix.items())
        if in_use == self._in_use:
            return
        self.reset()
        self._context.use_adapters(in_use)
        self._in_use = in_use

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

    def _clear_rows(self) -> None:
        self._prompt, self._rows, self._depth = [], [], 0
        self._free = list(range(self.max_rows))

    def _path(self, row: _Row) -> list[int]:
        """All tokens of a row, the prompt's included."""
        tail: list[int] = []
        node = row.tail
        while node is not None:
            tail.append(node.token)
            node = node.before
        return self._prompt + tail[::-1]

    def _keep_longest(self, prompt: list[int]) -> int:
        """Keep of the tree only the longest path that `prompt` begins with, as the new prompt.

        Returns: the sequence that holds it.
        """
        best, length = None, 0
        for row in self._rows:
            # The last token is always computed: its logits are what is asked for.
            common = min(common_prefix(self._path(row), prompt), len(prompt) - 1)
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

    def _start(self, prompt: list[int], sequence: int) -> int:
        """Begin a tree: `prompt` is what the sequence holds already."""
        if prompt:
            self._clear_rows()
        else:
            self.reset()
        self._free.remove(sequence)
        self._prompt, self._rows = prompt, [_Row(sequence)]
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
        """Append a piece of the prompt to the prompt; the logits after its last token."""
        start = len(self._prompt)
        positions = range(start, start + len(piece))
        try:
            self._decode(piece, positions, [sequence] * len(piece), 1, cancel)
        except Cancelled:
            self._context.remove(sequence, start)
            raise
        self._prompt += piece

    def _decode(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[int],
        outputs: int,
        stop: Callable[[], bool] | None = None,
    ) -> None:
        code = self._context.decode(tokens, positions, sequences, outputs, stop)
        if code == _STOPPED:
            raise Cancelled
        if code == _FULL:
            raise OutOfMemory(f"the cache of {self._context.cells} tokens is full")
        if code == _NO_MEMORY:
            raise OutOfMemory(complaint())
        if code:
            raise RuntimeError(f"llama_decode failed with {code}: {complaint()}")
        self.computed += len(tokens)

    def _logits(self, rows: int) -> Tensor:
        """Logits (rows, V) of the last call: llama.cpp's own memory, not a copy."""
        return torch.from_numpy(self._context.logits(rows))
