"""The worker with the library itself, where an environment that has it is named:

VICUNA_TEST_GPTQMODEL=FOLDER python -m pytest tests/quantize/test_worker.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from gguf_kit import tiny_base
from vicuna.commands.quantize import run

ENVIRONMENT = os.environ.get("VICUNA_TEST_GPTQMODEL", "")


@pytest.mark.slow
@pytest.mark.skipif(not ENVIRONMENT, reason="VICUNA_TEST_GPTQMODEL names no environment")
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_tiny_base_is_quantised_and_read_again(tmp_path: Path, method: str) -> None:
    tiny_base(tmp_path / "base", "llama", hidden_size=128, intermediate_size=256)
    target = tmp_path / "out"
    given = {
        "--model": tmp_path / "base", "--output_dir": target, "--environment": ENVIRONMENT,
        "--num_samples": 4, "--verify_tokens": 64, "--max_kl": 3, "--max_perplexity_ratio": 20,
    }  # fmt: skip
    assert run(method, [str(w) for pair in given.items() for w in pair]) == 0
    assert json.loads((target / "report.json").read_text())["passed"]
