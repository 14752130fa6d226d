"""Settings of the commands that write a model: `vicuna merge`, `convert`, `export`, `quantize` and
`adapter`, and of the comparison of its result with its source."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from vicuna.config.base import Places, Settings, Words, setting
from vicuna.config.precisions import FloatName


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.isdecimal() else value


Shards = Annotated[Literal[1, 2, 4, 8], BeforeValidator(_whole)]
GgufType = Literal[
    "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "q2_k", "q3_k_s", "q3_k_m",
    "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k",
]  # fmt: skip


class VerifySettings(Settings):
    """How the result of a command is compared with its source."""

    verify: bool = setting(
        True, "Verifying", "reload the result and compare it with its source (--no-verify)"
    )
    verify_data: str = setting(
        "", "Verifying", "a data file to compare on; default: Chinese and English samples"
    )
    verify_tokens: int = setting(
        1024, "Verifying", "tokens to compare on, of each kind of text", ge=16
    )
    max_kl: float | None = setting(
        None, "Verifying", "largest mean KL divergence that passes (nats); default: by the type",
        ge=0,
    )  # fmt: skip
    max_perplexity_ratio: float | None = setting(
        None,
        "Verifying",
        "largest perplexity after / before that passes; default: by the type",
        gt=0,
    )
    keep_failed: bool = setting(False, "Verifying", "keep the result even if it does not pass")


class MergeSettings(VerifySettings):
    """The settings of `vicuna merge`."""

    model: str = setting("", "Models", "the base; default: the one that the adapter names")
    adapter: Places = setting(
        [], "Models", "adapters, run folders or hub ids, of any age; several are combined"
    )
    allow_other_base: bool = setting(False, "Models", "accept an adapter of other weights")
    weights: Words = setting(
        [], "Combining", "weight of each adapter, such as 0.7,0.3; default: 1 each"
    )
    method: Literal[
        "linear", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd",
        "dare_ties_svd", "magnitude_prune", "magnitude_prune_svd",
    ] = setting(
        "linear", "Combining", "how to combine several: linear (the exact sum), svd, ties, "
        "ties_svd, dare_linear, dare_ties, dare_linear_svd, dare_ties_svd, magnitude_prune, "
        "magnitude_prune_svd"
    )  # fmt: skip
    density: float = setting(
        0.5, "Combining", "fraction of values that ties, dare and magnitude_prune keep", gt=0, le=1
    )
    combined_rank: int = setting(
        0,
        "Combining",
        "rank of the result of the svd methods; 0: the largest of the adapters'",
        ge=0,
    )
    seed: int = setting(42, "Combining", "seed of what dare drops")
    output_dir: str = setting("", "Result", "the folder to write")
    dtype: FloatName = setting(
        "auto", "Result", "data type of the weights: auto (the base's own), fp32, bf16, fp16"
    )
    max_shard_size: str = setting("2GB", "Result", "largest weights file, such as 500MB, 2GB")
    force: bool = setting(False, "Result", "replace an existing folder")


class ConvertSettings(VerifySettings):
    """The settings of `vicuna convert`."""

    model: str = setting(
        "", "Model", "a folder (Hugging Face's or Meta's format), a GGUF file, or a hub id"
    )
    to: Literal["hf", "meta"] = setting(
        "hf", "Result", "hf: Hugging Face's format, safetensors; meta: Meta's, consolidated.NN.pth"
    )
    output_dir: str = setting("", "Result", "the folder to write")
    num_shards: Shards = setting(1, "Result", "number of files in Meta's format: 1, 2, 4, 8")
    max_shard_size: str = setting("2GB", "Result", "largest safetensors file")
    tokenizer: str = setting(
        "", "Model", "a folder with the tokenizer, if the weights come without one"
    )
    max_position_embeddings: int = setting(
        0,
        "Model",
        "context length of a model in Meta's format, which lacks it; 0: its family's",
        ge=0,
    )
    force: bool = setting(False, "Result", "replace an existing folder")


class AdapterInspectSettings(Settings):
    """The settings of `vicuna adapter inspect`."""

    adapter: str = setting("", "Adapter", "the adapter, of any age: a folder, a run, or a hub id")
    json_output: bool = setting(False, "Output", "print one JSON object (--json)")


class AdapterUpgradeSettings(Settings):
    """The settings of `vicuna adapter upgrade`."""

    adapter: str = setting("", "Adapter", "the adapter, of any age: a folder, a run, or a hub id")
    alpha: float = setting(
        0.0, "Adapter", "LoRA's alpha, if the adapter does not say; 0: twice the rank", ge=0
    )
    verify: bool = setting(True, "Result", "reload the result and compare it with its source")
    output_dir: str = setting("", "Result", "the folder to write")
    force: bool = setting(False, "Result", "replace an existing folder")


class _FromModelSettings(VerifySettings):
    """What `vicuna export` and `vicuna quantize` share: the model, and calibration texts."""

    model: str = setting("", "Model", "the base; default: the one that the adapter names")
    adapter: str = setting("", "Model", "an adapter to merge into it: a folder, a run, or a hub id")
    allow_other_base: bool = setting(False, "Model", "accept an adapter of other weights")
    template: str = setting("", "Model", "default: the adapter's own, else the tokenizer's (auto)")
    num_samples: int = setting(128, "Calibration", "texts to calibrate on", ge=1)
    cutoff_len: int = setting(512, "Calibration", "tokens of the longest of them", ge=16)
    seed: int = setting(42, "Calibration", "seed of the choice of texts from a larger file")
    force: bool = setting(False, "Result", "replace an existing result")


class ExportSettings(_FromModelSettings):
    """The settings of `vicuna export gguf`."""

    adapter_only: bool = setting(
        False, "Result", "write the adapter alone, as a GGUF LoRA to load beside its base"
    )
    type: GgufType = setting(
        "f16", "Result", "data type of the weights: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, "
        "q2_k, q3_k_s, q3_k_m, q3_k_l, q4_k_s, q4_k_m, q5_k_s, q5_k_m, q6_k"
    )  # fmt: skip
    output: str = setting("", "Result", "the file to write")
    imatrix: str = setting(
        "", "Calibration", "an importance matrix from llama.cpp, or data to compute one with: a "
        "file, sample, wikitext2, ptb, c4"
    )  # fmt: skip
    modelfile: bool = setting(False, "Result", "write an Ollama Modelfile beside the file")


class QuantizeSettings(_FromModelSettings):
    """The settings of `vicuna quantize gptq`, `awq` and `bnb`."""

    bits: int = setting(4, "Quantization", "bits per weight: 2, 3, 4, 8", ge=2, le=8)
    group_size: int = setting(
        128, "Quantization", "weights that share a scale; -1: a whole row (gptq, awq)", ge=-1
    )
    act_order: bool = setting(
        False,
        "Quantization",
        "quantize the most important columns first (gptq): more accurate, slower inference",
    )
    damp: float | None = setting(
        None, "Quantization", "fraction of the Hessian's mean diagonal added to it (gptq); "
        "default: the library's",
        gt=0, lt=1,
    )  # fmt: skip
    calibration: str = setting(
        "sample", "Calibration", "texts to calibrate on: a data file, sample, wikitext2, ptb, c4"
    )
    output_dir: str = setting("", "Result", "the folder to write")
    environment: str = setting(
        "", "Quantization", "a Python environment with gptqmodel; default: one is created once in "
        "the cache"
    )  # fmt: skip
