"""The settings of `vicuna generate` and `vicuna chat`, and of every command that loads a model."""

from __future__ import annotations

from typing import Literal

from vicuna.config.base import EarlyStopping, Settings, Texts, setting


class ModelSettings(Settings):
    """Which model answers, and on what it is computed."""

    model: str = setting(
        "", "Model", "the base; where not given, the one that the adapter names, else smollm2-135m"
    )
    adapter: str = setting("", "Model", "an adapter, a run folder, or a hub id, of any age")
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8", "nf4"] = setting(
        "auto", "Model", "type of the base's weights: auto, fp32, bf16, fp16, int8, nf4"
    )
    engine: Literal["torch", "llama.cpp", "vllm"] = setting(
        "torch", "Model", "what computes: torch, llama.cpp, vllm"
    )
    context_length: int = setting(
        0,
        "Model",
        "tokens of prompt and answer; 0: the model's (llama.cpp: at most 8192)",
        ge=0,
    )
    cache_type: Literal["auto", "f32", "f16", "q8_0"] = setting(
        "auto", "Model", "keys and values are kept in: auto, f32, f16, q8_0 (8 bits)"
    )
    device_map: str = setting(
        "auto", "Model", "where torch puts the base: auto, cpu, cuda:0, or several: cuda:0,cuda:1"
    )
    threads: int = setting(0, "Model", "of llama.cpp; 0: one for each core it may use", ge=0)
    template: str = setting(
        "", "Model", "where not given, the adapter's own, else the tokenizer's (auto)"
    )
    thinking: Literal["auto", "on", "off"] = setting(
        "auto",
        "Model",
        "answers begin with a thought: on, off; auto: as the adapter was trained, else as the "
        "base's own template has it",
    )
    allow_other_base: bool = setting(False, "Model", "accept an adapter of other weights")


class AnswerSettings(ModelSettings):
    """The settings of `vicuna generate` and `vicuna chat`."""

    system: str = setting("", "Talking", "system prompt")
    max_new_tokens: int = setting(512, "Decoding", "longest answer in tokens", ge=1)
    min_new_tokens: int = setting(0, "Decoding", "no end token before so many tokens", ge=0)
    do_sample: bool = setting(False, "Decoding", "draw tokens instead of taking the likeliest")
    temperature: float = setting(
        0.7, "Decoding", "of sampling; 0 takes the likeliest", ge=0, le=100
    )
    top_k: int = setting(0, "Decoding", "sample from the k likeliest; 0: all", ge=0)
    top_p: float = setting(
        0.9, "Decoding", "sample from the likeliest that add up to p", gt=0, le=1
    )
    min_p: float = setting(
        0.0, "Decoding", "drop tokens below this share of the likeliest", ge=0, le=1
    )
    typical_p: float = setting(
        1.0, "Decoding", "sample from the most typical that add up to p", gt=0, le=1
    )
    seed: int | None = setting(None, "Decoding", "makes sampling repeatable")
    num_beams: int = setting(
        1, "Decoding", "beams of a beam search, at most 16; 1: none", ge=1, le=16
    )
    num_return_sequences: int = setting(1, "Decoding", "how many answers", ge=1, le=16)
    length_penalty: float = setting(
        1.0, "Decoding", "scores of beams are divided by length to this power", ge=-10, le=10
    )
    early_stopping: EarlyStopping = setting(
        "false", "Decoding", "beams end when enough are done (true), or no better one is likely "
        "(false) or possible (never)"
    )  # fmt: skip
    repetition_penalty: float = setting(1.0, "Decoding", "above 1: repeat less", gt=0, le=10)
    frequency_penalty: float = setting(
        0.0, "Decoding", "off a token's score each time the answer has it", ge=-2, le=2
    )
    presence_penalty: float = setting(
        0.0, "Decoding", "off a token's score where the answer has it", ge=-2, le=2
    )
    no_repeat_ngram_size: int = setting(0, "Decoding", "no n tokens in a row twice; 0: off", ge=0)
    banned_words: Texts = setting([], "Decoding", "texts that no answer contains")
    logit_bias: Texts = setting(
        [], "Decoding", "TOKEN=BIAS (an id or its spelling): added to its score; -inf forbids it"
    )
    stop: Texts = setting([], "Decoding", "texts that end an answer")
    stop_tokens: Texts = setting([], "Decoding", "tokens that end an answer, ids or spelled")
    logprobs: int = setting(
        0, "Decoding", "report log-probabilities, and those of the k likeliest", ge=0, le=20
    )
    show_beams: bool = setting(False, "Talking", "draw all beams while they grow")


class GenerateSettings(AnswerSettings):
    """The settings of `vicuna generate`."""

    input_text: str = setting("", "Talking", "material that the instruction is about")
    input: str = setting("", "Files", "a file of instructions to answer, one after another")
    output: str = setting("", "Files", "where the answers go, one JSON object a line")
    json_output: bool = setting(False, "Files", "print one JSON object (--json)")


class RunSettings(AnswerSettings):
    """The settings of `vicuna run`."""

    engine: Literal["llama.cpp"] = setting("llama.cpp", "Model", "always llama.cpp")
