"""Where one update's time goes: torch.profiler's operators, put into a few kinds."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchkit import contenders, report

PRODUCTS = "mm addmm bmm baddbmm matmul linear int_mm mkldnn_linear mv dot"
COPIES = (
    "copy cat clone contiguous to_copy to index index_select index_copy index_put index_put_impl "
    "index_add gather scatter scatter_add embedding stack narrow zero fill zeros new_zeros split "
    "slice_backward select_backward constant_pad_nd"
)
ELEMENTWISE = (
    "mul add sub div neg pow rsqrt sqrt reciprocal exp log silu sigmoid tanh gelu mean sum amax "
    "max logsumexp softmax log_softmax cos sin addcmul addcdiv lerp where masked_fill square "
    "rms_norm fused_rms_norm norm linalg_vector_norm le lt ge gt eq bitwise_and clamp"
)
KINDS = ("matrix products", "attention", "elementwise", "copies", "optimiser", "other")


def kind_of(name: str) -> str:
    """The kind of an operator by the name that the profiler gives it."""
    bare = name.partition("::")[2] or name
    plain = bare.strip("_").removesuffix("_out").removesuffix("_backward").removesuffix("_data")
    if "attention" in bare:
        return "attention"
    if "adam" in bare.lower() or "Optimizer" in name or bare.startswith("_foreach"):
        return "optimiser"
    for kind, names in (
        ("matrix products", PRODUCTS),
        ("copies", COPIES),
        ("elementwise", ELEMENTWISE),
    ):
        if plain in names.split() or bare.strip("_") in names.split():
            return kind
    return "other"


def one_update(job: contenders.Job, work: Path) -> dict[str, Any]:
    """Profile the second update's work of ours: packs, forward, backward, optimiser.

    Returns: seconds, and `kinds` and `operators` as lists of (name, share of the time).
    """
    sys.path.append(str(contenders.PEERS))
    import torch
    import with_vicuna
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    from vicuna import config
    from vicuna.train.progress import RunConsole
    from vicuna.train.setup import prepare

    torch.set_num_threads(job.threads)
    words = contenders.words_of(job, contenders.Variant("auto", {}), work, work / "unused")
    given = with_vicuna.settings_of(words)
    training = prepare(config.build(config.TrainSettings, given), given, RunConsole())
    try:
        _update(training)
        with profiler(activities=[ProfilerActivity.CPU]) as found:
            _update(training)
    finally:
        training.close()
    events = found.key_averages()
    return by_kind({e.key: e.self_cpu_time_total / 1e6 for e in events})


def _update(training: Any) -> None:
    """One update by the trainable's own means."""
    from vicuna.data.pack import build_packs

    examples = [training.split.dataset[int(i)] for i in training.split.sampler.step(0)]
    packs = build_packs(examples, training.end_id, training.state.micro_batch.tokens)
    training.optimizer.zero_grad(set_to_none=True)
    training.trainable.backward(packs, sum(p.supervised for p in packs))
    training.optimizer.step()


def by_kind(seconds: dict[str, float]) -> dict[str, Any]:
    """Shares of the time by kind, and of the fifteen largest operators."""
    total = sum(seconds.values()) or 1.0
    kinds: dict[str, float] = defaultdict(float)
    for name, value in seconds.items():
        kinds[kind_of(name)] += value
    largest = sorted(seconds.items(), key=lambda x: -x[1])[:15]
    return {
        "seconds": total,
        "kinds": [(k, kinds[k] / total) for k in KINDS],
        "operators": [(n, kind_of(n), v / total) for n, v in largest],
    }


def markdown(found: dict[str, Any]) -> str:
    """Two tables: kinds, and the largest operators."""
    kinds = report.table(["kind", "share of time"], [[k, f"{v:.1%}"] for k, v in found["kinds"]])
    rows = [[n, k, f"{v:.1%}"] for n, k, v in found["operators"]]
    words = f"One update, {found['seconds']:.1f} s in operators."
    return "\n\n".join([words, kinds, report.table(["operator", "kind", "share"], rows)])
