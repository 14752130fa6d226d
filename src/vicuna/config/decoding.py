"""The settings of `vicuna generate` and `vicuna chat`, and of every command that loads a model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, Field

from vicuna.config.base import EarlyStopping, Settings, Texts, setting
from vicuna.config.precisions import PrecisionName


class ModelSettings(Settings):
    """Which model answers, and on what it is computed."""

    model: str = setting(
        "", "Model", "the base; where not given, the one that the adapter names, else smollm2-135m"
    )
    adapter: str = setting("", "Model", "an adapter, a run folder, or a hub id, of any age")
    precision: PrecisionName = setting(
        "auto", "Model", "type of the base's weights: auto, fp32, bf16, fp16, int8, nf4"
    )
    engine: Literal["torch", "llama.cpp", "vllm"] = setting(
        "torch",
        "Model",
        "what computes: torch, llama.cpp; vllm is experimental (has not been run on a GPU)",
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
    template: str = setting("", "Model", "default: the adapter's own, else the tokenizer's (auto)")
    thinking: Literal["auto", "on", "off"] = setting(
        "auto",
        "Model",
        "answers begin with a thought: on, off; auto: as the adapter was trained, else as the "
        "base's own template has it",
    )
    allow_other_base: bool = setting(False, "Model", "accept an adapter of other weights")


# Strategies, and which groups of settings act in each (`acts` of a field below).
STRATEGIES: dict[str, frozenset[str]] = {
    "greedy": frozenset(),
    "sample": frozenset({"sampling"}),
    "beam": frozenset({"beams"}),
    "beam-sample": frozenset({"sampling", "beams"}),
}


class Slider(NamedTuple):
    """The range that the web page offers; what is outside of it is refused there."""

    low: float
    high: float
    step: float


def decode_setting(
    default: Any,
    text: str,
    panel: str,
    slider: tuple[float, float, float] | None = None,
    acts: str = "",
    **limits: Any,
) -> Any:
    """A field of `Decoding`.

    Args:
        default: the neutral value, which changes nothing.
        text: its help.
        panel: the part of the page that it is shown in; "" for none.
        slider: low, high and step on the page; None for a text field or a menu.
        acts: "sampling" or "beams" if it only acts in strategies of that group; "" for all.
        limits: those of pydantic's `Field`.
    """
    extra: dict[str, Any] = {"group": "Decoding", "panel": panel, "acts": acts}
    extra["slider"] = None if slider is None else Slider(*slider)
    return Field(default, description=text, json_schema_extra=extra, **limits)


# Rows of the table whose default on the command line is not the neutral one.
_max_new_tokens = partial(
    decode_setting, text="longest answer in tokens", panel="main", slider=(1, 2048, 1), ge=1
)
_temperature = partial(
    decode_setting, text="of sampling; below 1 sharper, 0 takes the most likely token",
    panel="sampling", slider=(0.05, 2, 0.05), acts="sampling", ge=0, le=100,
)  # fmt: skip
_top_p = partial(
    decode_setting, text="sample from the most likely tokens that add up to p; 1: from all",
    panel="sampling", slider=(0.05, 1, 0.01), acts="sampling", gt=0, le=1,
)  # fmt: skip
# Rows whose type on the command line is not the library's.
_early_stopping = partial(
    decode_setting, text="beams end when enough are finished (true), when a better one is unlikely "
    "(false) or impossible (never)", panel="beams", acts="beams",
)  # fmt: skip
_logit_bias = partial(
    decode_setting, text="TOKEN=BIAS, the token by id or spelling: added to its logit; -inf "
    "forbids it", panel="words",
)  # fmt: skip

_Tokens = Annotated[
    tuple[int | str, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str | int) else v)
]
_Strings = Annotated[tuple[str, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else v)]


class Decoding(BaseModel):
    """The one table of decode settings: names, types, bounds, neutral defaults, help and sliders.

    From it come the library's settings (`generate.settings.Settings`), those of the commands
    (`AnswerSettings`), and the controls of the web page, which shows a panel in the order of this
    table. A new setting is a field here, its effect in `generate`, and its label in
    `web/texts/set.yaml`.

    Names and meanings are those of transformers' `generate`; `frequency_penalty`,
    `presence_penalty` and `logit_bias` are those of OpenAI's API.
    """

    max_new_tokens: int = _max_new_tokens(256)
    min_new_tokens: int = decode_setting(
        0, "no end token before so many tokens", "words", (0, 512, 1), ge=0
    )
    do_sample: bool = decode_setting(False, "draw tokens instead of taking the most likely one", "")
    temperature: float = _temperature(1.0)
    top_k: int = decode_setting(
        0, "sample from the k most likely tokens; 0: from all", "more_sampling", (0, 200, 1),
        acts="sampling", ge=0,
    )  # fmt: skip
    top_p: float = _top_p(1.0)
    min_p: float = decode_setting(
        0.0, "drop tokens below this share of the most likely one's probability; 0: none",
        "more_sampling", (0, 0.5, 0.01), acts="sampling", ge=0, le=1,
    )  # fmt: skip
    typical_p: float = decode_setting(
        1.0, "sample from the most typical tokens that add up to p; 1: from all", "more_sampling",
        (0.05, 1, 0.01), acts="sampling", gt=0, le=1,
    )  # fmt: skip
    seed: int | None = decode_setting(
        None, "makes sampling repeatable", "more_sampling", acts="sampling"
    )
    num_beams: int = decode_setting(
        1, "beams of a beam search, at most 16; 1: none", "beams", (2, 16, 1), ge=1, le=16
    )
    num_return_sequences: int = decode_setting(
        1, "number of answers", "answers", (1, 16, 1), ge=1, le=16
    )
    length_penalty: float = decode_setting(
        1.0, "a beam's score is divided by its length to this power", "beams", (-2, 4, 0.1),
        acts="beams", ge=-10, le=10,
    )  # fmt: skip
    early_stopping: bool | Literal["never"] = _early_stopping(False)
    repetition_penalty: float = decode_setting(
        1.0, "above 1: repeat less; 1: off", "repeating", (0.5, 3, 0.05), gt=0, le=10
    )
    frequency_penalty: float = decode_setting(
        0.0, "subtracted from a token's logit per occurrence in the answer", "repeating",
        (-2, 2, 0.1), ge=-2, le=2,
    )  # fmt: skip
    presence_penalty: float = decode_setting(
        0.0, "subtracted from a token's logit once if the answer has it", "repeating",
        (-2, 2, 0.1), ge=-2, le=2,
    )  # fmt: skip
    no_repeat_ngram_size: int = decode_setting(
        0, "no n tokens in a row twice; 0: off", "repeating", (0, 10, 1), ge=0
    )
    banned_words: _Strings = decode_setting((), "texts that no answer contains", "words")
    logit_bias: Mapping[int | str, Annotated[float, Field(allow_inf_nan=True)]] = _logit_bias({})
    stop: _Strings = decode_setting((), "texts that end an answer and are not shown", "words")
    stop_tokens: _Tokens = decode_setting(
        (), "tokens that end an answer besides the model's own, by id or spelling", "words"
    )
    logprobs: int = decode_setting(
        0, "report each token's log-probability, and the k most likely ones", "logprobs",
        (0, 10, 1), ge=0, le=20,
    )  # fmt: skip


def fields_that_act(group: str) -> dict[str, Any]:
    """Settings that only act in strategies of a group ("sampling", "beams"): neutral values by
    name."""
    fields = Decoding.model_fields
    return {name: f.default for name, f in fields.items() if extra(name)["acts"] == group}


def extra(name: str) -> dict[str, Any]:
    """What the table says of a setting besides its type, default, bounds and help."""
    found = Decoding.model_fields[name].json_schema_extra
    assert isinstance(found, dict)
    return found


class AnswerSettings(Decoding, ModelSettings):
    """The settings of `vicuna generate` and `vicuna chat`: their defaults of sampling are not
    neutral, and count only when tokens are sampled."""

    max_new_tokens: int = _max_new_tokens(512)
    temperature: float = _temperature(0.7)
    top_p: float = _top_p(0.9)
    early_stopping: EarlyStopping = _early_stopping("false")  # type: ignore[assignment]
    logit_bias: Texts = _logit_bias([])  # type: ignore[assignment]
    system: str = setting("", "Talking", "system prompt")
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
