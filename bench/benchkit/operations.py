"""How many floating-point operations a LoRA step needs, counted from its packs.

Counted: every matrix product that no exact implementation can do without, two operations (multiply
and add) for each element pair. Forward: linear layers, LoRA, attention over the pairs that may see
each other, the vocabulary projection at rows with a target. Backward: gradients with respect to
inputs (the weights are frozen), LoRA's own gradients, attention's four products, the gradient of
the projection. Not counted: what needs no gradient (below the first adapter), what no target
depends on (`last_rows="targets"`: the last layer's queries, output and MLP at rows without a
target), recomputation, norms, rotations, activations, softmax, the optimiser.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vicuna.data.pack import Pack, PackSegment

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Layers that share an input, so that they can be one product.
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
HEAD = "lm_head"
LastRows = Literal["all", "targets"]


@dataclass(frozen=True)
class Shape:
    """A Llama-like decoder and its adapter. adapted: names of layers with LoRA, in every block."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    rank: int = 8
    adapted: tuple[str, ...] = ALL_LINEAR
    window: int = 0

    def linear(self, name: str) -> tuple[int, int]:
        """(inputs, outputs) of a linear layer."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, q),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (q, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
            HEAD: (self.hidden, self.vocab),
        }[name]


def shape_of(config: Any, rank: int = 8, adapted: Sequence[str] = ALL_LINEAR) -> Shape:
    """The shape of a transformers config, or of a config.json's dictionary."""

    def get(key: str) -> Any:
        return config.get(key) if isinstance(config, dict) else getattr(config, key, None)

    heads, hidden = int(get("num_attention_heads")), int(get("hidden_size"))
    return Shape(
        hidden=hidden,
        intermediate=int(get("intermediate_size")),
        layers=int(get("num_hidden_layers")),
        heads=heads,
        kv_heads=int(get("num_key_value_heads") or heads),
        head_dim=int(get("head_dim") or hidden // heads),
        vocab=int(get("vocab_size")),
        rank=rank,
        adapted=tuple(adapted),
        window=int(get("sliding_window") or 0),
    )


@dataclass
class Work:
    """Operations by kind, and those of frozen linear layers by (group, direction) for the rates."""

    linear: int = 0
    lora: int = 0
    attention: int = 0
    head: int = 0
    by_group: dict[tuple[str, str], int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.linear + self.lora + self.attention + self.head

    def add(self, other: Work) -> None:
        for name in ("linear", "lora", "attention", "head"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for key, value in other.by_group.items():
            self.by_group[key] = self.by_group.get(key, 0) + value

    def frozen(self, group: str, direction: str, operations: int) -> None:
        """Add a product with frozen weights."""
        key = (group, direction)
        self.by_group[key] = self.by_group.get(key, 0) + operations
        if group == HEAD:
            self.head += operations
        else:
            self.linear += operations


def of_packs(packs: Iterable[Pack], shape: Shape, last_rows: LastRows = "targets") -> Work:
    """Operations of a step."""
    total = Work()
    for pack in packs:
        total.add(of_pack(pack, shape, last_rows))
    return total


def of_pack(pack: Pack, shape: Shape, last_rows: LastRows = "targets") -> Work:
    """Operations of one pack's forward and backward."""
    work = Work()
    rows, targets = len(pack.ids), len(pack.target_rows)
    wanted = {int(r) for r in pack.target_rows}
    everything = sum(pairs(s, shape.window) for s in pack.segments)
    live = False  # whether the block's input depends on an adapter
    for layer in range(shape.layers):
        last = layer == shape.layers - 1 and last_rows == "targets"
        below = targets if last else rows
        seen = sum(pairs(s, shape.window, wanted) for s in pack.segments) if last else everything
        live = _block(work, shape, rows, below, seen, live)
    size = shape.hidden * shape.vocab
    work.frozen(HEAD, "forward", 2 * targets * size)
    if live:
        work.frozen(HEAD, "backward", 2 * targets * size)
    return work


def _block(work: Work, s: Shape, rows: int, below: int, seen: int, live: bool) -> bool:
    """One decoder block; whether its output depends on an adapter.

    Args:
        rows: rows of keys and values. below: rows of everything else.
        seen: pairs of a query row and a key row.
    """
    has = {name: name in s.adapted for name in ALL_LINEAR}
    for name in ("q_proj", "k_proj", "v_proj"):
        _linear(work, s, name, below if name == "q_proj" else rows, live)
    q, k, v = (live or has[n] for n in ("q_proj", "k_proj", "v_proj"))
    unit = 2 * seen * s.heads * s.head_dim
    # Forward: scores and weighted sum. Backward: dP where the scores matter, dQ, dK, dV.
    work.attention += unit * (2 + (q or k) + q + k + v)
    live = q or k or v
    _linear(work, s, "o_proj", below, live)
    live = live or has["o_proj"]
    for name in ("gate_proj", "up_proj"):
        _linear(work, s, name, below, live)
    inner = live or has["gate_proj"] or has["up_proj"]
    _linear(work, s, "down_proj", below, inner)
    return inner or has["down_proj"]


def _linear(work: Work, s: Shape, name: str, rows: int, input_live: bool) -> None:
    """A frozen linear layer with its adapter: y = x W' + u B' with u = x A'."""
    inputs, outputs = s.linear(name)
    group = next(g for g in GROUPS if name in g)[0]
    work.frozen(group, "forward", 2 * rows * inputs * outputs)
    if input_live:
        work.frozen(group, "backward", 2 * rows * inputs * outputs)
    if name not in s.adapted:
        return
    a, b = 2 * rows * inputs * s.rank, 2 * rows * outputs * s.rank
    # u, u B'; then t = g B, dB = g' u, dA = t' x, and t A where the input needs it.
    work.lora += (a + b) + (b + b + a) + (a if input_live else 0)


def pairs(segment: PackSegment, window: int = 0, rows: set[int] | None = None) -> int:
    """Pairs of a query row and a key row it may see.

    Args:
        window: how far back a row sees; 0 is no limit.
        rows: count only these query rows; None is all.
    """
    above = sum(b - a for a, b in segment.above)
    own = segment.stop - segment.start
    if rows is None and not window:
        return own * above + own * (own + 1) // 2
    places = range(own) if rows is None else [r - segment.start for r in rows]
    seen = [above + i + 1 for i in places if 0 <= i < own]
    return sum(min(n, window) for n in seen) if window else sum(seen)
