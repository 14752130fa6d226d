"""Shipping: memory and speed of merging and GGUF export, and what each quantisation costs.

    python bench/ship.py memory  # peak memory against the largest file, random weights of 1B
    python bench/ship.py memory --shape 7b  # the same in the shape of 7B (27 GiB of disk)
    python bench/ship.py types   # the embedded base in every type: size, perplexity, speed
    python bench/ship.py imatrix --calibration zh.jsonl  # few bits, with and without importance
    python bench/ship.py plan    # what a 7B model needs to answer, type by type
    python bench/ship.py report  # tables and plot into docs/quantization.md

Each part writes its JSON into bench/results/; `report` reads what is there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchkit import machine, report
from memory import resident

HERE = Path(__file__).parent
RESULTS = HERE / "results"
DOCS = HERE.parent / "docs"
TYPES = (
    "f16", "q8_0", "q6_k", "q5_k_m", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0", "q3_k_l",
    "q3_k_m", "q3_k_s", "q2_k",
)  # fmt: skip
SHAPES: dict[str, dict[str, int]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
           "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
}  # fmt: skip
CONTEXTS = (512, 2048)
SHARD = 1 << 30


def main() -> None:
    """Run a part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["memory", "types", "imatrix", "plan", "report", "child"])
    parser.add_argument("--shape", choices=list(SHAPES), default="1b")
    parser.add_argument("--threads", type=int, default=machine.physical_threads())
    parser.add_argument("--data", default="", help="held-out data; else the packaged samples")
    parser.add_argument("--calibration", default="sample", help="what importance is measured on")
    parser.add_argument("--types", nargs="*", default=list(TYPES))
    parser.add_argument("--no-speed", action="store_true", help="on a machine that is not quiet")
    parser.add_argument("words", nargs="*")
    args = parser.parse_args()
    if args.part == "child":
        child(args.words)
        return
    if args.part == "report":
        write_docs()
        return
    parts = {"memory": memory, "types": types, "imatrix": imatrix, "plan": plan}
    found = parts[args.part](args)
    RESULTS.mkdir(exist_ok=True)
    name = f"ship-{args.part}" + (f"-{args.shape}" if args.part == "memory" else "")
    result = {"machine": machine.describe(args.threads), **found}
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(found, indent=1))


# -- memory and speed ----


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Merge and export random weights of a shape, each in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="vicuna-ship-", dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        base, adapter = folder / "base", folder / "adapter"
        make_base(base, SHAPES[args.shape])
        make_adapter(adapter, SHAPES[args.shape])
        largest = max(p.stat().st_size for p in base.glob("*.safetensors"))
        whole = sum(p.stat().st_size for p in base.glob("*.safetensors"))
        rows = {}
        for task in ("nothing", "copy", "merge", "f16", "q8_0", "q4_k_m"):
            runs = []
            for _ in range(2):  # the first may wait for memory that its machine gave away
                runs.append(run_child(task, base, adapter, folder / "out"))
                clear(folder / "out")
            rows[task] = {"seconds": min(r["seconds"] for r in runs),
                          "peak": max(r["peak"] for r in runs)}  # fmt: skip
            print(task, runs, file=sys.stderr)
    for row in rows.values():
        row["of_largest_file"] = max(row["peak"] - rows["nothing"]["peak"], 0) / largest
        row["of_copying"] = rows["copy"]["seconds"] / row["seconds"] if row["seconds"] else None
    return {
        "quiet": not args.no_speed, "shape": args.shape, "bytes": whole, "largest_file": largest,
        "tasks": rows,
    }  # fmt: skip


