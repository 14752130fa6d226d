"""How many threads llama.cpp computes with."""

from __future__ import annotations

import os
from pathlib import Path


def physical_cores() -> int:
    """Threads to compute with: OMP_NUM_THREADS, else the cores this process may use.

    Two hardware threads of one core share its arithmetic units, so they count once.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if asked.isdigit() and int(asked):
        return int(asked)
    try:
        usable = sorted(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        import psutil

        return psutil.cpu_count(logical=False) or os.cpu_count() or 1
    return len({_core(cpu) for cpu in usable})


def _core(cpu: int) -> tuple[str, str]:
    """(socket, core) of a hardware thread; the thread itself where the system does not tell."""
    folder = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        return (folder / "physical_package_id").read_text(), (folder / "core_id").read_text()
    except OSError:
        return "", str(cpu)
