"""The settings of the commands that ship a model: `export`, `quantize`, `run`, `download`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vicuna.config.base import Settings, Words, setting
from vicuna.config.decoding import AnswerSettings
from vicuna.config.models import VerifySettings

GgufType = Literal[
    "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "q2_k", "q3_k_s", "q3_k_m",
    "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k",
]  # fmt: skip


class _FromModelSettings(VerifySettings):
    """What is quantised, and on which texts its rounding is chosen."""

    model: str = setting("", "Model", "the base; where not given, the one that the adapter names")
    adapter: str = setting("", "Model", "an adapter to merge into it: a folder, a run, a hub id")
    allow_other_base: bool = setting(False, "Model", "accept an adapter of other weights")
    template: str = setting(
        "", "Model", "where not given, the adapter's own, else the tokenizer's (auto)"
    )
    num_samples: int = setting(128, "Calibration", "texts to calibrate on", ge=1)
    cutoff_len: int = setting(512, "Calibration", "longest of them in tokens", ge=16)
    seed: int = setting(42, "Calibration", "decides which texts of a larger file are taken")
    force: bool = setting(False, "Result", "replace an existing result")


class ExportSettings(_FromModelSettings):
    """The settings of `vicuna export gguf`."""

    adapter_only: bool = setting(
        False, "Result", "write the adapter alone, as a GGUF LoRA to be loaded beside its base"
    )
    type: GgufType = setting(
        "f16", "Result", "type of the weights: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, q2_k, "
        "q3_k_s, q3_k_m, q3_k_l, q4_k_s, q4_k_m, q5_k_s, q5_k_m, q6_k"
    )  # fmt: skip
    output: str = setting("", "Result", "the file to write")
    imatrix: str = setting(
        "", "Calibration", "an importance matrix of llama.cpp's; or data to compute one with: a "
        "file, sample, wikitext2, ptb, c4"
    )  # fmt: skip
    modelfile: bool = setting(False, "Result", "write an Ollama Modelfile beside it")


class QuantizeSettings(_FromModelSettings):
    """The settings of `vicuna quantize gptq`, `awq` and `bnb`."""

    bits: int = setting(4, "Quantising", "bits a weight: 2, 3, 4, 8", ge=2, le=8)
    group_size: int = setting(
        128, "Quantising", "weights that share a scale; -1: a whole row (gptq, awq)", ge=-1
    )
    act_order: bool = setting(
        False, "Quantising", "round the columns that matter first (gptq): better, slower to run"
    )
    damp: float | None = setting(
        None, "Quantising", "share of the mean diagonal added to it (gptq); else the library's own",
        gt=0, lt=1,
    )  # fmt: skip
    calibration: str = setting(
        "sample", "Calibration", "texts to calibrate on: a data file, sample, wikitext2, ptb, c4"
    )
    output_dir: str = setting("", "Result", "the folder to write")
    environment: str = setting(
        "", "Quantising", "an environment that has gptqmodel; where not given, one is made once in "
        "the cache"
    )  # fmt: skip


class RunSettings(AnswerSettings):
    """The settings of `vicuna run`."""

    engine: Literal["llama.cpp"] = Field(
        "llama.cpp", description="what computes: llama.cpp", json_schema_extra={"group": "Model"}
    )


class DownloadSettings(Settings):
    """The settings of `vicuna download`."""

    source: Literal["huggingface", "modelscope"] = setting(
        "huggingface", "From", "the hub: huggingface (HF_ENDPOINT sets a mirror), modelscope"
    )
    kind: Literal["model", "adapter", "dataset"] = setting(
        "model", "From", "model, adapter, dataset"
    )
    revision: str = setting("", "From", "a branch, tag or commit")
    output_dir: str = setting("", "To", "a folder of your own; else the hub library's cache")
    include: Words = setting([], "What", "patterns of files, such as *.safetensors,*.json")
    exclude: Words = setting([], "What", "patterns of files to leave out")
    workers: int = setting(4, "How", "files at a time", ge=1, le=32)
