"""llama.cpp built for the CPU at hand, from the source that the pinned wheel was made of.

    python -m vicuna.llamacpp.build

The wheel runs on any CPU with AVX2 and so uses nothing newer. This takes a few minutes once, needs
cmake and a C++ compiler, and puts the library into the cache, where the engine finds it.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from vicuna.errors import UserError
from vicuna.files import cache_dir, scratch_folder, whole_folder
from vicuna.messages import Message
from vicuna.terminal import say, visible

# llama.cpp b11549: what the pinned wheel was made of and the structures in `library.py` describe.
VERSION = "2026.10.11549"
# Only what the engine calls: no server, no tools, nothing that is fetched while it is built.
_OPTIONS = (
    "CMAKE_BUILD_TYPE=Release", "BUILD_SHARED_LIBS=ON", "GGML_NATIVE=ON", "LLAMA_CURL=OFF",
    "LLAMA_BUILD_COMMON=OFF", "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_TOOLS=OFF",
    "LLAMA_BUILD_EXAMPLES=OFF", "LLAMA_BUILD_SERVER=OFF",
    # The libraries find each other wherever their folder is.
    "CMAKE_BUILD_WITH_INSTALL_RPATH=ON", "CMAKE_INSTALL_RPATH=$ORIGIN",
)  # fmt: skip


def place(version: str) -> Path:
    """The folder of the library of this version and this kind of CPU, whether it is there or not.

    A library built for another CPU would end the process at its first unknown instruction, and a
    cache may be shared between machines.
    """
    return cache_dir("libllama", f"{version}-{_instructions()}")


def found(version: str) -> Path | None:
    """The library, if it was built."""
    for suffix in ("so", "dylib"):
        path = place(version) / f"libllama.{suffix}"
        if path.exists():
            return path
    return None


def build(version: str) -> Path:
    """Fetch the source, build the library and put it into the cache; its path.

    Raises: UserError where a tool is missing, or a step fails.
    """
    missing = [tool for tool in ("cmake", "c++") if shutil.which(tool) is None]
    if missing:
        raise UserError(
            "{missing} is needed to build llama.cpp",
            missing=" and ".join(missing),
            where="engine llama.cpp",
            fix="Debian, Ubuntu: apt install cmake g++. The wheel works without it, slower.",
        )
    with scratch_folder("build") as scratch, whole_folder(place(version)) as target:
        work = Path(scratch)
        _run("pip download", [
            sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary",
            "xllamacpp", "--dest", str(work), f"xllamacpp=={version}",
        ])  # fmt: skip
        _unpack(next(work.glob("xllamacpp-*.tar.gz")), work)
        source = next(work.glob("xllamacpp-*/thirdparty/llama.cpp"))
        options = [f"-D{option}" for option in _OPTIONS]
        _run("cmake", ["cmake", "-S", str(source), "-B", str(work / "build"), *options])
        _run("cmake --build", [
            "cmake", "--build", str(work / "build"), "--target", "llama", "--parallel",
            str(os.cpu_count() or 1),  # without a number make starts all at once
        ])  # fmt: skip
        for library in (work / "build" / "bin").glob("lib*"):
            shutil.copy2(library, target / library.name)  # links become files: no chain to break
    path = found(version)
    assert path is not None
    return path


def _unpack(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")


def _run(name: str, command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise UserError(
            "{name} failed: {detail}",
            name=name,
            detail=said[-1]
            if said
            else Message("exit code {returncode}", returncode=done.returncode),
            command=" ".join(command),
            where="engine llama.cpp",
            fix="Try it by hand: {command}",
        )


def _instructions() -> str:
    """A name for what this CPU can do: its architecture and a hash of its instruction sets."""
    listed = Path("/proc/cpuinfo")
    text = listed.read_text(encoding="utf-8", errors="replace") if listed.exists() else ""
    flags = next((line for line in text.splitlines() if line.startswith(("flags", "Feat"))), "")
    words = " ".join(sorted(flags.partition(":")[2].split())) or platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(words.encode()).hexdigest()[:12]}"


def main() -> None:
    """Build the library of the version that the engine is written for."""
    say(f"building llama.cpp {VERSION} for this CPU; this takes some minutes")
    try:
        say(build(VERSION))
    except UserError as e:
        raise SystemExit(visible(f"error: {e}")) from e


if __name__ == "__main__":
    main()
