"""llama.cpp built for this CPU: where it lies, what is taken, what is said where it cannot be built.

The build itself takes minutes and a network; here its commands are played."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vicuna.errors import UserError
from vicuna.llamacpp import build, library


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VICUNA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(library.OWN_BUILD, raising=False)
    monkeypatch.setattr(shutil, "which", lambda tool: f"/bin/{tool}")
    return tmp_path / "cache"


def played(fails: str = "") -> Any:
    """The commands: pip leaves a source, cmake a library with a link to it."""

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        if fails and fails in command:
            return SimpleNamespace(returncode=1, stdout="", stderr="one\nno room on the disk")
        if "pip" in command:
            folder = Path(command[command.index("--dest") + 1])
            source = folder / "made" / "thirdparty" / "llama.cpp"
            source.mkdir(parents=True)
            with tarfile.open(folder / "xllamacpp-1.tar.gz", "w:gz") as tar:
                tar.add(folder / "made", "xllamacpp-1")
        if "-B" in command:
            assert Path(command[command.index("-S") + 1]).is_dir()
            bin_ = Path(command[command.index("-B") + 1]) / "bin"
            bin_.mkdir(parents=True)
            (bin_ / "libllama.so.0").write_text("code")
            (bin_ / "libllama.so").symlink_to("libllama.so.0")
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    return run


def test_a_build_is_found_by_the_engine(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", played())
    path = build.build(library.VERSION)
    assert path.read_text() == "code"
    assert cache in path.parents
    assert not path.is_symlink()
    assert library._shared_object() == path
    monkeypatch.setenv(library.OWN_BUILD, "/opt/libllama.so")
    assert library._shared_object() == Path("/opt/libllama.so")
    monkeypatch.setenv(library.OWN_BUILD, library.WHEEL)
    assert "xllamacpp" in library._shared_object().name


def test_another_cpu_or_version_has_another_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    here = build.place("1")
    assert here == build.place("1") != build.place("2")
    monkeypatch.setattr(build, "_instructions", lambda: "x86_64-other")
    assert build.place("1") != here


@pytest.mark.parametrize("step", ["pip", "-B", "--build"])
def test_a_failing_step_is_named_and_leaves_nothing(
    step: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", played(step))
    with pytest.raises(UserError, match="failed: no room on the disk"):
        build.build("1")
    assert build.found("1") is None
    assert not any(p.is_file() for p in cache.rglob("*"))


def test_without_tools_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "cmake" else "/bin/x")
    with pytest.raises(UserError, match="cmake is needed") as e:
        build.build("1")
    assert "apt install" in str(e.value.fix)
