"""A fingerprint is a function of content: the same in every process, wherever and however it runs.

Each digest and each name in the cache is made by processes of their own, with other hash seeds,
locales, time zones and working directories. A run of before, whose digest was not yet like that,
is still resumed.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from run_kit import same, save_tiny_model, train, weights, write_data
from safetensors.torch import load_file

import vicuna
from vicuna.errors import SettingsError
from vicuna.files import file_hash
from vicuna.model.vocabulary import load_vocabulary

PROBE = Path(__file__).with_name("fingerprint_probe.py")
WAYS = [
    {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8", "TZ": "UTC"},
    {"PYTHONHASHSEED": "1", "LC_ALL": "C", "TZ": "Asia/Shanghai"},
    {
        "PYTHONHASHSEED": "2",
        "LC_ALL": "C",
        "TZ": "America/St_Johns",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONUTF8": "0",
    },
]
# Places in the cache whose names are versions, and that a network is needed for.
NOT_PROBED = {"packages", "environments", "libllama"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("made") / "base")


@pytest.fixture(scope="module")
def whole(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four updates, its checkpoints kept."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    train("--model", str(base), "--dataset", str(data), "--output_dir", str(run), "--max_steps",
          "4", "--save_steps", "2", "--save_total_limit", "0", "--batch_size", "8",
          "--precision", "fp32")  # fmt: skip
    return run


def old_adapter(run: Path, folder: Path) -> Path:
    """The run's adapter as 2023 saved one: what the cache keeps a newer copy of."""
    folder.mkdir()
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    torch.save(tensors, folder / "adapter_model.bin")
    shutil.copy(run / "adapter" / "adapter_config.json", folder)
    return folder


def test_every_digest_is_the_same_in_every_process(
    base: Path, whole: Path, data: Path, tmp_path: Path
) -> None:
    from vicuna.export.gguf_writer import write_base

    write_base(base, tmp_path / "base.gguf", "f16")
    words = [str(base), str(tmp_path / "base.gguf"), str(old_adapter(whole, tmp_path / "old"))]
    begun = []
    for number, way in enumerate(WAYS):
        place = tmp_path / f"place {number}"
        place.mkdir()
        shutil.copy(data, place / "data.jsonl")
        environment = {**os.environ, **way, "OMP_NUM_THREADS": "1"}
        environment["VICUNA_CACHE"] = str(place / "cache")
        command = [sys.executable, str(PROBE), *words]
        begun.append(
            subprocess.Popen(
                command, cwd=place, env=environment, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    for process in begun:
        output, _ = process.communicate()
        assert process.returncode == 0, output
    first, *others = (
        json.loads((tmp_path / f"place {n}" / "told.json").read_text()) for n in range(len(WAYS))
    )
    for other in others:
        differs = [name for name in first if other[name] != first[name]]
        assert not differs, {name: (first[name], other[name]) for name in differs}
    assert first.keys() == other.keys()
    # A kind of cache entry that is new must be probed, too.
    source = Path(vicuna.__file__).parent
    kinds = {
        found for path in source.rglob("*.py")
        for found in re.findall(r'cache_dir\(\s*"(\w+)"', path.read_text(encoding="utf-8"))
    }  # fmt: skip
    assert {name.split("/")[0] for name in first["cache"]} == kinds - NOT_PROBED


def test_a_second_look_at_the_same_file_adds_nothing_to_the_cache(
    base: Path, data: Path, tmp_path: Path
) -> None:
    listed = []
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-m", "vicuna", "data", "stats", str(data), "--model", str(base)],
            env={**os.environ, "PYTHONHASHSEED": seed, "VICUNA_CACHE": str(tmp_path / "cache")},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        listed.append(sorted(str(p) for p in (tmp_path / "cache").rglob("*")))
    assert listed[0] == listed[1]
    assert any("/data/" in name for name in listed[0])


# -- runs of before ----


def as_before(run: Path, data: Path, base: Path, target: Path, **changed: Any) -> Path:
    """The run as it was saved when a digest told how records were read, killed after update 2."""
    shutil.copytree(run, target)
    shutil.rmtree(target / "adapter")
    shutil.rmtree(target / "checkpoints" / "step-000004")
    checkpoint = target / "checkpoints" / "step-000002"
    adapter = json.loads((checkpoint / "adapter" / "vicuna.json").read_text(encoding="utf-8"))
    controls = adapter["template"]["controls"]
    random.Random(0).shuffle(controls)
    adapter["template"]["controls"] = sorted(controls, key=len, reverse=True)
    assert (
        adapter["template"]["controls"]
        != json.loads((run / "adapter" / "vicuna.json").read_text(encoding="utf-8"))["template"][
            "controls"
        ]
    )
    text = json.dumps(adapter, ensure_ascii=False, indent=2)
    (checkpoint / "adapter" / "vicuna.json").write_text(text + "\n", encoding="utf-8")
    state = json.loads((checkpoint / "state.json").read_text())
    state["data"] = digest_of_before(data, base, adapter["template"])
    state["files"]["adapter/vicuna.json"] = file_hash(checkpoint / "adapter" / "vicuna.json")
    (checkpoint / "state.json").write_text(json.dumps({**state, **changed}))
    return target


def digest_of_before(data: Path, base: Path, template: dict[str, Any]) -> str:
    """As commit f1de0b9 made it, for one file of 40 examples that are all trained on."""
    import numpy as np

    def sha(value: Any) -> str:
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

    v = load_vocabulary(base)
    tokenizer = sha(
        {
            "tokenizer_json": v.tokenizer_json,
            "bos_id": v.bos_id,
            "eos_id": v.eos_id,
            "pad_id": v.pad_id,
            "bos_token": v.bos_token,
            "eos_token": v.eos_token,
            "end_ids": v.end_ids,
            "special_tokens": v.special_tokens,
        }
    )
    key = sha([2, file_hash(data), tokenizer, template, "all", 0, 0, ""])[:32]
    every = np.arange(40).tobytes()
    whole = hashlib.sha256(b"2048;" + key.encode() + every).hexdigest()[:32]
    return hashlib.sha256(whole.encode() + every + b";1.0;").hexdigest()[:32]


def test_a_run_of_before_goes_on_where_its_data_is_the_same(
    whole: Path, data: Path, base: Path, tmp_path: Path
) -> None:
    run = as_before(whole, data, base, tmp_path / "run")
    assert train("--resume", str(run)) == 0
    assert same(weights(run), weights(whole))


def test_a_run_of_before_is_refused_other_data(
    whole: Path, data: Path, base: Path, tmp_path: Path
) -> None:
    run = as_before(whole, data, base, tmp_path / "run")
    other = write_data(tmp_path / "other.jsonl", 40, shift=500)
    with pytest.raises(SettingsError, match="the data are not those of the checkpoint"):
        train("--resume", str(run), "--dataset", str(other))
    # The file is the same, but it is read otherwise today.
    run = as_before(whole, data, base, tmp_path / "again", tokens=17)
    with pytest.raises(SettingsError, match="the data are not those of the checkpoint"):
        train("--resume", str(run))
