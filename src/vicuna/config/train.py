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
    val_size: float = setting(
        0, "Data", "records for evaluation: a count, or a fraction below 1", ge=0
    )
    val_dataset: Datasets = setting([], "Data", "evaluation records from separate files")
    output_dir: str = setting("", "Run", "the run's folder; runs/DATE-TIME by default")
    seed: int = setting(42, "Run", "decides the order of examples and the adapter's first weights")

    batch_size: int = setting(32, "Steps", "examples in a step, on any hardware", ge=1)
    num_train_epochs: float = setting(3.0, "Steps", "passes over the data", gt=0)
    max_steps: int = setting(0, "Steps", "steps; overrides num_train_epochs if not 0", ge=0)
    learning_rate: float = setting(3e-4, "Steps", "peak learning rate", gt=0, le=1)
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = setting(
        "linear", "Steps", "how the rate decays after warm-up: linear, cosine, constant"
    )
    warmup_ratio: float = setting(0.03, "Steps", "share of the steps to warm up", ge=0, le=1)
    warmup_steps: int = setting(
        0, "Steps", "the same as a number of steps; at most a fifth of the run is used", ge=0
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
    max_grad_norm: float = setting(1.0, "Steps", "clip the gradient to this norm; 0: never", ge=0)
    max_nonfinite_steps: int = setting(
        5, "Steps", "stop after this many steps in a row without a finite gradient", ge=1
    )

    lora_rank: int = setting(8, "LoRA", "rank", ge=1, le=1024)
    lora_alpha: float = setting(16, "LoRA", "alpha; the adapter is scaled by alpha / rank", gt=0)
    lora_dropout: float = setting(0.0, "LoRA", "dropout on the adapter's input", ge=0, lt=1)
    lora_target: Words = setting(
        ["all"], "LoRA", "all linear layers, or names such as q_proj,v_proj"
    )
    use_rslora: bool = setting(False, "LoRA", "scale by alpha / sqrt(rank) (arXiv 2312.03732)")

    precision: PrecisionName = setting(
        "auto", "Hardware", "type of the frozen base; auto: the fastest of this chip"
    )
    memory: Literal["auto", "manual"] = setting(
        "auto",
        "Hardware",
        "auto: plan what a step needs, and choose micro_batch_tokens, gradient_checkpointing and "
        "precision if they are not given",
    )
    micro_batch_tokens: int = setting(
        0, "Hardware", "tokens computed at a time; 0 chooses. Never changes the result", ge=0
    )
    micro_batch_size: int = setting(
        0, "Hardware", "at most this many examples at a time; 0: no limit", ge=0
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
    share_prefixes: bool = setting(True, "Hardware", "compute a common beginning of examples once")

    eval_steps: int = setting(
        0, "Watching", "evaluate every this many steps; 0: ten times in a run", ge=0
    )
    early_stopping_patience: int = setting(
        0, "Watching", "stop after this many evaluations without a lower loss; 0: never", ge=0
    )
    final_adapter: Literal["best", "last"] = setting(
        "best", "Watching", "which weights adapter/ holds if there is an evaluation"
    )
    sample_prompts: Texts = setting(
        [], "Watching", "prompts answered during training, or a file of them"
    )
    sample_steps: int = setting(
        0, "Watching", "answer them every this many steps; 0: at evaluations", ge=0
    )
    sample_tokens: int = setting(96, "Watching", "at most this many tokens in an answer", ge=1)
    sample_share: float = setting(
        0.1, "Watching", "share of the time trained that these answers may take; 0: no limit",
        ge=0, le=10,
    )  # fmt: skip
    logging_steps: int = setting(
        1, "Watching", "write a line to log.jsonl every this many steps", ge=1
    )
    report_to: Words = setting([], "Watching", "wandb, swanlab, tensorboard")

    save_steps: int = setting(200, "Checkpoints", "write a checkpoint every this many steps", ge=1)
    save_total_limit: int = setting(
        3, "Checkpoints", "keep this many (and the best one); 0: all", ge=0
    )
    resume: str = setting("", "Checkpoints", "resume: last, a run, a checkpoint, or a hub id")
    init_adapter: str = setting(
        "", "Checkpoints", "start a new run from an adapter's weights alone"
    )
    adapter: str = setting("", "Checkpoints", "the same as init_adapter")
    continue_from: str = setting(
        "", "Checkpoints", "train on new data with this run's optimiser and learning rate schedule"
    )
    from_data_beginning: bool | None = setting(
        None,
        "Checkpoints",
        "start at the beginning of the data (default: with continue_from yes, with resume no)",
    )
    allow_changes: Words = setting(
        [], "Checkpoints", "settings (or data) that may differ from the checkpoint's"
    )
    allow_other_base: bool = setting(
        False, "Checkpoints", "accept an adapter that was trained on other weights"
    )


class PlanSettings(TrainSettings):
    """The settings of `vicuna plan`: a run's, and the device it is planned for."""

    device: str = setting("", "Device", "plan for this device, such as 'RTX 2080 Ti'")
    # Also what a run's config.yaml says of itself.
    memory: Annotated[str, BeforeValidator(lambda v: "auto" if v == "manual" else v)] = setting(  # type: ignore[assignment]
        "auto", "Device", "or for a card with this much memory, such as 11GiB"
    )
    json_output: bool = setting(False, "Output", "print one JSON object (--json)")