def make_base(folder: Path, shape: dict[str, int]) -> None:
    """Random weights of a shape in bf16, a file of at most 1 GiB after another."""
    import torch

    from vicuna.weights.safetensors_writer import Planned, write_sharded

    folder.mkdir()
    h, inner, kv = (
        shape["hidden_size"],
        shape["intermediate_size"],
        shape["hidden_size"] // shape["num_attention_heads"] * shape["num_key_value_heads"],
    )
    sizes = {"self_attn.q_proj": (h, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h),
             "self_attn.o_proj": (h, h), "mlp.gate_proj": (inner, h), "mlp.up_proj": (inner, h),
             "mlp.down_proj": (h, inner), "input_layernorm": (h,),
             "post_attention_layernorm": (h,)}  # fmt: skip
    names = {"model.embed_tokens.weight": (shape["vocab_size"], h)}
    for layer in range(shape["num_hidden_layers"]):
        names |= {f"model.layers.{layer}.{n}.weight": s for n, s in sizes.items()}
    names |= {"model.norm.weight": (h,), "lm_head.weight": (shape["vocab_size"], h)}
    noise = torch.randn(1 << 20).mul_(0.02).bfloat16()

    def values(size: tuple[int, ...]) -> Any:
        count = math.prod(size)
        return noise.repeat(-(-count // len(noise)))[:count].reshape(size)

    plan = [
        Planned(n, torch.bfloat16, s, lambda _, s=s: values(s), unit=0)  # type: ignore[misc]
        for n, s in names.items()
    ]
    write_sharded(folder, plan, SHARD)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5,
              "max_position_embeddings": 4096, "tie_word_embeddings": False, "hidden_act": "silu",
              "rope_theta": 10000.0, "torch_dtype": "bfloat16", **shape}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    make_tokenizer(folder)


def make_tokenizer(folder: Path) -> None:
    """A tokenizer of single bytes: what is measured are the weights."""
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1, **{c: i + 2 for i, c in enumerate(alphabet)}}
    tokenizer = HFTokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def make_adapter(folder: Path, shape: dict[str, int]) -> None:
    """A random LoRA of rank 8 on q and v of every layer."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    h = shape["hidden_size"]
    kv = h // shape["num_attention_heads"] * shape["num_key_value_heads"]
    tensors = {}
    for layer in range(shape["num_hidden_layers"]):
        for name, out in (("q_proj", h), ("v_proj", kv)):
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_"
            tensors[f"{at}A.weight"] = torch.randn(8, h) * 0.02
            tensors[f"{at}B.weight"] = torch.randn(out, 8) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def copy(source: Path, target: Path) -> None:
    """Copy the weights, onto the disk."""
    target.mkdir()
    for path in source.glob("*.safetensors"):
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb") as f:
            os.fsync(f.fileno())


def clear(path: Path) -> None:
    """Remove a file or folder."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def run_child(task: str, base: Path, adapter: Path, out: Path) -> dict[str, Any]:
    """A task in a process of its own: seconds, and its peak of memory."""
    words = [sys.executable, __file__, "child", task, str(base), str(adapter), str(out)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{task} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(words: list[str]) -> None:
    """What `run_child` starts. Libraries are imported before the clock starts."""
    task, base, adapter, out = words[0], *map(Path, words[1:4])
    import torch  # noqa: F401
    from transformers import AutoTokenizer  # noqa: F401

    from vicuna.commands import merge
    from vicuna.export.gguf_writer import write_base
    from vicuna.llamacpp.library import library
    from vicuna.model.adapter import read_adapter
    from vicuna.model.vocabulary import load_vocabulary

    library()
    load_vocabulary(base)
    files = read_adapter(str(adapter))
    began = time.perf_counter()
    if task == "merge":
        words = ["--model", str(base), "--adapter", str(adapter), "--output_dir", str(out)]
        merge.run([*words, "--no-verify", "--max_shard_size", "1GiB"])
    elif task == "copy":
        copy(base, out)
    elif task != "nothing":
        write_base(base, out, task, adapter=files)
    seconds = time.perf_counter() - began if task != "nothing" else 0.0
    # Not the peak of getrusage, which begins with that of the process that started this one.
    print(json.dumps({"seconds": seconds, "peak": resident("VmHWM")}))


# -- the embedded base in every type ----


def types(args: argparse.Namespace) -> dict[str, Any]:
    """Size, perplexity on held-out text, and speed of each type."""
    from vicuna.export.gguf_writer import write_base
    from vicuna.model.base import EMBEDDED, locate

    folder = locate(EMBEDDED)
    texts = held_out(folder, args.data)
    rows = {}
    with tempfile.TemporaryDirectory(prefix="vicuna-ship-") as name:
        for kind in args.types:
            path = Path(name) / f"{kind}.gguf"
            write_base(folder, path, kind)
            row: dict[str, Any] = {"bytes": path.stat().st_size}
            row["perplexity"] = {k: perplexity(path, ids, args.threads) for k, ids in texts.items()}
            if not args.no_speed:
                row |= speed(path, args.threads)
            rows[kind] = row
            print(kind, row, file=sys.stderr)
            path.unlink()
    return {"model": EMBEDDED, "types": rows}


def held_out(folder: Path, data: str) -> Any:
    """Texts to compare types on, as token ids."""
    from vicuna.config import VerifySettings
    from vicuna.data.tokenizer import Tokenizer
    from vicuna.model.vocabulary import load_vocabulary
    from vicuna.verify.texts import texts_for

    settings = VerifySettings(verify_data=data, verify_tokens=2048)
    return texts_for(settings, Tokenizer(load_vocabulary(folder)))


def imatrix(args: argparse.Namespace) -> dict[str, Any]:
    """Perplexity of types of few bits, with an importance matrix and without."""
    from vicuna.commands import export
    from vicuna.model.base import EMBEDDED, locate

    texts = held_out(locate(EMBEDDED), args.data)
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="vicuna-ship-") as name:
        matrix = Path(name) / "first.imatrix.gguf"
        for kind in args.types:
            for key, words in (("without", []), ("with", ["--imatrix"])):
                path = Path(name) / ("first.gguf" if words else "plain.gguf")
                if words:  # measured once, and kept by the command beside its first file
                    words.append(str(matrix) if matrix.exists() else args.calibration)
                started = ["--type", kind, "--model", EMBEDDED, "--output", str(path), "--force"]
                export.run([*started, "--no-verify", *words])
                found = {k: perplexity(path, ids, args.threads) for k, ids in texts.items()}
                rows.setdefault(kind, {})[key] = found
                print(kind, key, found, file=sys.stderr)
    return {"model": EMBEDDED, "calibration": Path(args.calibration).name, "types": rows}


