"""Texts to calibrate on: token ids of examples as the model was trained on them, or of plain text.

A quantiser rounds so that the results on these texts change least. So they should be what the model
will be asked: your own data in its own template.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import numpy as np

from vicuna.config import DatasetEntry, DataSettings
from vicuna.data import dataset
from vicuna.data.records.read_file import read
from vicuna.data.templates.renderer import Renderer
from vicuna.errors import UserError
from vicuna.hub import snapshot

SAMPLE = "sample"
# Plain text that papers calibrate and measure on: the hub's repository, the file in it, its column.
_PLAIN = {
    "wikitext2": (
        "Salesforce/wikitext",
        "wikitext-2-raw-v1/train-00000-of-00001.parquet",
        "main",
        "text",
    ),
    "ptb": (
        "ptb-text-only/ptb_text_only",
        "penn_treebank/train/0000.parquet",
        "refs/convert/parquet",
        "sentence",
    ),
    "c4": ("allenai/c4", "en/c4-train.00000-of-01024.json.gz", "main", "text"),
}
_SHORTEST = 8  # tokens


def texts_for(
    source: str, renderer: Renderer, count: int, longest: int, seed: int
) -> list[list[int]]:
    """Token ids of texts to calibrate on.

    Args:
        source: a data file of any format that training reads; `sample`, what comes with the
            package; wikitext2, ptb or c4, plain text from the hub.
        count: texts at most, drawn evenly by the seed where there are more.
        longest: tokens of a text; examples are cut there, plain text is split.

    Raises: UserError where there is no usable text.
    """
    if source in _PLAIN:
        return _plain(source, renderer, count, longest, seed)
    files = _samples() if source == SAMPLE else [source]
    settings = DataSettings(cutoff_len=max(longest, 16), overlong="cut")
    found, report = dataset.load([DatasetEntry(path=f) for f in files], settings, renderer)
    usable = [i for i in range(len(found)) if len(found[i].ids) >= _SHORTEST]
    if not usable:
        dropped = sum(f.dropped for f in report.files)
        raise UserError(
            "no text to calibrate on ({dropped} records dropped)",
            dropped=dropped,
            where=source,
            fix="vicuna data check says what is wrong with which record.",
        )
    return [found[usable[i]].ids[:longest].tolist() for i in _chosen(len(usable), count, seed)]


def _samples() -> list[str]:
    folder = Path(str(resources.files("vicuna.samples")))
    return [str(folder / name) for name in ("instruct_zh.jsonl", "chat_zh.jsonl")]


def _chosen(there: int, count: int, seed: int) -> list[int]:
    if there <= count:
        return list(range(there))
    picked = np.random.default_rng(seed).choice(there, count, replace=False)
    return sorted(int(i) for i in picked)


def _plain(source: str, renderer: Renderer, count: int, longest: int, seed: int) -> list[list[int]]:
    """Windows of one long text, as the papers take them."""
    path, column = _fetch(source)
    tokenizer, ids = renderer.tokenizer, []
    bos = tokenizer.data.bos_id
    needed = 4 * count * longest  # enough to draw from, of files that may have gigabytes
    for raw in read(path, []):
        record = json.loads(raw.value) if isinstance(raw.value, str) else raw.value
        if str(record[column]).strip():
            ids += tokenizer.text(str(record[column]) + "\n")
        if len(ids) > needed:
            break
    body = longest - (bos is not None)
    windows = [ids[i : i + body] for i in range(0, len(ids) - body + 1, body)]
    if not windows:
        raise UserError("the text is shorter than one window", where=source)
    lead = [] if bos is None else [bos]
    return [[*lead, *windows[i]] for i in _chosen(len(windows), count, seed)]


def _fetch(source: str) -> tuple[Path, str]:
    repository, name, revision, column = _PLAIN[source]
    where = f"calibration {source}"
    folder = snapshot(repository, [name], kind="dataset", where=where, revision=revision)
    return folder / name, column
