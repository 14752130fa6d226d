"""How fast answers come: beams, greedy, further turns of a chat, and what the strategies cost.

    python bench/decode.py                     # the embedded base, prompt of 512, 128 new tokens
    python bench/decode.py --only beams --out found.json  # a part; added to those in the file
    python bench/decode.py --tiny              # seconds: everything runs, the figures say nothing
    python bench/decode.py --write-docs        # puts the tables into docs/performance.md

Contenders take turns in one process, each with the same prompt and the same settings, and the best
of `--repeats` runs of each counts: what else the machine does can only slow a run down. Ratios are
against transformers' `generate` in fp32, which does not stream beams at all.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchkit import machine, report
from vicuna.data.templates.registry import find_template
from vicuna.data.templates.renderer import Renderer
from vicuna.data.tokenizer import Tokenizer
from vicuna.generate.decode import Settings, decode
from vicuna.generate.events import Finished
from vicuna.model.vocabulary import load_vocabulary

TEXT = (
    "春天来了，公园里的花都开了，孩子们在草地上放风筝，老人们坐在长椅上聊天。"
    "请根据下面的材料写一篇短文，介绍这座城市的历史、风景、美食和人们的生活。"
)

NATIVE = ", built for this CPU"
PARTS = ["beams", "greedy", "chat", "overhead"]


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    bench = Bench(options)
    results: dict[str, Any] = {}
    if options.only != PARTS and options.out and options.out.exists():
        results = json.loads(options.out.read_text("utf-8"))
    results |= {
        "machine": machine.describe(options.threads),
        "settings": {k: v for k, v in vars(options).items() if k not in ("out", "write_docs")},
        **{part: getattr(bench, part)() for part in options.only},
    }
    if options.out:
        options.out.write_text(json.dumps(results, indent=1, ensure_ascii=False), "utf-8")
    if missing := [part for part in PARTS if part not in results]:
        print(json.dumps(results, indent=1, ensure_ascii=False))
        print(f"no tables yet: {', '.join(missing)} not measured")
        return
    text = tables(results)
    print(text)
    if options.write_docs:
        report.write("decode", text)


def _options() -> Any:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=128, help="new tokens of an answer")
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--chat", type=int, default=1500, help="tokens of the chat's history")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=machine.physical_threads())
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--tiny", action="store_true", help="a tiny random Llama, no llama.cpp")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("--write-docs", action="store_true")
    options = parser.parse_args()
    if options.tiny:
        options.prompt, options.new, options.chat, options.repeats = 40, 8, 80, 1
    return options


class Bench:
    """The contenders, opened once."""

    def __init__(self, options: Any) -> None:
        from transformers import AutoModelForCausalLM, LlamaConfig

        from vicuna.generate.engines.torch import open_engine
        from vicuna.model.base import EMBEDDED, locate

        self.o = options
        folder = locate(EMBEDDED)
        words = load_vocabulary(folder)
        self.renderer = Renderer(find_template("auto", words), Tokenizer(words))
        if options.tiny:
            shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
            heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
            config = LlamaConfig(vocab_size=49152, **shape, **heads)
            self.model = AutoModelForCausalLM.from_config(config).eval()
        else:
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        # A copy, laid out for answering as `vicuna generate` has it; `generate` keeps its own.
        ours = copy.deepcopy(self.model)
        self.engines: dict[str, Any] = {"torch": open_engine(ours, 4096, alone=True)}
        if not options.tiny:
            self._open_llamacpp(folder)

    def _open_llamacpp(self, folder: Path) -> None:
        """Of each type of weights an engine over the wheel's library; and over the one that was
        built for this CPU (`vicuna.llamacpp.build`), where it was."""
        from vicuna.export.gguf_cache import base_file
        from vicuna.export.gguf_writer import write_base
        from vicuna.llamacpp import build, library

        f16 = base_file(folder, "f16")
        small = Path(tempfile.mkdtemp()) / "q4_k_m.gguf"
        os.environ[library.OWN_BUILD] = library.WHEEL
        write_base(folder, small, "q4_k_m")
        files = (("llama.cpp F16", f16), ("llama.cpp Q4_K_M", small))
        self._open_each(files, "")
        if built := build.found(library.VERSION):
            os.environ[library.OWN_BUILD] = str(built)
            library.library.cache_clear()  # engines keep the library they were opened with
            self._open_each(files, NATIVE)

    def _open_each(self, files: Sequence[tuple[str, Path]], suffix: str) -> None:
        from vicuna.generate.engines.llamacpp import LlamaCppEngine

        room = 3 * self.o.new + 64
        for name, file in files:
            self.engines[name + suffix] = LlamaCppEngine(
                file, self.o.chat + 512, spare=lambda _: room, threads=self.o.threads
            )

    def prompt(self, tokens: int) -> list[int]:
        """A prompt of exactly so many tokens, of Chinese text."""
        ids = self.renderer.tokenizer.text(TEXT * (1 + tokens // 20))
        return ids[:tokens]

    # -- the measurements ------------------------------------------------------------------------

    def beams(self) -> dict[str, Any]:
        """Seconds for a whole answer with beams, streaming but for `generate`."""
        prompt = self.prompt(self.o.prompt)
        exact = Settings(
            num_beams=self.o.beams, max_new_tokens=self.o.new, min_new_tokens=self.o.new
        )
        runs = {"transformers generate": lambda: self.reference(prompt, self.o.beams)}
        runs |= {n: self.answering(e, prompt, exact) for n, e in self.engines.items()}
        found = self.in_turn(runs)
        theirs, ours = self.answers["transformers generate"], self.answers["torch"]
        caches = {"transformers generate": self.reference_cache, "torch": self.peak_cache}
        return {"seconds": found, "same_tokens": theirs == ours, "cache_bytes": caches}

    def greedy(self) -> dict[str, Any]:
        """The same without beams; and llama.cpp's own loop beside ours."""
        prompt = self.prompt(self.o.prompt)
        plain = Settings(max_new_tokens=self.o.new, min_new_tokens=self.o.new)
        runs = {"transformers generate": lambda: self.reference(prompt, 1)}
        runs |= {n: self.answering(e, prompt, plain) for n, e in self.engines.items()}
        for name in ("llama.cpp F16", f"llama.cpp F16{NATIVE}"):
            if name in self.engines:
                runs[f"{name}, its own loop"] = partial(self.bare_loop, name, prompt)
        found = self.in_turn(runs)
        same = self.answers["transformers generate"] == self.answers["torch"]
        return {"seconds": found, "same_tokens": same}

    def chat(self) -> dict[str, Any]:
        """Seconds to the first token of a chat's fifth turn, with its history known and anew.

        Five turns of one length, a third of it the question. What is known is all but the fifth
        question: earlier questions were read, earlier answers were computed when they were given.
        """
        prompt = self.prompt(self.o.chat)
        turn = len(prompt) // 5
        turns = [prompt[: len(prompt) - turn // 3], prompt]
        first = Settings(max_new_tokens=1)
        found = {}
        for name, engine in self.engines.items():
            self.share_threads(engine)
            known, anew = [], []
            for _ in range(self.o.repeats):
                engine.reset()
                for ids in turns:
                    seconds = self.first_token(engine, ids, first)
                known.append(seconds)
                engine.reset()
                anew.append(self.first_token(engine, turns[-1], first))
            found[name] = {"known": min(known), "anew": min(anew)}
        return found

    def overhead(self) -> dict[str, Any]:
        """Share of an answer's time that is not the engine's, with beams; early and late in it."""
        prompt = self.prompt(self.o.prompt)
        exact = Settings(
            num_beams=self.o.beams, max_new_tokens=self.o.new, min_new_tokens=self.o.new
        )
        found = {}
        for name, engine in self.engines.items():
            self.share_threads(engine)
            timed = Timed(engine)
            engine.reset()
            marks = [
                (time.perf_counter(), timed.seconds)
                for _ in decode(timed, prompt, exact, self.renderer)
            ]
            # Of each step but the first, which waits for the prompt: seconds outside and inside.
            steps = [(b[0] - a[0] - (b[1] - a[1]), b[1] - a[1]) for a, b in pairwise(marks[1:-1])]
            outside = [s[0] for s in steps]
            third = max(1, len(outside) // 3)
            found[name] = {
                "share": sum(outside) / sum(map(sum, steps)),
                "milliseconds": 1000 * statistics.median(outside),
                "late_to_early": statistics.median(outside[-third:])
                / statistics.median(outside[:third]),
            }
        return found

    def share_threads(self, engine: Any = None) -> None:
        """PyTorch's threads as a command has them: one beside llama.cpp."""
        beside = engine is not None and not hasattr(engine, "tree")
        torch.set_num_threads(1 if beside else self.o.threads)

    # -- how each is run -------------------------------------------------------------------------

    def in_turn(self, runs: dict[str, Callable[[], list[int]]]) -> dict[str, float]:
        """The best time of each, taken in turn; their answers stay in `answers`."""
        times: dict[str, list[float]] = {name: [] for name in runs}
        self.answers = {}
        for _ in range(self.o.repeats):
            for name, run in runs.items():
                began = time.perf_counter()
                self.answers[name] = run()
                times[name].append(time.perf_counter() - began)
        return {name: min(found) for name, found in times.items()}

    def reference(self, prompt: Sequence[int], beams: int) -> list[int]:
        self.share_threads()
        ids = torch.tensor([list(prompt)])
        with torch.no_grad():
            out = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), num_beams=beams, do_sample=False,
                max_new_tokens=self.o.new, min_new_tokens=self.o.new, use_cache=True,
                eos_token_id=sorted(self.renderer.stop_ids), pad_token_id=0,
                return_dict_in_generate=True,
            )  # fmt: skip
        layers = out.past_key_values.layers
        self.reference_cache = sum(x.keys.nbytes + x.values.nbytes for x in layers)
        return out.sequences[0, len(prompt) :].tolist()

    def answering(
        self, engine: Any, prompt: Sequence[int], settings: Settings
    ) -> Callable[[], list[int]]:
        def run() -> list[int]:
            self.share_threads(engine)
            engine.reset()
            if hasattr(engine, "tree"):
                self.peak_cache = 0
            for event in decode(engine, prompt, settings, self.renderer):
                if hasattr(engine, "tree"):
                    self.peak_cache = max(self.peak_cache, engine.tree.memory)
                if isinstance(event, Finished):
                    return list(event.token_ids)
            raise AssertionError("an answer always ends with Finished")

        return run

    def bare_loop(self, name: str, prompt: Sequence[int]) -> list[int]:
        """What the library does by itself: a call for the prompt, one for each token, the maximum
        of the scores."""
        context = self.engines[name]._context
        self.share_threads(self.engines[name])
        self.engines[name].reset()
        context.decode(prompt, range(len(prompt)), [0] * len(prompt), 1)
        said = [int(context.logits(1)[0].argmax())]
        while len(said) < self.o.new:
            context.decode([said[-1]], [len(prompt) + len(said) - 1], [0], 1)
            said.append(int(context.logits(1)[0].argmax()))
        self.engines[name].reset()
        return said

    def first_token(self, engine: Any, prompt: Sequence[int], settings: Settings) -> float:
        for event in decode(engine, prompt, settings, self.renderer):
            if isinstance(event, Finished):
                return event.first_token_seconds
        raise AssertionError("an answer always ends with Finished")


class Timed:
    """An engine, and the seconds spent in it."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.seconds = engine, 0.0
        self.context_length, self.max_rows = engine.context_length, engine.max_rows

    def reset(self) -> None:
        self.engine.reset()

    def prefill(self, *args: Any) -> Any:
        return self._timed(self.engine.prefill, *args)

    def step(self, *args: Any) -> Any:
        return self._timed(self.engine.step, *args)

    def _timed(self, call: Callable[..., Any], *args: Any) -> Any:
        began = time.perf_counter()
        try:
            return call(*args)
        finally:
            self.seconds += time.perf_counter() - began


def tables(r: dict[str, Any]) -> str:
    """The results as Markdown."""
    o = r["settings"]
    parts = [report.machine_words(r["machine"])]
    for kind, title in (("beams", f"{o['beams']} beams"), ("greedy", "Greedy")):
        seconds = r[kind]["seconds"]
        base = seconds["transformers generate"]
        rows = [
            [name, f"{s:.2f}", f"{o['new'] / s:.1f}", f"{base / s:.2f} x"]
            for name, s in seconds.items()
        ]
        same = "the same tokens" if r[kind]["same_tokens"] else "other tokens"
        parts.append(f"{title}, prompt of {o['prompt']}, {o['new']} new tokens:")
        parts.append(report.table(["", "seconds", "tokens/s", "against generate"], rows))
        parts.append(f"`torch` gives {same} as `generate`.")
    cache = r["beams"]["cache_bytes"]
    ours, theirs = cache["torch"] / 2**20, cache["transformers generate"] / 2**20
    parts.append(
        f"Keys and values of the {o['beams']} beams take {ours:.0f} MiB on `torch` at most, "
        f"{ours / theirs:.2f} of `generate`'s {theirs:.0f}."
    )
    parts.append(f"First token of the fifth turn of a chat of {o['chat']} tokens:")
    rows = [
        [n, f"{c['known']:.2f} s", f"{c['anew']:.2f} s", f"{c['known'] / c['anew']:.2f}"]
        for n, c in r["chat"].items()
    ]
    parts.append(report.table(["", "history known", "computed anew", "ratio"], rows))
    parts.append(f"Outside the engine, with {o['beams']} beams:")
    rows = [
        [n, f"{100 * c['share']:.1f} %", f"{c['milliseconds']:.2f}", f"{c['late_to_early']:.2f}"]
        for n, c in r["overhead"].items()
    ]
    head = ["", "share of a step", "milliseconds", "last third to first third"]
    return "\n\n".join([*parts, report.table(head, rows)])


if __name__ == "__main__":
    main()
