"""What a result was measured on: chip, cores, versions, date. Goes into every result file."""

from __future__ import annotations

import os
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "chinese-vicuna")
# Instruction sets that make 16-bit matrix products fast on a CPU.
FAST_BF16 = ("avx512_bf16", "amx_bf16", "bf16", "asimdbf16")


def describe(threads: int = 0) -> dict[str, Any]:
    """The machine, the versions of this process's packages, and today's date."""
    flags = cpu_flags()
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "bf16_instructions": sorted(flags & set(FAST_BF16)),
        "vector_instructions": sorted(flags & {"avx2", "avx512f", "avx512_vnni", "amx_tile"}),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "date": time.strftime("%Y-%m-%d"),
    }


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide a result."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    """The chip's name as the system gives it."""
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_flags() -> set[str]:
    """The chip's instruction sets; empty where the system does not list them."""
    for line in _cpuinfo():
        if line.startswith(("flags", "Features")):
            return set(line.partition(":")[2].split())
    return set()


def has_bf16() -> bool:
    """Whether bf16 can pay on this CPU; where unknown, yes, so that it is tried."""
    flags = cpu_flags()
    return not flags or bool(flags & set(FAST_BF16))


def physical_threads() -> int:
    """Cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
