"""Run as a process of its own: every digest and cache key that the product makes, as JSON.

    python fingerprint_probe.py BASE.folder BASE.gguf ADAPTER.bin.folder

in a folder with `data.jsonl`. The cache is $VICUNA_CACHE.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main(base: Path, gguf: Path, adapter: Path) -> None:
    import torch

    from vicuna.commands.train import run
    from vicuna.config import DatasetEntry, TrainSettings
    from vicuna.data import dataset as datasets
    from vicuna.data.templates.registry import find_template
    from vicuna.data.templates.renderer import Renderer
    from vicuna.data.tokenizer import Tokenizer
    from vicuna.export import gguf_cache
    from vicuna.files import file_hash
    from vicuna.llamacpp import build
    from vicuna.model import adapter as adapters
    from vicuna.model.base import locate, locate_vocabulary
    from vicuna.model.vocabulary import load_vocabulary

    torch.set_num_threads(1)
    told: dict[str, Any] = {}
    vocabulary = load_vocabulary(base)
    told["vocabulary"] = vocabulary.digest()
    entries = [DatasetEntry(path="data.jsonl"), DatasetEntry(path="data.jsonl", weight=2.0)]
    settings = TrainSettings(dataset=entries, cutoff_len=400, overlong="split")
    for name in ("auto", "alpaca", "chatml"):
        renderer = Renderer(find_template(name, vocabulary), Tokenizer(vocabulary))
        told[f"template {name}"] = renderer.template.digest
        told[f"saved template {name}"] = json.dumps(renderer.template.to_dict())
        recipe = datasets.preparation_spec(settings, renderer)
        told[f"recipe {name}"] = recipe.key(file_hash(Path("data.jsonl")))
        found, report = datasets.load(entries, settings, renderer)
        split = datasets.split(found, report, entries, 5, 4, seed=3)
        told[f"data {name}"] = split.digest
        told[f"order {name}"] = [split.sampler.step(k).tolist() for k in range(3)]
        told[f"questions {name}"] = found.column("question").tolist()
    files = adapters.read_adapter(str(adapter))
    told["base"] = adapters.identify(base)
    told["plain adapter"] = adapters.plain_folder(files).name
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    told["gguf adapter"] = gguf_cache.adapter_file(files, config).name
    told["gguf base"] = gguf_cache.base_file(base, "f16").name
    told["gguf vocabulary"] = locate_vocabulary(str(gguf)).name
    told["gguf as folder"] = locate(str(gguf)).name
    told["library"] = build.place("1").name
    words = f"--model {base} --dataset data.jsonl --output_dir run --max_steps 2 --batch_size 4"
    assert run([*words.split(), "--precision", "fp32", "--template", "auto"]) == 0
    for path in sorted(Path("run/adapter").iterdir()):
        told[f"run {path.name}"] = file_hash(path)
    told["run data"] = json.loads(Path("run/data.json").read_text(encoding="utf-8"))["digest"]
    cache = Path(os.environ["VICUNA_CACHE"])
    told["cache"] = sorted(str(p.relative_to(cache)) for p in cache.glob("*/*"))
    Path("told.json").write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
