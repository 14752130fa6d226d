"""TRL's SFTTrainer: packing (best-fit decreasing, padding-free), or padding-free without packing.

It gets the token ids themselves. What it packs is cut into the same number of updates, so an update
holds about, not exactly, `batch` examples.
"""

from __future__ import annotations

from typing import Any

import common


def run(job: dict[str, Any]) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer
    from trl.data_utils import pack_dataset

    rows = [
        {
            "input_ids": e["input_ids"],
            "completion_mask": [int(i >= e["start"]) for i in range(len(e["input_ids"]))],
        }
        for e in common.examples(job)
    ]
    data = Dataset.from_list(rows)
    packing = job["variant"]["packing"]
    if packing == "none":
        micro, accumulate = job["micro_batch"], -(-job["batch"] // job["micro_batch"])
        extra = {"padding_free": True, "max_length": None}
    else:
        packs = len(pack_dataset(data, job["pack"], packing))
        micro, accumulate = 1, -(-packs // job["updates"])
        extra = {"packing": True, "packing_strategy": packing, "max_length": job["pack"]}
    trainer = SFTTrainer(
        model=common.load_model(job),
        args=SFTConfig(
            **common.trainer_settings(job, micro, accumulate), **extra, completion_only_loss=True
        ),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        peft_config=common.lora_config(job),
    )
    watch = common.Watch(trainer)
    trainer.train()
    return watch.result() | {"packs": len(trainer.train_dataset)}


if __name__ == "__main__":
    common.main(run)
