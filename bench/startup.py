"""How much CPU time `vicuna --help` takes, next to an empty Python.

    python bench/startup.py [--check]

CPU time, not wall time: it hardly depends on what else the machine does. With --check, exit code 1
if the median is above the limit.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

LIMIT_SECONDS = 0.2
COMMAND = str(Path(sys.executable).with_name("vicuna"))


def cpu_seconds(command: list[str]) -> float:
    """User and system time of one run of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--runs", type=int, default=9)
    options = parser.parse_args()
    bare = [sys.executable, "-c", "pass"]
    result = {
        "vicuna --help": statistics.median(
            cpu_seconds([COMMAND, "--help"]) for _ in range(options.runs)
        ),
        "python -c pass": statistics.median(cpu_seconds(bare) for _ in range(options.runs)),
        "limit": LIMIT_SECONDS,
    }
    print(json.dumps({k: round(v, 3) for k, v in result.items()}))
    return int(options.check and result["vicuna --help"] > LIMIT_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