def perplexity(path: Path, texts: Any, threads: int) -> float:
    """Of texts under a GGUF file, computed by llama.cpp."""
    from vicuna.verify.logits import GgufLogits

    scorer = GgufLogits(path, threads=threads)
    loss, count = 0.0, 0
    try:
        for ids, scores in zip(texts, scorer.logits(texts)):
            rows = scores[:-1].astype(np.float64)
            rows -= rows.max(axis=1, keepdims=True)
            logs = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
            loss -= float(logs[np.arange(len(rows)), ids[1:]].sum())
            count += len(rows)
    finally:
        scorer.close()
    return math.exp(loss / count)


def speed(path: Path, threads: int) -> dict[str, float]:
    """Tokens a second: a prompt of 256, then one after another."""
    from vicuna.generate.engines.llamacpp import LlamaCppEngine

    prompt = [(7 * i) % 4000 + 10 for i in range(256)]
    with LlamaCppEngine(path, context_length=512, threads=threads) as engine:
        engine.prefill(prompt[:8])
        engine.reset()
        began = time.perf_counter()
        engine.prefill(prompt)
        read = time.perf_counter() - began
        began = time.perf_counter()
        for i in range(64):
            engine.step([(11 * i) % 4000 + 10], [0])
        said = time.perf_counter() - began
    return {"prompt_tokens_per_second": 256 / read, "tokens_per_second": 64 / said}


# -- 7B, by plan ----


def plan(args: argparse.Namespace) -> dict[str, Any]:
    """Bytes that a 7B model needs to answer: weights by the mix, keys and values, buffers."""
    shape = SHAPES["7b"]
    rows = {}
    # llama.cpp's compute buffer: 512 tokens through the widest layer, and their scores.
    buffers = 512 * 4 * (shape["vocab_size"] + 4 * shape["intermediate_size"])
    width = shape["hidden_size"] // shape["num_attention_heads"] * shape["num_key_value_heads"]
    for kind in args.types:
        weights = planned_bytes(kind, shape)
        row = {"weights": weights, "buffers": buffers}
        for tokens in CONTEXTS:
            cache = 2 * shape["num_hidden_layers"] * width * tokens * 2  # keys and values, f16
            row[f"total_{tokens}"] = weights + buffers + cache
        rows[kind] = row
    return {"shape": "7b", "contexts": CONTEXTS, "types": rows}


