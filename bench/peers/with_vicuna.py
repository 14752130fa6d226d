"""Ours: what `vicuna train` does, through its own setup and loop; the figures of its log.jsonl.

An update's seconds include fetching and packing its examples; checkpoints are not counted, as the
peers write none. The warm-up is one pack forward and backward before the run, without an update.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import common


def settings_of(job: dict[str, Any]) -> dict[str, Any]:
    """The settings of `vicuna train` for a job."""
    run = Path(job["work"]) / "run"
    shutil.rmtree(run, ignore_errors=True)
    return {
        "model": job["model"],
        "dataset": job["records"],
        "template": job["template"],
        "cutoff_len": job["cutoff"],
        "batch_size": job["batch"],
        "max_steps": job["updates"],
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
        "lora_rank": job["rank"],
        "lora_alpha": job["alpha"],
        "seed": job["seed"],
        "save_steps": 1_000_000,
        "output_dir": str(run),
        **job["variant"],
    }


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vicuna import config
    from vicuna.train.progress import RunConsole
    from vicuna.train.setup import prepare

    given = settings_of(job)
    training = prepare(config.build(config.TrainSettings, given), given, RunConsole())
    try:
        clock = common.Clock()
        clock.loaded()
        _warm_up(training)
        training.run()
    finally:
        training.close()
    log = (Path(given["output_dir"]) / "log.jsonl").read_text(encoding="utf-8")
    steps = [e for e in map(json.loads, log.splitlines()) if e["event"] == "step"]
    result = clock.result([s["loss"] for s in steps], [s["supervised_tokens"] for s in steps])
    return result | {
        "seconds": sum(s["seconds"] for s in steps),
        "real_tokens": sum(s["tokens"] for s in steps),
        "computed_tokens": sum(s.get("computed_tokens", 0) for s in steps),
        "precision": training.state.settings["precision"],
        "cut": training.state.micro_batch.to_json(),
        "fingerprints": _fingerprints(training, job),
    }


def _warm_up(training: Any) -> None:
    from vicuna.data.pack import build_packs

    wanted = training.split.sampler.step(0)[:4]
    examples = [training.split.dataset[int(i)] for i in wanted]
    packs = build_packs(examples, training.end_id, training.state.micro_batch.tokens)
    training.trainable.backward(packs[:1], packs[0].supervised)
    training.optimizer.zero_grad(set_to_none=True)


def _fingerprints(training: Any, job: dict[str, Any]) -> list[str]:
    prints = []
    for update in range(job["updates"]):
        for i in training.split.sampler.step(update):
            example = training.split.dataset[int(i)]
            supervised = int((example.labels != 0).sum())
            prints.append(common.fingerprint(example.ids.tolist(), supervised))
    return prints


if __name__ == "__main__":
    common.main(run)
