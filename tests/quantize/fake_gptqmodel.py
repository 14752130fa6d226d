"""A stand-in for the worker: it speaks as `vicuna.quantize.worker` does, and computes with plain
transformers in this very environment. What it writes is the base itself, marked as quantised, with
the weights moved by `noise`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

MARK = "@vicuna "


def say(**words: object) -> None:
    print(f"\n{MARK}{json.dumps(words)}", file=sys.stderr, flush=True)


def quantize(job: dict) -> None:
    from safetensors.torch import load_file, save_file

    source, target = Path(job["model"]), Path(job["output"])
    say(layers=2)
    for name in ("config.json", "generation_config.json"):
        shutil.copyfile(source / name, target / name)
    noise = {2: 3.0, 3: 1.0, 4: 0.004, 8: 0.0}[job["bits"]]
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            import torch

            shift = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
            tensors[name] = (tensor + shift * noise).to(tensor.dtype)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {k: job[k] for k in ("method", "bits", "group_size")}
    (target / "config.json").write_text(json.dumps(config))
    (target / "quant_log.csv").write_text("layer\n")
    (target / "job.json").write_text(json.dumps(job))
    for done in (1, 2):
        say(done=done)


def load(job: dict):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = Path(job["model"])
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    from safetensors.torch import load_file

    model = LlamaForCausalLM(LlamaConfig(**config)).float().eval()
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    return model


def answer(job: dict) -> None:
    import numpy as np
    import torch

    model, ids = load(job), list(job["prompt"])
    while len(ids) - len(job["prompt"]) < job["longest"] and ids[-1] not in job["ends"]:
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    sys.stdout.buffer.write(np.array(ids[len(job["prompt"]) :], np.int64).tobytes())


def scores(job: dict) -> None:
    import numpy as np
    import torch

    model = load(job)
    for ids in job["texts"]:
        with torch.no_grad():
            found = model(input_ids=torch.tensor([ids])).logits[0].float().numpy()
        sys.stdout.buffer.write(np.array(found.shape, np.int64).tobytes() + found.tobytes())


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[2]).read_text())
    if given.get("group_size") == 16:
        print("a line of the library's own", file=sys.stderr)
        say(error="ValueError: no kernel for this")
        sys.exit(1)
    {"quantize": quantize, "scores": scores, "answer": answer}[sys.argv[1]](given)
