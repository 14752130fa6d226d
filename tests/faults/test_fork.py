"""A command's child computes, whatever this process computed with before."""

from __future__ import annotations

import sys
from pathlib import Path

import fault_kit
import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks")


def test_a_child_computes_with_threads_where_its_parent_did(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workers of this thread's OpenMP do not live in a child: one that called for them there
    hung."""
    pytest.importorskip("xllamacpp")
    from vicuna.generate.engines.llamacpp import LlamaCppEngine

    monkeypatch.setattr(fault_kit, "PATIENCE", 60)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    folder = fault_kit.copied(place, tmp_path / "copy")
    with LlamaCppEngine(folder / "tiny.gguf", threads=2) as engine:
        engine.prefill([1, 2, 3])
    words = ("run", "tiny.gguf", "--max_new_tokens", "2")
    done = fault_kit.vicuna(folder, *words, said="hi\n")
    assert done.code == 0, done.all
    assert "2 threads" in done.err
