"""The command as a user types it: exit codes, messages without tracebacks, answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))
from run_kit import save_tiny_model, write_data


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, data, and a run trained from them by the command."""
    folder = tmp_path_factory.mktemp("place")
    save_tiny_model(folder / "tiny")
    write_data(folder / "data.jsonl", 24)
    done = vicuna(
        folder, *["train", "--model", "tiny", "--dataset", "data.jsonl", "--batch_size", "8", "--max_steps", "3"],
        *["--output_dir", "run", "--val_size", "4", "--report_to", "none"],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "vicuna chat --adapter run" in done.stdout
    return folder


def vicuna(folder: Path, *words: str, said: str = "") -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "VICUNA_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", "vicuna", *words],
        cwd=folder, env=environment, input=said, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_help_lists_commands_and_settings(tmp_path: Path) -> None:
    assert "train" in vicuna(tmp_path, "--help").stdout
    assert "--lora_rank" in vicuna(tmp_path, "train", "--help").stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --dataset nosuch.jsonl --model tiny", "nosuch.jsonl"),
        ("train --dataset dat.jsonl --model tiny", "data.jsonl"),
        ("train --dataset data.jsonl --model tin", "did you mean tiny"),
        ("train --dataset data.jsonl --model some/model", "hub"),
        ("train --model tiny", "dataset is missing"),
        ("train --dataset data.jsonl --model tiny --learning_rat 1", "learning_rate"),
        ("train --data_path data.jsonl", "data_path is now dataset"),
        ("train nosuch.yaml", "no such recipe"),
        ("train --dataset data.jsonl --model tiny --lora_target nope --output_dir x", "q_proj"),
        ("train --resume run/nothing", "no run in this folder"),
        ("train --dataset data.jsonl --model tiny --output_dir run", "already holds a run"),
        ("train --dataset data.jsonl --model run/adapter", "adapter, not a base"),
        ("train --dataset data.jsonl --model data.jsonl", "not a model"),
        ("train --dataset data.jsonl --model tiny --cutoff_len 99999999 --template nope", "nope"),
        ("generate --model tiny", "what to answer"),
        ("generate --model tiny --num_beams 17 hello", "num_beams is 17, but must be at most 16"),
        ("generate --model tiny --top_k 5 hello", "top_k 5 has no effect without sampling"),
        ("generate --model tiny --engine llamacpp hello", "'torch', 'llama.cpp' or 'vllm'"),
        ("generate --adapter nowhere hello", "no such adapter"),
        ("generate --adapter run --template alpaca hello", "trained with template"),
        ("data check", "which file"),
        ("data convert data.jsonl", "output is missing"),
        ("trian", "train"),
    ],
)
def test_a_mistake_gets_one_message_and_exit_code_2(place: Path, words: str, message: str) -> None:
    done = vicuna(place, *words.split())
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_debug_shows_the_traceback(place: Path) -> None:
    done = vicuna(place, "train", "--dataset", "nosuch.jsonl", "--model", "tiny", "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_generate_prints_json(place: Path) -> None:
    done = vicuna(
        place, *["generate", "--adapter", "run", "--max_new_tokens", "5", "--json", "你好"]
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert set(answer["outputs"][0]) == {"text", "token_ids", "score", "finish_reason"}
    assert set(answer["usage"]) == {"prompt_tokens", "completion_tokens"}
    wanted = {"first_token_seconds", "total_seconds", "tokens_per_second"}
    assert set(answer["timings"]) == wanted


def test_generate_with_beams_prints_the_best_ones(place: Path) -> None:
    words = "generate --adapter run --num_beams 4 --num_return_sequences 3 --max_new_tokens 6"
    done = vicuna(place, *words.split(), "--json", "你好")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    scores = [output["score"] for output in answer["outputs"]]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    assert answer["usage"]["completion_tokens"] == sum(
        len(output["token_ids"]) for output in answer["outputs"]
    )


@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="needs the extra cpp (xllamacpp)")
def test_llamacpp_gives_torchs_answer(place: Path) -> None:
    words = "generate --adapter run --num_beams 4 --max_new_tokens 6 --json --engine"
    torchs, other = (vicuna(place, *words.split(), e, "你好") for e in ("torch", "llama.cpp"))
    assert other.returncode == 0, other.stderr
    assert "tiny in F16, 1 thread" in other.stderr
    ids = [json.loads(d.stdout)["outputs"][0]["token_ids"] for d in (torchs, other)]
    assert ids[0] == ids[1]


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is there")
def test_a_missing_engine_is_named_with_the_way_out(place: Path) -> None:
    done = vicuna(place, *["generate", "--model", "tiny", "--engine", "vllm", "hello"])
    assert done.returncode == 2
    assert "vLLM is not installed\npip install vllm" in done.stderr


def test_generate_with_a_seed_repeats_itself(place: Path) -> None:
    words = "generate --adapter run --do_sample --temperature 1 --seed 7 --max_new_tokens 8 你好"
    first, second = (vicuna(place, *words.split()).stdout for _ in range(2))
    assert first == second


def test_generate_answers_a_file(place: Path) -> None:
    words = "generate --model tiny --input data.jsonl --output answers.jsonl --max_new_tokens 2"
    assert vicuna(place, *words.split()).returncode == 0
    lines = (place / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 24
    assert "output" in json.loads(lines[0])


def test_chat_talks_and_leaves(place: Path) -> None:
    done = vicuna(
        place,
        *["chat", "--adapter", "run", "--max_new_tokens", "4"],
        said="你好\n/undo\n/adapter off\n你好\n/adapter on 0.5\n/help\n/exit\n",
    )
    assert done.returncode == 0, done.stderr
    assert "Taken back: 你好" in done.stdout
    assert "The base alone answers." in done.stdout
    assert "The adapter answers at 0.5." in done.stdout


def test_data_check_says_what_is_wrong(place: Path) -> None:
    (place / "bad.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": "c"}\n')
    (place / "none.jsonl").write_text("")
    done = vicuna(place, *["data", "check", "bad.jsonl", "--model", "tiny", "--json"])
    assert done.returncode == 0
    (file,) = json.loads(done.stdout)["files"]
    assert (file["records"], file["used"], file["dropped"]) == (2, 1, 1)
    assert [(p["line"], p["action"]) for p in file["problems"] if p["action"] == "dropped"] == [
        (2, "dropped")
    ]
    done = vicuna(place, *["data", "check", "bad.jsonl", "none.jsonl", "--model", "tiny"])
    assert done.returncode == 2


def test_data_stats_and_preview(place: Path) -> None:
    done = vicuna(place, *["data", "stats", "data.jsonl", "--model", "tiny", "--json"])
    (file,) = json.loads(done.stdout)["files"]
    assert file["examples"] == 24
    assert set(file["length"]) == {"p50", "p90", "p99", "max"}
    done = vicuna(place, *["data", "preview", "data.jsonl", "--model", "tiny", "--number", "1"])
    assert "<|im_start|>" in done.stdout


@pytest.mark.parametrize("to", ["alpaca", "chat", "history", "sharegpt", "messages", "pair"])
def test_data_convert_loses_nothing(place: Path, to: str) -> None:
    name = f"as_{to}.jsonl"
    done = vicuna(place, "data", "convert", "data.jsonl", "--to", to, "--output", name)
    assert done.returncode == 0, done.stderr
    from vicuna.data.records.formats import parse
    from vicuna.data.records.read_file import read

    before, after = (
        [parse(raw).conversation for raw in read(place / f, [])] for f in ("data.jsonl", name)
    )
    assert [[t.text for t in c.turns] for c in before if c] == [
        [t.text for t in c.turns] for c in after if c
    ]


def test_doctor_finds_a_sane_model(place: Path) -> None:
    done = vicuna(place, "doctor", "tiny", "--json")
    findings = json.loads(done.stdout)["findings"]
    assert not [f for f in findings if f["level"] == "error"], findings
