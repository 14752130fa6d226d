"""The settings of `vicuna train` and `vicuna plan`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator

from vicuna.config.base import Datasets, Texts, Words, setting
from vicuna.config.checkpointing import Checkpointing
from vicuna.config.data import DataSettings
from vicuna.config.precisions import PrecisionName


class TrainSettings(DataSettings):
    """The settings of `vicuna train`."""

    dataset: Datasets = setting(
        [], "Data", "files, folders, globs or hub ids; each may be PATH@weight=2,max_samples=100"
    )
    val_size: float = setting(0, "Data", "records held out: a count, or a fraction below 1", ge=0)
    val_dataset: Datasets = setting([], "Data", "held-out records from files of their own")
    output_dir: str = setting("", "Run", "the run's folder; runs/DATE-TIME where not given")
    seed: int = setting(42, "Run", "decides the order of examples and the adapter's first weights")

    batch_size: int = setting(32, "Steps", "examples in an update, on whatever hardware", ge=1)
    num_train_epochs: float = setting(3.0, "Steps", "times every example is seen", gt=0)
    max_steps: int = setting(0, "Steps", "updates; overrides num_train_epochs where not 0", ge=0)
    learning_rate: float = setting(3e-4, "Steps", "peak learning rate", gt=0, le=1)
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = setting(
        "linear", "Steps", "how the rate falls after warming up: linear, cosine, constant"
    )
    warmup_ratio: float = setting(
        0.03, "Steps", "share of the updates spent warming up", ge=0, le=1
    )
    warmup_steps: int = setting(
        0, "Steps", "the same in updates; at most a fifth of them is used", ge=0
    )
    weight_decay: float = setting(0.0, "Steps", "AdamW's weight decay", ge=0)
    optimizer: Literal["adamw", "paged_adamw_8bit"] = setting(
        "adamw",
        "Steps",
        "adamw, or paged_adamw_8bit: its moments in 8 bits, paged to the host (CUDA, bitsandbytes)",
    )
    adam_beta1: float = setting(0.9, "Steps", "AdamW's beta 1", ge=0, lt=1)
    adam_beta2: float = setting(0.999, "Steps", "AdamW's beta 2", ge=0, lt=1)
    adam_epsilon: float = setting(1e-8, "Steps", "AdamW's epsilon", gt=0)
    max_grad_norm: float = setting(
        1.0, "Steps", "gradients are clipped to this norm; 0: never", ge=0
    )
    max_nonfinite_steps: int = setting(
        5, "Steps", "stop after so many steps in a row without a finite gradient", ge=1
    )

    lora_rank: int = setting(8, "LoRA", "rank", ge=1, le=1024)
    lora_alpha: float = setting(16, "LoRA", "alpha; the adapter is scaled by alpha / rank", gt=0)
    lora_dropout: float = setting(0.0, "LoRA", "dropout on the adapter's input", ge=0, lt=1)
    lora_target: Words = setting(
        ["all"], "LoRA", "all linear layers, or names such as q_proj,v_proj"
    )
    use_rslora: bool = setting(False, "LoRA", "scale by alpha / sqrt(rank) (arXiv 2312.03732)")

    precision: PrecisionName = setting(
        "auto", "Hardware", "type of the frozen base: auto takes the fastest this chip has"
    )
    memory: Literal["auto", "manual"] = setting(
        "auto",
        "Hardware",
        "auto: plan what a step needs, and choose micro_batch_tokens, gradient_checkpointing and "
        "precision where they are not given",
    )
    micro_batch_tokens: int = setting(
        0, "Hardware", "tokens computed at a time; 0 chooses. Never changes the result", ge=0
    )
    micro_batch_size: int = setting(
        0, "Hardware", "at most so many examples at a time; 0: no limit", ge=0
    )
    gradient_checkpointing: Checkpointing = setting(
        "none",
        "Hardware",
        "what backward computes again instead of keeping it: none, selective (the MLP's inside), "
        "full (all but each layer's input; also true), offload (these inputs in the host's memory)",
    )
    kernels: Literal["auto", "plain", "compiled"] = setting(
        "auto",
        "Hardware",
        "arithmetic on elements: plain PyTorch, or compiled; auto measures both on a GPU",
    )
    share_prefixes: bool = setting(
        True, "Hardware", "compute what examples begin with in common once"
    )

    eval_steps: int = setting(
        0, "Watching", "evaluate every so many steps; 0: ten times a run", ge=0
    )
    early_stopping_patience: int = setting(
        0, "Watching", "stop after so many evaluations without a lower loss; 0: never", ge=0
    )
    final_adapter: Literal["best", "last"] = setting(
        "best", "Watching", "which weights adapter/ holds, where there is an evaluation"
    )
    sample_prompts: Texts = setting(
        [], "Watching", "questions answered during training, or a file of them"
    )
    sample_steps: int = setting(
        0, "Watching", "answer them every so many steps; 0: at evaluations", ge=0
    )
    sample_tokens: int = setting(96, "Watching", "longest of these answers in tokens", ge=1)
    sample_share: float = setting(
        0.1, "Watching", "share of the time trained that these answers may take; 0: no limit",
        ge=0, le=10,
    )  # fmt: skip
    logging_steps: int = setting(
        1, "Watching", "write a line to log.jsonl every so many steps", ge=1
    )
    report_to: Words = setting([], "Watching", "wandb, swanlab, tensorboard")

    save_steps: int = setting(200, "Checkpoints", "write a checkpoint every so many steps", ge=1)
    save_total_limit: int = setting(
        3, "Checkpoints", "keep so many (the best one besides); 0: all", ge=0
    )
    resume: str = setting("", "Checkpoints", "go on: last, a run, a checkpoint, or a hub id")
    init_adapter: str = setting(
        "", "Checkpoints", "begin a new run from an adapter's weights alone"
    )
    adapter: str = setting("", "Checkpoints", "the same as init_adapter")
    continue_from: str = setting(
        "", "Checkpoints", "new data with the optimiser and learning rate schedule of this run"
    )
    from_data_beginning: bool | None = setting(
        None,
        "Checkpoints",
        "start at the data's beginning (default: with continue_from yes, resume no)",
    )
    allow_changes: Words = setting(
        [], "Checkpoints", "settings that may differ when resuming, or data"
    )
    allow_other_base: bool = setting(False, "Checkpoints", "accept an adapter of other weights")


class PlanSettings(TrainSettings):
    """The settings of `vicuna plan`: a run's, and the device it is planned for."""

    device: str = setting("", "Device", "plan for this device, such as 'RTX 2080 Ti'")
    # Also what a run's config.yaml says of itself.
    memory: Annotated[str, BeforeValidator(lambda v: "auto" if v == "manual" else v)] = setting(  # type: ignore[assignment]
        "auto", "Device", "or for a card of this size, such as 11GiB"
    )
    json_output: bool = setting(False, "Output", "print one JSON object (--json)")
