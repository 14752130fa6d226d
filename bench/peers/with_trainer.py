"""transformers' Trainer with PEFT: padded to the cutoff as in 2023, or to a batch's longest."""

from __future__ import annotations

from typing import Any

import common


class Padding:
    """Examples to one padded batch.

    width: pad to so many tokens; 0 is the longest of the batch.
    """

    def __init__(self, pad: int, width: int) -> None:
        self.pad, self.width = pad, width

    def __call__(self, batch: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns: input_ids, attention_mask, labels, int64 (B, width)."""
        import torch

        width = self.width or max(len(e["input_ids"]) for e in batch)
        ids = torch.full((len(batch), width), self.pad)
        mask = torch.zeros(len(batch), width, dtype=torch.long)
        labels = torch.full((len(batch), width), common.IGNORE)
        for row, e in enumerate(batch):
            own = torch.tensor(e["input_ids"])
            ids[row, : len(own)] = own
            mask[row, : len(own)] = 1
            labels[row, e["start"] : len(own)] = own[e["start"] :]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def run(job: dict[str, Any]) -> dict[str, Any]:
    from peft import get_peft_model
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments

    rows = common.examples(job)

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return SequentialSampler(rows)

    micro = job["micro_batch"]
    width = job["cutoff"] if job["variant"].get("pad") == "cutoff" else 0
    settings = common.trainer_settings(job, micro, -(-job["batch"] // micro))
    trainer = InOrder(
        model=get_peft_model(common.load_model(job), common.lora_config(job)),
        args=TrainingArguments(**settings, remove_unused_columns=False),
        train_dataset=rows,
        data_collator=Padding(job["pad_id"], width),
    )
    watch = common.Watch(trainer)
    trainer.train()
    return watch.result()


if __name__ == "__main__":
    common.main(run)
