"""Settings of `vicuna download`, `doctor` and `demo`."""

from __future__ import annotations

from typing import Literal

from vicuna.config.base import Settings, Words, setting


class DownloadSettings(Settings):
    """The settings of `vicuna download`."""

    source: Literal["huggingface", "modelscope"] = setting(
        "huggingface", "From", "the hub: huggingface (HF_ENDPOINT sets a mirror), modelscope"
    )
    kind: Literal["model", "adapter", "dataset"] = setting(
        "model", "From", "what the repository holds: model, adapter, dataset"
    )
    revision: str = setting("", "From", "a branch, tag or commit")
    output_dir: str = setting(
        "", "To", "the folder to download to; default: the hub library's cache"
    )
    include: Words = setting(
        [], "What", "patterns of files to download, such as *.safetensors,*.json"
    )
    exclude: Words = setting([], "What", "patterns of files to leave out")
    workers: int = setting(4, "How", "files to download at a time", ge=1, le=32)


class DoctorSettings(Settings):
    """The settings of `vicuna doctor`."""

    model: str = setting("smollm2-135m", "Model", "the base to check")
    template: str = setting("auto", "Model", "the template to check it with")
    json_output: bool = setting(False, "Output", "print one JSON object (--json)")


class DemoSettings(Settings):
    """The settings of `vicuna demo`."""

    output_dir: str = setting(
        "runs/demo", "Demo", "the run's folder; an older demo in it is replaced"
    )
    quick: bool = setting(False, "Demo", "a few steps only, to see that everything works")
    seed: int = setting(42, "Demo", "decides the order of examples and the adapter's first weights")
