"""LLaMA-Factory with its neat packing (examples of a pack do not see each other).

It gets prompt and completion as text. Its own tokenising of them is replaced by a look-up of the
common ids: it encodes a prompt in one piece and would come out one token off in each example. Its
packing, collating, masks and loop are its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import common

TEMPLATE = "as_it_stands"


def run(job: dict[str, Any]) -> dict[str, Any]:
    from llamafactory.data.formatter import StringFormatter
    from llamafactory.data.processor import supervised
    from llamafactory.data.template import register_template
    from llamafactory.train.sft import workflow
    from llamafactory.train.tuner import run_exp

    register_template(
        name=TEMPLATE,
        format_user=StringFormatter(slots=["{{content}}"]),
        format_assistant=StringFormatter(slots=["{{content}}", {"eos_token"}]),
    )
    prints = _use_common_ids(supervised.PackedSupervisedDatasetProcessor, job)
    watches: list[common.Watch] = []

    class Watched(workflow.CustomSeq2SeqTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            watches.append(common.Watch(self))

    workflow.CustomSeq2SeqTrainer = Watched
    run_exp(args=_settings(job, _count_packs(job)))
    watch = watches[0]
    return watch.result() | {"fingerprints": prints, "packs": len(watch.trainer.train_dataset)}


def _use_common_ids(processor: Any, job: dict[str, Any]) -> list[str]:
    """Give the processor the common ids; fingerprints of all examples it asked for."""
    known = {(e["prompt"], e["completion"]): e for e in common.examples(job)}
    prints: list[str] = []

    def encode(_: Any, prompt: Any, response: Any, **__: Any) -> tuple[list[int], list[int]]:
        found = known[prompt[0]["content"], response[0]["content"]]
        ids, start = found["input_ids"], found["start"]
        prints.append(common.fingerprint(ids, len(ids) - start))
        return list(ids), [common.IGNORE] * start + ids[start:]

    processor._encode_data_example = encode
    return prints


def _count_packs(job: dict[str, Any]) -> int:
    """How many packs its own algorithm will make, to cut them into the same number of updates."""
    from llamafactory.data.processor.processor_utils import greedy_knapsack

    lengths = [len(e["input_ids"]) for e in common.examples(job)]
    return len(greedy_knapsack(lengths, job["pack"]))


def _base(job: dict[str, Any]) -> Path:
    """The base in a folder that says the variant's type: it loads weights as config.json has it."""
    folder = Path(job["work"]) / "base"
    folder.mkdir(parents=True, exist_ok=True)
    for path in Path(job["model"]).iterdir():
        if path.name != "config.json":
            (folder / path.name).unlink(missing_ok=True)
            (folder / path.name).symlink_to(path)
    config = json.loads((Path(job["model"]) / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = "bfloat16" if job["variant"]["dtype"] == "bf16" else "float32"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _settings(job: dict[str, Any], packs: int) -> dict[str, Any]:
    """Its settings: the common ones, without the precision that it names otherwise."""
    folder = Path(job["work"]) / "data"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": e["prompt"], "completion": e["completion"]} for e in common.examples(job)]
    (folder / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    columns = {"prompt": "prompt", "query": None, "response": "completion"}
    info = {"rows": {"file_name": "rows.json", "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    kind = job["variant"]["dtype"]
    settings = common.trainer_settings(job, 1, -(-packs // job["updates"]))
    del settings["gradient_checkpointing"]
    return settings | {
        "model_name_or_path": str(_base(job)),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_target": "all",
        "lora_rank": job["rank"],
        "lora_alpha": job["alpha"],
        "lora_dropout": 0.0,
        "dataset": "rows",
        "dataset_dir": str(folder),
        "template": TEMPLATE,
        "cutoff_len": job["pack"],
        "packing": True,
        "neat_packing": True,
        "flash_attn": "sdpa",
        "disable_gradient_checkpointing": True,
        "overwrite_cache": True,
        "bf16": kind != "fp32",
    }


if __name__ == "__main__":
    common.main(run)
