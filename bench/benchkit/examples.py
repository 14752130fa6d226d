"""The examples of a benchmark: chosen, rendered and tokenised once, the same for every contender.

A peer gets the token ids themselves, and the prompt and completion as text where it wants text.
Ours gets the records as they stand in the data file. Whoever prepares data by itself reports hashes
of what it got, and `disagreeing` counts the examples that came out otherwise.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vicuna.data.loss_mask import NO_TARGET as NOTHING
from vicuna.data.loss_mask import Example
from vicuna.data.records.formats import parse
from vicuna.data.records.read_file import read
from vicuna.data.sampler import Sampler, WeightedIndices
from vicuna.data.templates.registry import find_template
from vicuna.data.templates.renderer import Renderer
from vicuna.data.tokenizer import Piece, Tokenizer
from vicuna.model.vocabulary import load_vocabulary

TEMPLATE = "alpaca"


@dataclass(frozen=True)
class Item:
    """One record, as text and as ids. start: the first supervised position of `example.ids`."""

    value: dict[str, Any]
    prompt: str
    completion: str
    example: Example
    start: int


@dataclass(frozen=True)
class Selection:
    """The records of a benchmark and the order in which an epoch sees them.

    order: indices into `items`, `updates * batch` of them. asked: how many records were wanted.
    """

    items: list[Item]
    order: list[int]
    updates: int
    batch: int
    seed: int
    asked: int
    cutoff: int
    end_id: int

    @property
    def ordered(self) -> list[Item]:
        """The items of all updates, one update after another."""
        return [self.items[i] for i in self.order]

    @property
    def tokens(self) -> int:
        """Real tokens: those of the examples as if each stood alone."""
        return sum(len(i.example.ids) for i in self.ordered)

    @property
    def supervised(self) -> int:
        """Tokens with a target."""
        return sum(int((i.example.labels != NOTHING).sum()) for i in self.ordered)

    def describe(self) -> dict[str, Any]:
        """What the results say about the data."""
        lengths = [len(i.example.ids) for i in self.ordered]
        return {
            "records": len(self.items),
            "records_asked": self.asked,
            "examples_trained_on": len(self.order),
            "updates": self.updates,
            "batch": self.batch,
            "cutoff": self.cutoff,
            "real_tokens": self.tokens,
            "supervised_tokens": self.supervised,
            "longest": max(lengths, default=0),
            "mean_length": round(self.tokens / max(1, len(lengths)), 1),
            "template": TEMPLATE,
        }


def renderer_of(folder: Path) -> Renderer:
    """The template of the benchmark with a model's tokenizer."""
    vocabulary = load_vocabulary(folder)
    return Renderer(find_template(TEMPLATE, vocabulary), Tokenizer(vocabulary))


def select(
    path: Path, renderer: Renderer, records: int, cutoff: int, batch: int, updates: int, seed: int
) -> Selection:
    """Take `records` records of at most `cutoff` tokens, in an order decided by `seed`.

    Args:
        updates: how many updates; 0 is as many as the records fill. No record is used twice.

    Raises: SystemExit where the file has not even one update's worth.
    """
    raws = list(read(path, []))
    random.Random(seed).shuffle(raws)
    items: list[Item] = []
    for raw in raws:
        if len(items) == records:
            break
        value = json.loads(raw.value) if isinstance(raw.value, str) else raw.value
        item = _item(raw, value, renderer)
        if item is not None and len(item.example.ids) <= cutoff:
            items.append(item)
    batch = min(batch, len(items)) or 1
    full = len(items) // batch
    if not full:
        raise SystemExit(f"{path}: no usable record of at most {cutoff} tokens")
    updates = min(updates or full, full)
    order = Sampler([WeightedIndices(np.arange(len(items)))], batch, seed)
    taken = [int(i) for k in range(updates) for i in order.step(k)]
    return Selection(items, taken, updates, batch, seed, records, cutoff, renderer.end_id)


def _item(raw: Any, value: Any, renderer: Renderer) -> Item | None:
    """One record rendered; None for what is not one question and one answer."""
    conversation = parse(raw).conversation
    if conversation is None or not isinstance(value, dict):
        return None
    rendered = renderer.template.examples(conversation)
    if len(rendered) != 1:
        return None
    segments = rendered[0]
    taught = [s.in_loss for s in segments]
    first = taught.index(True) if any(taught) else 0
    if not first or not all(taught[first:]):
        return None
    example = renderer.tokenizer.encode(segments, renderer.end_id)
    targets = np.flatnonzero(example.labels != NOTHING)
    if not len(targets):
        return None
    return Item(
        value, _text(segments[:first]), _text(segments[first:]), example, int(targets[0]) + 1
    )


def _text(segments: Sequence[Piece]) -> str:
    return "".join(s.text for s in segments if s.kind in ("mark", "text"))


def write(selection: Selection, folder: Path) -> None:
    """records.jsonl for ours, in file order; examples.jsonl for the peers, in training order."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "records.jsonl").open("w", encoding="utf-8") as f:
        for item in selection.items:
            f.write(json.dumps(item.value, ensure_ascii=False) + "\n")
    with (folder / "examples.jsonl").open("w", encoding="utf-8") as f:
        for item in selection.ordered:
            line = {
                "prompt": item.prompt,
                "completion": item.completion,
                "input_ids": item.example.ids.tolist(),
                "start": item.start,
            }
            f.write(json.dumps(line, ensure_ascii=False) + "\n")


def fingerprint(ids: Sequence[int], supervised: int) -> str:
    """A hash of an example's ids and of how many are learned; `peers/common.py` has it too."""
    text = ",".join(map(str, ids)) + f";{supervised}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def disagreeing(selection: Selection, found: Sequence[str]) -> int:
    """Examples of the selection that a contender tokenised otherwise."""
    wanted = Counter(
        fingerprint(i.example.ids.tolist(), int((i.example.labels != NOTHING).sum()))
        for i in selection.ordered
    )
    return sum((wanted - Counter(found)).values())