def planned_bytes(kind: str, shape: dict[str, int]) -> int:
    """Bytes of a file of a type, tensor by tensor as it would be written."""
    from vicuna.export.ggml import stored_shape
    from vicuna.export.gguf_types import Model, kind_of

    h, inner = shape["hidden_size"], shape["intermediate_size"]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    kv = h // heads * kv_heads
    model = Model("llama", shape["num_hidden_layers"], heads // kv_heads, False)
    parts = {"attn_q": (h, h), "attn_k": (kv, h), "attn_v": (kv, h), "attn_output": (h, h),
             "ffn_gate": (inner, h), "ffn_up": (inner, h), "ffn_down": (h, inner)}  # fmt: skip
    tensors = {
        f"blk.{i}.{n}.weight": s
        for i in range(shape["num_hidden_layers"])
        for n, s in parts.items()
    }
    tensors |= dict.fromkeys(("token_embd.weight", "output.weight"), (shape["vocab_size"], h))
    return sum(
        math.prod(stored_shape(size, kind_of(name, size, kind, model)))
        for name, size in tensors.items()
    )


# -- the page ----


def write_docs() -> None:
    """Tables between their markers, and the plot."""
    page = DOCS / "quantization.md"
    if (found := _read("ship-types")) is not None:
        picture = "![Perplexity against size](images/quantization.png)"
        report.write("types", f"{types_table(found)}\n\n{picture}", page)
        plot(found, DOCS / "images" / "quantization.png")
    if (found := _read("ship-imatrix")) is not None:
        report.write("imatrix", imatrix_table(found), page)
    if (found := _read("ship-plan")) is not None:
        report.write("plan", plan_table(found), page)
    sizes = [r for s in SHAPES if (r := _read(f"ship-memory-{s}")) is not None]
    if sizes:
        report.write("memory", "\n\n".join(map(memory_table, sizes)), page)


def _read(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def types_table(found: dict[str, Any]) -> str:
    rows = found["types"]
    full = rows["f16"]
    kinds = list(full["perplexity"])
    names = {"zh": "Chinese", "en": "English", "data": "data"}
    timed = [k for k in ("prompt_tokens_per_second", "tokens_per_second") if k in full]
    head = ["type", "MiB", *(f"perplexity, {names[k]}" for k in kinds)]
    head += [k.replace("_per_second", "/s").replace("_", " ") for k in timed]
    lines = []
    for kind, row in rows.items():
        cells = [kind.upper(), f"{row['bytes'] / 2**20:.0f}"]
        for k in kinds:
            change = row["perplexity"][k] / full["perplexity"][k] - 1
            more = "" if kind == "f16" else f" ({change:+.1%})"
            cells.append(f"{row['perplexity'][k]:.2f}{more}")
        lines.append([*cells, *(f"{row[k]:.0f}" for k in timed)])
    return f"{report.machine_words(found['machine'])}\n\n{report.table(head, lines)}"


def imatrix_table(found: dict[str, Any]) -> str:
    rows = found["types"]
    kinds = list(next(iter(rows.values()))["without"])
    names = {"zh": "Chinese", "en": "English", "data": "data"}
    lines = []
    for kind, row in rows.items():
        cells = [kind.upper()]
        for k in kinds:
            without, given = row["without"][k], row["with"][k]
            cells += [f"{without:.2f}", f"{given:.2f} ({given / without - 1:+.1%})"]
        lines.append(cells)
    head = ["type", *(c for k in kinds for c in (f"{names[k]}, without", "with"))]
    about = f"Importance from {found['calibration']}. {report.machine_words(found['machine'])}"
    return f"{about}\n\n{report.table(head, lines)}"


def plan_table(found: dict[str, Any]) -> str:
    keys = ["weights", "buffers", *(f"total_{n}" for n in found["contexts"])]
    lines = [
        [kind.upper(), *(f"{row[k] / 1e9:.2f}" for k in keys)]
        for kind, row in found["types"].items()
    ]
    totals = (f"in all, {n:,} tokens of context" for n in found["contexts"])
    return report.table(["type", "weights, GB", "buffers", *totals], lines)


def memory_table(found: dict[str, Any]) -> str:
    base, quiet = found["tasks"]["nothing"]["peak"], found["quiet"]
    lines = []
    for task, row in found["tasks"].items():
        if task == "nothing":
            continue
        plain = task in ("copy", "merge")
        name = task if plain else f"export {task.upper()}, adapter merged on the way"
        cells = [name, f"{max(row['peak'] - base, 0) / 2**20:.0f}", f"{row['of_largest_file']:.2f}"]
        speed = [f"{row['seconds']:.1f}", f"{row['of_copying']:.2f}"] if quiet else []
        lines.append([*cells, *speed])
    head = ["", "memory, MiB", "of the largest file"]
    head += ["seconds", "of copying's speed"] if quiet else []
    about = (
        f"Shape {found['shape'].upper()}: {found['bytes'] / 2**30:.2f} GiB in files of at most "
        f"{found['largest_file'] / 2**20:.0f} MiB. Memory is the process's peak above what the "
        f"imported libraries take ({base / 2**20:.0f} MiB); seconds are the better of two runs, "
        "copying among them, each in a process of its own, until all is on the disk. "
        f"{report.machine_words(found['machine'])}"
    )
    return f"{about}\n\n{report.table(head, lines)}"


def plot(found: dict[str, Any], path: Path) -> None:
    """Perplexity against size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), dpi=100)
    rows = found["types"]
    for kind, colour in zip(rows["f16"]["perplexity"], ("tab:red", "tab:blue")):
        full = rows["f16"]["perplexity"][kind]
        x = [r["bytes"] / 2**20 for r in rows.values()]
        y = [r["perplexity"][kind] / full for r in rows.values()]
        label = {"zh": "Chinese", "en": "English"}.get(kind, kind)
        axes.scatter(x, y, s=18, color=colour, label=label)
    for name, row in rows.items():
        top = max(row["perplexity"][k] / rows["f16"]["perplexity"][k] for k in row["perplexity"])
        axes.annotate(name, (row["bytes"] / 2**20, top), fontsize=6, xytext=(2, 3),
                      textcoords="offset points")  # fmt: skip
    axes.set_xlabel("MiB")
    axes.set_ylabel("perplexity / that of F16")
    axes.set_title(f"{found['model']}", fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
