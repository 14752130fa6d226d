"""llama.cpp's two objects: a model (the weights), and a context over it (cache and computation)."""

from __future__ import annotations

import ctypes as c
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vicuna.errors import UserError
from vicuna.llamacpp.library import (
    FLASH,
    TYPES,
    Abort,
    Batch,
    ContextParams,
    complaint,
    library,
    other_version,
)
from vicuna.weights.headers import check_gguf


class Model:
    """The weights of a GGUF file, mapped into memory, and the adapters loaded beside them.

    Raises: UserError where llama.cpp cannot load the file.
    """

    def __init__(self, path: Path) -> None:
        self._lib = library()
        check_gguf(path)
        params = self._lib.llama_model_default_params()
        params.n_gpu_layers = -1  # all, if the library computes on a GPU
        self.pointer = self._lib.llama_model_load_from_file(str(path).encode(), params)
        if not self.pointer:
            raise UserError(
                "llama.cpp cannot load this file: {complaint}",
                complaint=complaint(),
                where=str(path),
                fix="It may be damaged, or of an architecture that this version does not know.",
            )
        self._vocabulary = self._lib.llama_model_get_vocab(self.pointer)
        self.vocabulary_size = int(self._lib.llama_vocab_n_tokens(self._vocabulary))

    @property
    def trained_context(self) -> int:
        """Positions the model was made for."""
        return int(self._lib.llama_model_n_ctx_train(self.pointer))

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, as llama.cpp itself would encode it: no special tokens, no BOS."""
        data = text.encode()
        room = (c.c_int32 * (len(data) + 8))()
        found = self._lib.llama_tokenize(
            self._vocabulary, data, len(data), room, len(room), False, False
        )
        return list(room[:found])

    def load_adapter(self, path: Path) -> int:
        """A GGUF LoRA, as a pointer. The model frees it.

        Raises: UserError where it does not fit this model.
        """
        check_gguf(path)
        adapter = self._lib.llama_adapter_lora_init(self.pointer, str(path).encode())
        if not adapter:
            raise UserError(
                "llama.cpp cannot load this adapter: {complaint}",
                complaint=complaint(),
                where=str(path),
                fix="Use the base it was trained on.",
            )
        return int(adapter)

    def close(self) -> None:
        """Free the weights and all adapters, now. May be called twice."""
        if self.pointer:
            self._lib.llama_model_free(self.pointer)
            self.pointer = None


class Context:
    """A cache of keys and values over a model, shared by all its sequences, and what computes.

    Args:
        cells: tokens that all sequences have room for together; one that several sequences share
            counts once.
        rows: sequences at most, and logits a call.
        batch: tokens a call at most.
        threads: that compute.
        cache_type: of keys and values, a name in `TYPES`.

    Raises: MemoryError where there is no room for the cache.
    """

    def __init__(
        self, model: Model, cells: int, rows: int, batch: int, threads: int, cache_type: str
    ) -> None:
        self._lib, self._model = library(), model
        self._batch = _Arrays(batch)
        self._stop: Callable[[], bool] = lambda: False
        self._raised: BaseException | None = None
        self._abort = Abort(self._ask)
        params = self._params(cells, rows, batch, threads, cache_type)
        self.pointer = self._lib.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            raise MemoryError(complaint())
        self._memory = self._lib.llama_get_memory(self.pointer)
        if self._lib.llama_n_seq_max(self.pointer) != rows:
            raise other_version("sequences were not taken over")

    def _params(
        self, cells: int, rows: int, batch: int, threads: int, cache_type: str
    ) -> ContextParams:
        params: ContextParams = self._lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = cells, rows
        params.n_batch, params.n_ubatch = batch, min(batch, params.n_ubatch)
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = TYPES[cache_type]
        params.flash_attn_type = FLASH[cache_type]
        params.kv_unified = True  # else a fork copies keys and values
        return params

    @property
    def cells(self) -> int:
        """Tokens there is room for: what was asked for, rounded up by llama.cpp."""
        return int(self._lib.llama_n_ctx(self.pointer))

    def clear(self) -> None:
        """Empty all sequences."""
        self._lib.llama_memory_clear(self._memory, False)

    def copy(self, source: int, target: int) -> None:
        """Let `target`, an empty sequence, share all tokens of `source`. No data is copied."""
        self._lib.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def remove(self, sequence: int, start: int = -1) -> bool:
        """Take the tokens from position `start` on, or all, out of a sequence.

        Returns: False where this kind of model cannot forget a part (then nothing was done).
        """
        return bool(self._lib.llama_memory_seq_rm(self._memory, sequence, start, -1))

    def use_adapters(self, adapters: Sequence[tuple[int, float]]) -> None:
        """Add these adapters, each with its scale, to the base from now on."""
        pointers = (c.c_void_p * len(adapters))(*(a for a, _ in adapters))
        scales = (c.c_float * len(adapters))(*(s for _, s in adapters))
        self._lib.llama_set_adapters_lora(self.pointer, pointers, len(adapters), scales)

    def decode(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[int],
        outputs: int,
        stop: Callable[[], bool] | None = None,
    ) -> int:
        """Compute tokens, each at its position of its sequence, and the logits after the last ones.

        Args:
            outputs: how many of the last tokens get logits.
            stop: asked while it computes; once true, the call ends early.

        Returns: 0; 1 where the cache is full; 2 where `stop` said so; below 0 after a failure.
        """
        batch = self._batch.fill(tokens, positions, sequences, outputs)
        if stop is None:
            return int(self._lib.llama_decode(self.pointer, batch))
        self._stop, self._raised = stop, None
        # Set for this call only: it is asked hundreds of times, which a single token would feel.
        self._lib.llama_set_abort_callback(self.pointer, self._abort, None)
        try:
            code = int(self._lib.llama_decode(self.pointer, batch))
        finally:
            self._lib.llama_set_abort_callback(self.pointer, Abort(), None)
        if self._raised is not None:
            raise self._raised
        return code

    def _ask(self, _: Any) -> bool:
        """llama.cpp's question whether to stop. An exception here (Ctrl-C) is raised afterwards."""
        try:
            return self._stop()
        except BaseException as e:
            self._raised = e
            return True

    def logits(self, rows: int) -> np.ndarray:
        """Logits of the last call (rows, V), float32: a view that the next call overwrites."""
        pointer = self._lib.llama_get_logits(self.pointer)
        return np.ctypeslib.as_array(pointer, shape=(rows, self._model.vocabulary_size))

    def close(self) -> None:
        """Free the cache, now. May be called twice."""
        if self.pointer:
            self._lib.llama_free(self.pointer)
            self.pointer = None


class _Arrays:
    """The arrays of a batch, made once."""

    def __init__(self, size: int) -> None:
        self._token, self._pos = (c.c_int32 * size)(), (c.c_int32 * size)()
        self._count = (c.c_int32 * size)(*([1] * size))
        self._sequence = (c.c_int32 * size)()
        self._logits = (c.c_int8 * size)()
        step = c.sizeof(c.c_int32)
        first = c.addressof(self._sequence)
        at = (c.cast(first + i * step, c.POINTER(c.c_int32)) for i in range(size))
        self._sequences = (c.POINTER(c.c_int32) * size)(*at)

    def fill(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[int],
        outputs: int,
    ) -> Batch:
        n = len(tokens)
        self._token[:n], self._pos[:n] = list(tokens), list(positions)
        self._sequence[:n] = list(sequences)
        self._logits[:n] = [c.c_int8(i >= n - outputs) for i in range(n)]
        return Batch(
            n, self._token, None, self._pos, self._count, self._sequences, self._logits
        )  # fmt: skip
