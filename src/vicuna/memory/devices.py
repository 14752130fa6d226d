"""The device a plan is made for: from the table, from a size, or the one at hand."""

from __future__ import annotations

import difflib
import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ByteSize, TypeAdapter, ValidationError

from vicuna.config.precisions import fastest_precision
from vicuna.errors import UserError
from vicuna.messages import Message

GIB, MIB = 1 << 30, 1 << 20
_SIZE = TypeAdapter(ByteSize)
# cuBLAS keeps a workspace for matrix products inside PyTorch's allocator: 8 MiB and a little, on
# Hopper and later 32 MiB (PyTorch's notes on CUDA, CUBLAS_WORKSPACE_CONFIG).
_CUBLAS, _CUBLAS_HOPPER = int(8.125 * MIB), 32 * MIB
# What a CPU process takes beside its tensors while it trains: packed matrices and scratch memory of
# the threads inside oneDNN. Measured: docs/memory.md.
CPU_SCRATCH = 128 * MIB
# A process that has loaded PyTorch, transformers and PEFT. Measured: docs/memory.md.
CPU_LIBRARIES = 700 * MIB


@dataclass(frozen=True)
class Device:
    """A place to train.

    kind: `cuda` or `cpu`. memory: bytes that a process can use. capability: CUDA's compute
    capability. runtime: bytes taken by context, libraries and workspaces before the first tensor.
    bf16: whether the chip has bf16 units.
    """

    name: str
    kind: str
    memory: int
    capability: tuple[int, int]
    runtime: int
    bf16: bool

    def fastest(self) -> tuple[str, str]:
        """The fastest type for frozen weights on this device, and the reason."""
        return fastest_precision(self.name, self.kind, self.capability, self.bf16)


def by_name(name: str) -> Device:
    """A device of the table, however its name is written (`RTX2080Ti`, `nvidia rtx 2080 ti`).

    Raises: UserError with the nearest names where the table has no such device.
    """
    table = _table()
    if _key(name) == "cpu":
        return at_hand("cpu")
    names = {_key(n): n for n in [*table["devices"], *table["aliases"]]}
    names |= {k[3:]: n for k, n in names.items() if k.startswith(("rtx", "gtx"))}
    found = names.get(_key(name)) or names.get(re.sub(r"\d+gi?b$", "", _key(name)))
    if found is None:
        close = difflib.get_close_matches(_key(name), names, n=3, cutoff=0.5)
        near = ", ".join(dict.fromkeys(names[c] for c in close)) or ", ".join(table["devices"])
        raise UserError(
            "no such device in the table: {name}",
            name=name,
            near=near,
            where="device",
            fix="Nearest: {near}. For any other card give its memory: --memory 11GiB.",
        )
    return _of_table(table["aliases"].get(found, found), table)


def by_memory(memory: int, capability: tuple[int, int] = (8, 0)) -> Device:
    """A CUDA card of any size, of the Ampere generation unless said otherwise."""
    context = int(_table()["defaults"]["context_mib"]) * MIB
    name = f"a card with {memory / GIB:.4g} GiB"
    return _cuda(name, memory, capability, context)


def parse_memory(text: str) -> int:
    """Bytes of `11GiB`, `11 GB` (10^9), `11264MiB`, `11g` (GiB) or a plain number of bytes.

    Raises: UserError if it is not a size.
    """
    # A unit of one letter is binary here; pydantic takes it for a decimal one.
    spelled = re.sub(r"(?<=[\d\s])([kmgt])$", r"\1ib", text.strip().lower())
    try:
        nbytes = int(_SIZE.validate_python(spelled))
    except ValidationError:
        nbytes = 0
    if nbytes <= 0:
        raise UserError(
            "{content!r} is not an amount of memory",
            content=text,
            where="memory",
            fix="Write it as 11GiB, 24GB or 11264MiB.",
        )
    return nbytes


def at_hand(kind: str) -> Device:
    """The device that this machine has, with the memory that a process of a run can have on it now.

    Args:
        kind: `cuda` or `cpu`. On CUDA the context is there already, and not counted again. On the
            CPU a run is the whole process, its libraries with it: what this process holds will be
            free for it, or is part of it.
    """
    import torch

    if kind == "cuda":
        free, _ = torch.cuda.mem_get_info()
        capability = torch.cuda.get_device_capability()
        return _cuda(torch.cuda.get_device_name(), free, capability, 0)
    import psutil

    from vicuna.model import load

    memory = available_host() + int(psutil.Process().memory_info().rss)
    return Device(
        Message("this CPU"), "cpu", memory, (0, 0), CPU_SCRATCH + CPU_LIBRARIES, load.cpu_has_bf16()
    )


def cpu(memory: int, bf16: bool = True) -> Device:
    """A CPU with so much memory, the libraries not loaded yet."""
    name = f"a CPU with {memory / GIB:.4g} GiB"
    return Device(name, "cpu", memory, (0, 0), CPU_SCRATCH + CPU_LIBRARIES, bf16)


def available_host() -> int:
    """Bytes of host memory that this process can still take: what the machine has free, or what
    its control group (a container's limit) leaves, whichever is less."""
    import psutil

    free = int(psutil.virtual_memory().available)
    return min([free, *_left_in_group()])


def _left_in_group() -> list[int]:
    pairs = (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    )
    left = []
    for limit, used in pairs:
        try:
            words = Path(limit).read_text().strip()
            if words.isdigit():
                left.append(max(0, int(words) - int(Path(used).read_text())))
        except OSError:
            continue
    return left


@functools.cache
def _table() -> dict[str, Any]:
    import yaml

    text = (Path(__file__).parent / "devices.yaml").read_text(encoding="utf-8")
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def names() -> list[str]:
    """The devices of the table."""
    return list(_table()["devices"])


def _of_table(name: str, table: dict[str, Any]) -> Device:
    row = {**table["defaults"], **table["devices"][name]}
    major, minor = (int(n) for n in row["capability"].split("."))
    return _cuda(name, int(row["memory_gib"] * GIB), (major, minor), row["context_mib"] * MIB)


def _cuda(name: str, memory: int, capability: tuple[int, int], context: int) -> Device:
    workspace = _CUBLAS_HOPPER if capability >= (9, 0) else _CUBLAS
    return Device(name, "cuda", memory, capability, context + workspace, capability >= (8, 0))


def _key(name: str) -> str:
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    return re.sub(r"^(nvidia)?(geforce|tesla|quadro)?", "", plain)
