"""How long preparing a data set takes next to the tokenizer alone, and in how much memory.

    python bench/data.py [--records 50000] [--json_array] [--file my.jsonl]

Makes records of about 220 characters from the sample data (sentences shuffled by a fixed seed), or
takes a file. (a) The tokenizer alone: the same texts through `encode_batch` on all cores. (b) What
`vicuna train` does before training: read, parse, check, render, encode, look for duplicates, store.
(c) The same again, from the cache. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import psutil

SAMPLES = Path(__file__).parent.parent / "src/vicuna/samples"


def made_records(n: int) -> Iterator[dict[str, str]]:
    """Records of the sample data's sentences, about 220 characters each, hardly two alike."""
    lines = (SAMPLES / "instruct_zh.jsonl").read_text(encoding="utf-8").splitlines()
    sentences = [
        part + "。" for line in lines for part in json.loads(line)["output"].split("。") if part
    ]
    rng = random.Random(0)
    for i in range(n):
        answer = "".join(rng.choices(sentences, k=rng.randint(2, 12)))
        yield {"instruction": f"{rng.choice(sentences)}（{i}）", "input": "", "output": answer}


class PeakMemory:
    """The most memory this process and its children held together, sampled every 50 ms.

    Proportional set size: what processes share is counted once.
    """

    def __enter__(self) -> PeakMemory:
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._done.wait(0.05):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except (psutil.Error, AttributeError):
                    continue
            self.peak = max(self.peak, total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=50_000)
    parser.add_argument("--json_array", action="store_true", help="one JSON array, as in 2023")
    parser.add_argument("--file", help="a data file of your own")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(options.file) if options.file else Path(folder) / "data.json"
        if not options.file:
            write(path, options.records, options.json_array)
        print(json.dumps(measure(path, Path(folder) / "cache"), ensure_ascii=False, indent=1))


def write(path: Path, records: int, array: bool) -> None:
    with path.open("w", encoding="utf-8") as f:
        f.write("[\n" if array else "")
        for i, record in enumerate(made_records(records)):
            comma = ",\n" if array and i else ""
            f.write(comma + json.dumps(record, ensure_ascii=False) + ("" if array else "\n"))
        f.write("\n]\n" if array else "")


def measure(path: Path, cache: Path) -> dict[str, object]:
    from tokenizers import Tokenizer

    from vicuna import config
    from vicuna.data import dataset
    from vicuna.data.encode import Encoder
    from vicuna.data.read import read
    from vicuna.data.template import Renderer, find
    from vicuna.model.base import EMBEDDED, locate
    from vicuna.model.vocabulary import load_vocabulary

    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    vocabulary = load_vocabulary(locate(EMBEDDED))
    renderer = Renderer(find("auto", vocabulary), Encoder(vocabulary))
    os.environ["VICUNA_CACHE"] = str(cache)

    tokenizer = Tokenizer.from_str(vocabulary.tokenizer_json)
    records = read(path, [])
    alone = 0.0
    count = characters = 0
    while chunk := list(islice(records, 4096)):
        values = [
            json.loads(raw.value) if isinstance(raw.value, str) else raw.value for raw in chunk
        ]
        texts = [v[k] for v in values for k in ("instruction", "input", "output") if v.get(k)]
        count += len(chunk)
        characters += sum(map(len, texts))
        began = time.perf_counter()
        tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        alone += time.perf_counter() - began

    settings = config.build(config.DataSettings, {})
    entries = [config.DatasetEntry(path=str(path))]
    with PeakMemory() as memory:
        began = time.perf_counter()
        found, _ = dataset.load(entries, settings, renderer)
        whole = time.perf_counter() - began
    began = time.perf_counter()
    dataset.load(entries, settings, renderer)
    again = time.perf_counter() - began
    return {
        "records": count,
        "characters_per_record": round(characters / count, 1),
        "tokens": int(found.column("length").sum()),
        "tokenizer_alone_seconds": round(alone, 2),
        "prepare_seconds": round(whole, 2),
        "from_cache_seconds": round(again, 2),
        "ratio": round(whole / alone, 3),
        "peak_memory_mib": round(memory.peak / 2**20),
        "cores": multiprocessing.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
