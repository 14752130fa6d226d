"""`vicuna run FILE.gguf`: a conversation computed by llama.cpp, with no weights in PyTorch."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

import pytest

from gguf_kit import tiny_gguf
from vicuna.commands import generate
from vicuna.errors import SettingsError


@pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="needs the extra cpp (xllamacpp)"
)
def test_a_file_answers_without_pytorchs_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from vicuna.model import load

    _, path = tiny_gguf(tmp_path, "llama", "q8_0")

    def refuse(*_: Any) -> None:
        raise AssertionError("PyTorch must not load the model")

    monkeypatch.setattr(load, "load_base", refuse)
    monkeypatch.setattr("sys.stdin", io.StringIO("你好\n"))
    words = [str(path), "--max_new_tokens", "4", "--threads", "1", "--template", "alpaca"]
    assert generate.run_file(words) == 0
    assert f"{path.name} as it is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "which file"),
        (["a.gguf", "b.gguf"], "which file"),
        (["folder"], "folder is no .gguf file; vicuna export gguf makes one"),
        (["a.gguf", "--engine", "torch"], "engine is torch"),
        (["a.gguf", "--num_return_sequences", "2", "--num_beams", "2"], "one answer"),
    ],
)
def test_what_cannot_be_run_is_told(words: list[str], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        generate.run_file(words)
