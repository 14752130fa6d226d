"""How much each column of each matrix counts: an importance matrix, as llama.cpp calls it.

It is the mean square of what a matrix is multiplied with, over text. A quantiser given it rounds
the columns that matter more carefully. The files are those of llama.cpp's `llama-imatrix`, of today
(GGUF) and of before (`.dat`).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vicuna.errors import UserError
from vicuna.export.gguf_names import Names
from vicuna.files import whole_file
from vicuna.gguf.read import read_fields

_SUMS, _COUNTS = ".in_sum2", ".counts"
_MAGIC = b"GGUF"


@dataclass
class Importance:
    """Mean squares by GGUF's name of the matrix, float32 (columns,), and what they come from.

    chunks: texts they were taken over, each of `chunk_size` tokens at most.
    """

    means: dict[str, np.ndarray]
    source: str
    chunks: int = 0
    chunk_size: int = 0

    def describe(self, writer: Any) -> None:
        """Note in a model's metadata what it was quantised with."""
        writer.add_string("quantize.imatrix.file", Path(self.source).name)
        writer.add_uint32("quantize.imatrix.entries_count", len(self.means))
        writer.add_uint32("quantize.imatrix.chunks_count", self.chunks)


# -- from a model and texts ----


def measure(
    model: Any,
    names: Names,
    texts: Sequence[Sequence[int]],
    source: str,
    progress: Callable[[int, int], None] | None = None,
) -> Importance:
    """Run texts through a model and add up what its matrices are given.

    Args:
        model: of transformers, perhaps with an adapter attached.
        names: of its base.
        texts: token ids.

    Raises: UserError where nothing was measured.
    """
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    hooks = [
        module.register_forward_pre_hook(_adder(name, sums, rows))
        for name, module in _matrices(model, names)
    ]
    try:
        for done, ids in enumerate(texts):
            if progress:
                progress(done, len(texts))
            with torch.inference_mode():
                given = torch.tensor([list(ids)], device=model.get_input_embeddings().weight.device)
                model(input_ids=given, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    if not sums:
        raise UserError("no text to measure importance with", where=f"imatrix {source}")
    means = {name: (total / rows[name]).float().cpu().numpy() for name, total in sums.items()}
    return Importance(means, source, len(texts), max(map(len, texts)))


def _matrices(model: Any, names: Names) -> list[tuple[str, nn.Module]]:
    """The linear layers of the base by GGUF's names; not the output, which few texts reach."""
    found = []
    for path, module in model.named_modules():
        plain = path.removeprefix("base_model.model.").removesuffix(".base_layer")
        if getattr(module, "weight", None) is None or ".layers." not in plain:
            continue
        if module.weight.dim() == 2 and ".lora_" not in plain:
            name = names.of(f"{plain}.weight")
            if name is not None:
                found.append((name, module))
    return found


def _adder(name: str, sums: dict[str, Tensor], rows: dict[str, int]) -> Any:
    def add(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        x = given[0].reshape(-1, given[0].shape[-1])
        total = x.float().square().sum(0, dtype=torch.float64)
        sums[name] = sums[name] + total if name in sums else total
        rows[name] = rows.get(name, 0) + len(x)

    return add


# -- files ----


def write_importance(importance: Importance, path: Path) -> None:
    """Write it as `llama-imatrix` does, in GGUF."""
    from gguf import GGUFWriter

    with whole_file(path) as aside, closing(GGUFWriter(str(aside), "")) as writer:
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [Path(importance.source).name])
        writer.add_uint32("imatrix.chunk_count", importance.chunks)
        writer.add_uint32("imatrix.chunk_size", importance.chunk_size)
        for name, means in importance.means.items():
            writer.add_tensor(name + _SUMS, means.astype(np.float32)[None, :])
            writer.add_tensor(name + _COUNTS, np.ones((1, 1), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def is_importance(path: Path) -> bool:
    """Whether a file is an importance matrix, by its content."""
    if not path.is_file():
        return False
    with path.open("rb") as f:
        if f.read(4) == _MAGIC:
            return read_fields(path).get("general.type") == "imatrix"
    return path.suffix.lower() in (".dat", ".imatrix")


def read_importance(path: Path) -> Importance:
    """Read what `llama-imatrix` or `write_importance` wrote.

    Raises: UserError where the file is damaged or holds values that are not finite.
    """
    with path.open("rb") as f:
        new = f.read(4) == _MAGIC
    try:
        found = _read_gguf(path) if new else _read_dat(path)
    except (struct.error, ValueError, KeyError, OSError) as e:
        raise UserError(
            "the importance matrix cannot be read: {error}",
            error=e,
            where=str(path),
            fix="Compute it again, or give data instead.",
        ) from e
    bad = [n for n, m in found.means.items() if not np.isfinite(m).all() or (m < 0).any()]
    if bad or not found.means:
        what = f"{bad[0]} holds values that cannot be mean squares" if bad else "it is empty"
        raise UserError(
            "the importance matrix is damaged: {details}", details=what, where=str(path)
        )
    return found


def _read_gguf(path: Path) -> Importance:
    from gguf import GGUFReader

    fields = read_fields(path)
    tensors = {t.name: np.array(t.data, np.float32) for t in GGUFReader(str(path)).tensors}
    means = {}
    for name, sums in tensors.items():
        if name.endswith(_SUMS):
            plain = name.removesuffix(_SUMS)
            count = max(float(tensors[plain + _COUNTS].max()), 1.0)
            means[plain] = sums.reshape(-1) / np.float32(count)
    return Importance(
        means,
        str(path),
        int(fields.get("imatrix.chunk_count", 0)),
        int(fields.get("imatrix.chunk_size", 0)),
    )


def _read_dat(path: Path) -> Importance:
    """The older layout: entries of (name, calls, values), each value a sum over the calls."""
    data, at = path.read_bytes(), 0

    def take(count: int, form: str) -> Any:
        nonlocal at
        if count < 0 or at + 4 * count > len(data):
            raise ValueError(f"it ends within {count} numbers at byte {at}")
        at += 4 * count
        return np.frombuffer(data, form, count, at - 4 * count)

    def number() -> int:
        return int(take(1, "<i4")[0])

    means = {}
    for _ in range(number()):
        length = number()
        if not 0 < length <= 256:
            raise ValueError(f"a name of {length} bytes")
        name = data[at : at + length].decode()
        at += length
        calls, values = number(), number()
        means[name] = (take(values, "<f4") / np.float32(max(calls, 1))).astype(np.float32)
    chunks = number() if at + 4 <= len(data) else 0
    return Importance(means, str(path), chunks)
