"""The worker as a process: started in its environment, watched, its failures told in words."""

from __future__ import annotations

import json
import os
import subprocess
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Thread
from typing import IO, Any

import numpy as np

from vicuna.errors import UserError
from vicuna.files import scratch_folder
from vicuna.interrupts import children_spared
from vicuna.quantize import worker

Progress = Callable[[int, int], None]
_TAIL = 40  # lines of the library's own words that are kept for the log of a failure


def quantize(python: Path, job: dict[str, Any], progress: Progress) -> None:
    """Quantise a folder.

    Args:
        job: see `worker.py`.
        progress: told how many layers are done, of how many.

    Raises: UserError in the library's words.
    """
    with _Worker(python, "quantize", job, progress) as running:
        running.finish()


class QuantizedLogits:
    """The logits of a quantized folder, computed in gptqmodel's environment."""

    def __init__(self, python: Path, model: Path, method: str) -> None:
        self._python, self._job = python, {"model": str(model), "method": method}

    def logits(self, texts: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """Logits (T, V) of each text in turn, float32."""
        job = {**self._job, "texts": [list(ids) for ids in texts]}
        with _Worker(self._python, "scores", job, lambda _done, _of: None) as running:
            for _ in texts:
                rows, columns = np.frombuffer(running.read(16), np.int64)
                data = running.read(int(rows * columns) * 4)
                yield np.frombuffer(data, np.float32).reshape(rows, columns)
            running.finish()

    def answer(self, prompt: Sequence[int], ends: Sequence[int], longest: int) -> list[int]:
        """The ids of the most likely answer, at most `longest`, without the one that ends it."""
        job = {**self._job, "prompt": list(prompt), "ends": list(ends), "longest": longest}
        with _Worker(self._python, "answer", job, lambda _done, _of: None) as running:
            ids = np.frombuffer(running.rest(), np.int64).tolist()
            running.finish()
        return ids[:-1] if ids and ids[-1] in ends else ids


class _Worker:
    """One run of the worker. Leaving early ends it."""

    def __init__(self, python: Path, task: str, job: dict[str, Any], progress: Progress) -> None:
        self._progress, self._tail = progress, deque[str](maxlen=_TAIL)
        self._error, self._layers = "", 0
        self._folder = scratch_folder("job")
        path = Path(self._folder.name) / "job.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        with children_spared():  # it is ended from here
            self._process = subprocess.Popen(
                [str(python), worker.__file__, task, str(path)],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                env=_environment(), cwd=self._folder.name,
            )  # fmt: skip
        assert self._process.stderr is not None
        self._listener = Thread(target=self._listen, args=(self._process.stderr,), daemon=True)
        self._listener.start()

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._listener.join()
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()
        self._folder.cleanup()

    def read(self, size: int) -> bytes:
        """So many bytes of what it gives. Raises: UserError where it ends before."""
        assert self._process.stdout is not None
        data = self._process.stdout.read(size)
        if len(data) < size:
            self.finish()
            raise UserError("gptqmodel's process ended before it had finished")
        return data

    def rest(self) -> bytes:
        """All that it gives until it ends."""
        assert self._process.stdout is not None
        return self._process.stdout.read()

    def finish(self) -> None:
        """Wait for its end. Raises: UserError where it failed."""
        code = self._process.wait()
        self._listener.join()
        if not code:
            return
        said = self._error or (
            f"it was killed by signal {-code}" if code < 0 else "it gave no reason"
        )
        raise UserError(
            "gptqmodel failed: {details}",
            details=said,
            advice=_advice(said),
            tail="\n".join(list(self._tail)[-8:]),
            fix="{advice}\nThe end of its output:\n{tail}",
        )

    def _listen(self, stream: IO[bytes]) -> None:
        for raw in stream:
            line = raw.decode(errors="replace").rstrip()
            if not line.startswith(worker.MARK):
                if line:
                    self._tail.append(line)
                continue
            words = json.loads(line.removeprefix(worker.MARK))
            self._error = words.get("error", self._error)
            self._layers = words.get("layers", self._layers)
            if self._layers and "error" not in words:
                self._progress(words.get("done", 0), self._layers)


def _advice(said: str) -> str:
    if "memory" in said or "signal 9" in said:
        return "Memory ran out: fewer --num_samples, a shorter --cutoff_len, or a larger machine."
    if "divisible" in said or "group" in said:
        return "Choose a --group_size that divides the rows of every matrix, such as 32."
    return "It may not know this architecture or these settings."


def _environment() -> dict[str, str]:
    """This process's, without what would bring its packages along; few threads on few cores, but
    the two that the library insists on."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kept.setdefault("GPTQMODEL_CPU_WORKERS", str(max(cores or 1, 2)))
    kept.setdefault("TOKENIZERS_PARALLELISM", "false")
    return kept
