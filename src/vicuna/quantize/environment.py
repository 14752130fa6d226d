"""The environment that gptqmodel lives in: made once in the cache, with pinned versions.

The library wants an older NumPy than everything else here, so it cannot stand in this environment.
What it is asked to do runs there as a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from importlib import resources
from pathlib import Path

from vicuna.errors import UserError
from vicuna.files import cache_dir, file_hash
from vicuna.messages import Message
from vicuna.terminal import say

_READY = "ready"
_ROOM = 8 << 30  # bytes: PyTorch with its libraries for a GPU is the larger part


def python_of(named: str) -> Path:
    """The interpreter of an environment that has gptqmodel: the one named, else that in the cache.

    Raises: UserError where there is none and none can be made.
    """
    if named:
        return _named(Path(named).expanduser())
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    digest = file_hash(_requirements())[:12]
    folder = cache_dir("environments", f"gptqmodel-py{version}-{digest}")
    if not (folder / _READY).is_file():
        _make(folder)
    return _interpreter(folder)


def _named(path: Path) -> Path:
    python = path if path.is_file() else _interpreter(path)
    if not python.is_file():
        raise UserError(
            "no Python environment here",
            where=f"environment {path}",
            fix="Give the folder of one (python -m venv) in which gptqmodel is installed.",
        )
    probe = "import importlib.util, sys; sys.exit(not importlib.util.find_spec('gptqmodel'))"
    if subprocess.run([str(python), "-c", probe], capture_output=True).returncode:
        raise UserError(
            "gptqmodel is not installed in this environment",
            where=f"environment {path}",
            fix="Install it there, or leave --environment out: then one is created.",
        )
    return python


def _requirements() -> Path:
    return Path(str(resources.files("vicuna.quantize"))) / "requirements.txt"


def _interpreter(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _make(folder: Path) -> None:
    """Create it; what an interrupted attempt left is gone over again."""
    from vicuna.weights.output_folder import check_space

    check_space(folder, _ROOM)
    say(f"Creating an environment for gptqmodel in {folder} (once) ...", error=True)
    venv.create(folder, with_pip=True, clear=True)
    pins = _requirements().read_text(encoding="utf-8").splitlines()
    torch = next(line for line in pins if line.startswith("torch=="))
    # torch first and by itself, so that the build of this machine's kind is the one that is taken.
    for arguments in ([torch], ["-r", str(_requirements())]):
        _pip(folder, arguments)
    (folder / _READY).touch()


def _pip(folder: Path, arguments: list[str]) -> None:
    command = [str(_interpreter(folder)), "-m", "pip", "install", "--quiet"]
    command += ["--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise UserError(
            "gptqmodel could not be installed: {line}",
            line=lines[-1] if lines else Message("pip gives no reason"),
            where=str(folder),
            fix="It needs a network and, if no wheel fits, a C++ compiler. Or install it "
            "yourself and name that environment: --environment FOLDER.",
        )
