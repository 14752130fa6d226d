"""A file or folder appears whole or not at all, and what a killed process left is cleaned up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from vicuna import files
from vicuna.errors import UserError


def killed(code: str, *words: str) -> None:
    """Run Python that prints a line when it is there, and kill it then."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *words], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()


WRITES = {
    "folder": """
        import sys, time; from pathlib import Path; from vicuna.files import whole_folder
        with whole_folder(Path(sys.argv[1])) as aside:
            (aside / "half").write_text("x"); print("there", flush=True); time.sleep(600)
    """,
    "file": """
        import sys, time; from pathlib import Path; from vicuna.files import whole_file
        with whole_file(Path(sys.argv[1])) as aside:
            aside.write_text("x"); print("there", flush=True); time.sleep(600)
    """,
    "between two renames": """
        import sys, time; from pathlib import Path; from vicuna import files
        def hang(self, to): print("there", flush=True); time.sleep(600)
        with files.whole_folder(Path(sys.argv[1])) as aside:
            (aside / "new").write_text("x")
            rename = Path.rename
            def once(self, to):
                if self == aside: hang(self, to)
                return rename(self, to)
            Path.rename = once
    """,
}


@pytest.mark.parametrize("moment", WRITES)
@pytest.mark.parametrize("before", [False, True])
def test_what_a_killed_process_left_is_gone_at_the_next_start(
    tmp_path: Path, moment: str, before: bool
) -> None:
    target = tmp_path / "result"
    if before and moment != "file":
        target.mkdir()
        (target / "old").write_text("whole")
    killed(WRITES[moment], str(target))
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    foreign = tmp_path / ".result.notes.part"
    foreign.write_text("somebody's own")
    files.sweep(tmp_path)
    assert (
        sorted(p.name for p in tmp_path.iterdir() if p != foreign) == ["result"] * target.exists()
    )
    assert foreign.read_text() == "somebody's own"
    if before and moment != "file":
        # What was there before is there again, also if the kill fell between two renames.
        assert (target / "old").read_text() == "whole"
    write = files.whole_file if moment == "file" else files.whole_folder
    with write(target) as aside:
        if moment == "file":
            aside.write_text("new")
    assert sorted(p.name for p in tmp_path.iterdir() if p != foreign) == ["result"]


def test_the_next_one_to_write_cleans_up_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(WRITES["folder"], str(tmp_path / "result"))
    killed(WRITES["folder"], str(tmp_path / "other"))
    with files.whole_folder(tmp_path / "result"):
        pass
    # Elsewhere only its own target's; in the cache, all of them.
    assert [p.name for p in tmp_path.glob(".*")] == [p.name for p in tmp_path.glob(".other.*.part")]
    assert list(tmp_path.glob(".other.*.part"))
    monkeypatch.setenv("VICUNA_CACHE", str(tmp_path.parent))
    with files.whole_folder(tmp_path / "result"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["result"]


def test_a_process_that_lives_is_left_alone(tmp_path: Path) -> None:
    with files.whole_folder(tmp_path / "result") as aside:
        files.sweep(tmp_path)
        assert aside.is_dir()
    # The number of a process that is gone may be another's by now.
    reused = tmp_path / f".x.{os.getpid()}.part"
    reused.write_text("")
    files.sweep(tmp_path)
    assert reused.exists()
    os.utime(reused, (1.0, 1.0))
    files.sweep(tmp_path)
    assert not reused.exists()


def test_of_another_machine_only_what_is_old_is_removed(tmp_path: Path) -> None:
    theirs = tmp_path / ".x.abcdef-1.part"
    theirs.write_text("")
    files.sweep(tmp_path)
    assert theirs.exists()
    long_ago = time.time() - 30 * 86400
    os.utime(theirs, (long_ago, long_ago))
    files.sweep(tmp_path)
    assert not theirs.exists()


def test_scratch_folders_of_killed_processes_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    code = """
        import time; from vicuna.files import scratch_folder
        with scratch_folder("merged") as name: print(name, flush=True); time.sleep(600)
    """
    killed(code)
    (left,) = tmp_path.iterdir()
    with files.scratch_folder("merged") as mine:
        assert [str(p) for p in tmp_path.iterdir()] == [mine]
    assert not left.exists()


# -- a disk that is full ----


def full_safetensors(path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1 << 16)}, str(path))


def full_tokenizers(path: Path) -> None:
    from generate_kit import byte_level

    byte_level().save(str(path))


def full_numpy(path: Path) -> None:
    import numpy as np

    with path.open("wb") as file:
        np.save(file, np.zeros(1 << 16))


def full_torch(path: Path) -> None:
    import torch

    torch.save({"a": torch.zeros(1 << 16)}, path)


def full_python(path: Path) -> None:
    path.write_bytes(bytes(1 << 16))


@pytest.mark.parametrize(
    "write", [full_safetensors, full_tokenizers, full_numpy, full_torch, full_python]
)
@pytest.mark.parametrize("way", [files.whole_folder, files.whole_file])
def test_every_library_s_full_disk_is_one_message(tmp_path: Path, write, way) -> None:  # type: ignore[no-untyped-def]
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with (
            pytest.raises(UserError, match="cannot write: ") as caught,
            way(tmp_path / "result") as aside,
        ):
            write(aside / "file" if aside.is_dir() else aside)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(tmp_path / "result") in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_what_is_no_error_of_the_disk_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), files.whole_folder(tmp_path / "x"):
        raise ValueError("mine")
    assert not list(tmp_path.iterdir())
