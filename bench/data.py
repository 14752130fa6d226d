"""How long preparing a data set takes next to the tokenizer alone, and in how much memory.

    python bench/data.py [--records 50000] [--json_array] [--file my.jsonl]

Makes records of about 220 characters from the sample data (sentences shuffled by a fixed seed), or
takes a file. (a) The tokenizer alone: the same texts through `encode_batch` on all cores. (b) What
`vicuna train` does before training: read, parse, check, render, encode, look for duplicates, store.
(c) The same again, from the cache. Each runs in a process of its own. Prints one JSON object:
seconds on the clock, CPU seconds of all processes, and after how long the first records were done,
which is what starting the worker processes costs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from vicuna.data.tokenizer import TokenizerData

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
    """The most memory a process and its children held together, sampled every 50 ms.

    Proportional set size: what processes share is counted once.
    """

    def __init__(self, process_id: int) -> None:
        self._process_id = process_id

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
        while not self._done.wait(0.05):
            total = 0
            for process in self._processes():
                try:
                    total += process.memory_full_info().pss
                except (psutil.Error, AttributeError):
                    continue
            self.peak = max(self.peak, total)

    def _processes(self) -> list[psutil.Process]:
        try:
            head = psutil.Process(self._process_id)
            return [head, *head.children(recursive=True)]
        except psutil.Error:  # it has ended
            return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=50_000)
    parser.add_argument("--json_array", action="store_true", help="one JSON array, as in 2023")
    parser.add_argument("--file", help="a data file of your own")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / (Path(options.file).name if options.file else "data.json")
        if options.file:
            path.symlink_to(Path(options.file).absolute())
        else:
            write(path, options.records, options.json_array)
        print(json.dumps(measure(path), ensure_ascii=False, indent=1))


def write(path: Path, records: int, array: bool) -> None:
    with path.open("w", encoding="utf-8") as f:
        f.write("[\n" if array else "")
        for i, record in enumerate(made_records(records)):
            comma = ",\n" if array and i else ""
            f.write(comma + json.dumps(record, ensure_ascii=False) + ("" if array else "\n"))
        f.write("\n]\n" if array else "")


def apart(work: Callable[[Path], dict[str, object]], path: Path) -> dict[str, object]:
    """What `work` finds in a process of its own, which holds nothing of what came before.

    Adds the CPU seconds of the process and of its children, and its peak memory.
    """
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(work, path, sending))
    process.start()
    sending.close()
    try:
        with PeakMemory(process.pid or 0) as memory:
            found: dict[str, object] = receiving.recv()
    finally:
        process.join()
    return {**found, "peak_memory_mib": round(memory.peak / 2**20)}


def _report(work: Callable[[Path], dict[str, object]], path: Path, to: Connection) -> None:
    to.send(work(path))


def cpu_seconds() -> float:
    """Of this process and of those of its children that have ended."""
    both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, both))


def vocabulary() -> TokenizerData:
    """The embedded base's; it is converted when it is first asked for."""
    from vicuna.model.base import EMBEDDED, locate
    from vicuna.model.vocabulary import load_vocabulary

    return load_vocabulary(locate(EMBEDDED))


def tokenizer_alone(path: Path) -> dict[str, object]:
    """(a): the texts of all records through the tokenizer, on all cores."""
    from tokenizers import Tokenizer as HFTokenizer

    from vicuna.data.records.read_file import read

    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    tokenizer = HFTokenizer.from_str(vocabulary().tokenizer_json)
    records = read(path, [])
    seconds = cpu = 0.0
    count = characters = 0
    while chunk := list(islice(records, 4096)):
        values = [
            json.loads(raw.value) if isinstance(raw.value, str) else raw.value for raw in chunk
        ]
        texts = [v[k] for v in values for k in ("instruction", "input", "output") if v.get(k)]
        count += len(chunk)
        characters += sum(map(len, texts))
        began, used = time.perf_counter(), cpu_seconds()
        tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        seconds += time.perf_counter() - began
        cpu += cpu_seconds() - used
    return {"records": count, "characters": characters, "seconds": seconds, "cpu": cpu}


def prepared(path: Path) -> dict[str, object]:
    """(b), or (c) when it is asked again: the data set made ready for training."""
    from vicuna import config
    from vicuna.data import dataset
    from vicuna.data.templates.registry import find_template
    from vicuna.data.templates.renderer import Renderer
    from vicuna.data.tokenizer import Tokenizer

    words = vocabulary()
    renderer = Renderer(find_template("auto", words), Tokenizer(words))
    os.environ["VICUNA_CACHE"] = str(path.parent / "cache")
    settings = config.build(config.DataSettings, {})
    said: list[float] = []
    began, used = time.perf_counter(), cpu_seconds()
    found, _ = dataset.load(
        [config.DatasetEntry(path=str(path))],
        settings,
        renderer,
        lambda _: said.append(time.perf_counter() - began),
    )
    return {
        "seconds": time.perf_counter() - began,
        "cpu": cpu_seconds() - used,
        "first": said[0] if said else 0.0,
        "tokens": int(found.column("length").sum()),
    }


def measure(path: Path) -> dict[str, object]:
    """All three, each in a process of its own; `path` lies in a folder that may be written to."""
    vocabulary()  # so that nobody converts the base while they are measured
    alone, whole, again = (apart(work, path) for work in (tokenizer_alone, prepared, prepared))
    count = int(str(alone["records"]))
    ratios = [float(str(whole[k])) / float(str(alone[k])) for k in ("seconds", "cpu")]
    return {
        "records": count,
        "characters_per_record": round(int(str(alone["characters"])) / count, 1),
        "tokens": whole["tokens"],
        "tokenizer_alone_seconds": _rounded(alone["seconds"]),
        "tokenizer_alone_cpu_seconds": _rounded(alone["cpu"]),
        "prepare_seconds": _rounded(whole["seconds"]),
        "prepare_cpu_seconds": _rounded(whole["cpu"]),
        "first_records_after_seconds": _rounded(whole["first"]),
        "from_cache_seconds": _rounded(again["seconds"]),
        "ratio": round(ratios[0], 3),
        "cpu_ratio": round(ratios[1], 3),
        "peak_memory_mib": whole["peak_memory_mib"],
        "cores": multiprocessing.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _rounded(seconds: object) -> float:
    return round(float(str(seconds)), 2)


if __name__ == "__main__":
    main()
