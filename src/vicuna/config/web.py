"""The settings of `vicuna web`."""

from __future__ import annotations

from typing import Literal

from vicuna.config.common import Settings, Texts, setting


class WebSettings(Settings):
    """The settings of `vicuna web`."""

    model: str = setting(
        "", "Model", "the base; where not given, the one that the adapter names, else smollm2-135m"
    )
    adapter: str = setting("", "Model", "an adapter to begin with: a folder, a run, or a hub id")
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8", "nf4"] = setting(
        "auto", "Model", "type of the base's weights: auto, fp32, bf16, fp16, int8, nf4"
    )
    engine: Literal["torch", "llama.cpp", "vllm"] = setting(
        "torch", "Model", "what computes: torch, llama.cpp, vllm"
    )
    context_length: int = setting(
        0, "Model", "tokens of prompt and answer; 0: the model's (llama.cpp: at most 8192)", ge=0
    )
    threads: int = setting(0, "Model", "of llama.cpp; 0: one for each core it may use", ge=0)
    template: str = setting(
        "", "Model", "where not given, the adapter's own, else the tokenizer's (auto)"
    )
    allow_other_base: bool = setting(False, "Model", "accept an adapter of other weights")

    adapters: Texts = setting(
        ["runs"], "Folders", "where adapters and runs are looked for; new ones go to the first"
    )
    data: Texts = setting(
        ["data"], "Folders", "where data sets are looked for; saved conversations go to the first"
    )
    read_only: bool = setting(
        False, "Folders", "write nothing: no training, no deleting, no saving on this machine"
    )

    host: str = setting(
        "127.0.0.1", "Server", "address to listen on; any other than this machine asks a password"
    )
    port: int = setting(0, "Server", "0: the first free one from 7860 on", ge=0, le=65535)
    password: str = setting("", "Server", "asked before the page opens; the user's name is vicuna")
    auth: bool = setting(
        True, "Server", "--no-auth: no password, also where others can reach the page"
    )
    share: bool = setting(
        False, "Server", "open a public tunnel through a service of the gradio project"
    )
    open: bool = setting(True, "Server", "open the page in the browser")
