"""A folder in which every command has all it needs."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))
from fault_kit import vicuna
from run_kit import save_tiny_model, write_data


@dataclass(frozen=True)
class Row:
    """A command as it works in the place.

    reads: files that it needs, each of which may be broken; made: what it writes.
    """

    words: str
    reads: tuple[str, ...] = ()
    made: tuple[str, ...] = ()
    said: str = ""


_BASE = ("tiny/config.json", "tiny/tokenizer.json", "tiny/tokenizer_config.json")
_MODEL = (*_BASE, "tiny/model.safetensors", "tiny/generation_config.json")
_WEIGHTS = ("tiny/config.json", "tiny/model.safetensors")  # a tokenizer goes along if there is one
_ADAPTER = ("run/adapter/adapter_config.json", "run/adapter/adapter_model.safetensors",
            "run/adapter/vicuna.json")  # fmt: skip
_TRAIN = "--batch_size 4 --max_steps 2 --val_size 2 --report_to none --precision fp32"

ROWS: dict[str, list[Row]] = {
    "train": [
        Row(f"train --model tiny --dataset data.jsonl --output_dir out {_TRAIN}",
            (*_MODEL, "data.jsonl"), ("out",)),
        Row("train recipe.yaml", ("recipe.yaml",), ("out",)),
        Row("train --resume run --max_steps 3 --allow_changes max_steps",
            ("run/config.yaml", "run/data.json", "run/log.jsonl",
             "run/checkpoints/step-000002/state.json",
             "run/checkpoints/step-000002/optimizer.safetensors"), ("run/adapter",)),
        Row(f"train --model tiny --dataset data.jsonl --init_adapter run --output_dir out {_TRAIN}",
            _ADAPTER, ("out",)),
    ],
    "plan": [Row("plan --model tiny --memory 4GiB --cutoff_len 128", _BASE),
             Row("plan recipe.yaml --memory 4GiB", ("recipe.yaml",))],
    "generate": [
        Row("generate --model tiny --max_new_tokens 2 hi", _MODEL),
        Row("generate --adapter run --max_new_tokens 2 hi", _ADAPTER),
        Row("generate --model tiny --max_new_tokens 2 --input data.jsonl --output answers.jsonl",
            ("data.jsonl",), ("answers.jsonl",)),
    ],
    "chat": [Row("chat --model tiny --max_new_tokens 2", _MODEL, (), "hi\n/save talk.jsonl\n")],
    "run": [Row("run tiny.gguf --max_new_tokens 2", ("tiny.gguf",), (), "hi\n")],
    "download": [Row("download --source modelscope")],
    "export gguf": [
        Row("export gguf --model tiny --type q8_0 --output new.gguf --no_verify",
            _MODEL, ("new.gguf", "report.json")),
        Row("export gguf --model tiny --adapter run --type f16 --output new.gguf --modelfile --no_verify",
            _ADAPTER, ("new.gguf", "report.json", "new.gguf.Modelfile")),
        Row("export gguf --model tiny --adapter_only run --type f16 --output new.gguf --no_verify",
            _ADAPTER, ("new.gguf", "report.json")),
    ],
    "quantize bnb": [Row("quantize bnb --model tiny --bits 8 --output_dir new --no_verify",
                         _MODEL, ("new",))],
    "quantize gptq": [Row("quantize gptq --model tiny --bits 4 --calibration data.jsonl --output_dir new",
                          ("tiny/config.json",), ("new",))],
    "quantize awq": [Row("quantize awq --model tiny --bits 4 --calibration data.jsonl --output_dir new",
                         ("tiny/config.json",), ("new",))],
    "merge": [Row("merge --model tiny --adapter run --output_dir new --no_verify",
                  (*_MODEL, *_ADAPTER), ("new",))],
    "convert": [Row("convert --model tiny --to meta --output_dir new --no_verify", _WEIGHTS,
                    ("new",))],
    "adapter inspect": [Row("adapter inspect run", _ADAPTER)],
    "adapter upgrade": [Row("adapter upgrade run --output_dir new", _ADAPTER, ("new",))],
    "web": [Row("web --model tiny --host 256.0.0.1", _MODEL)],
    "demo": [Row("demo --output_dir data.jsonl")],
    "doctor": [Row("doctor tiny", _BASE)],
    "data check": [Row("data check data.jsonl --model tiny", ("data.jsonl", "tiny/tokenizer.json"))],
    "data stats": [Row("data stats data.jsonl --model tiny", ("data.jsonl", "tiny/tokenizer.json"))],
    "data preview": [Row("data preview data.jsonl --model tiny", ("data.jsonl",))],
    "data convert": [Row("data convert data.jsonl --output new.jsonl", ("data.jsonl",), ("new.jsonl",))],
    "version": [Row("version")],
}  # fmt: skip
# Files that a command can do without; an older checkpoint stands in for one that is damaged.
OPTIONAL = (
    "generation_config.json",
    "tokenizer_config.json",
    "vicuna.json",
    "data.json",
    "log.jsonl",
    "state.json",
    "optimizer.safetensors",
)


def make_place(folder: Path) -> Path:
    """A tiny base, data, a run of two steps, a recipe and a GGUF file."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tiny_model(folder / "tiny")
    write_data(folder / "data.jsonl", 12)
    recipe = {"model": "tiny", "dataset": ["data.jsonl"], "output_dir": "out", "max_steps": 2,
              "batch_size": 4, "cutoff_len": 128, "report_to": ["none"]}  # fmt: skip
    import yaml

    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = f"train --model tiny --dataset data.jsonl --output_dir run {_TRAIN}"
    for command in (words, "export gguf --model tiny --type f16 --output tiny.gguf --no_verify"):
        done = vicuna(folder, *command.split())
        assert done.code == 0, done.all
    (folder / "report.json").unlink()
    (folder / "place.json").write_text(json.dumps({"made": True}))
    return folder
