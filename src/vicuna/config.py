"""The settings of each command: one table that gives the YAML keys, the command line and the help.

`vicuna COMMAND [RECIPE.yaml] [--key value | key=value] ...`: later wins. All mistakes are reported
together, a misspelt key with the nearest right one, a name of the 2023 project with today's.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from vicuna.errors import SettingsError, UserError

# What a run writes beside its settings into config.yaml; skipped when the file is used as a recipe.
RUN_KEYS = ("resolved", "environment")

OLD_NAMES = {
    "data_path": "dataset",
    "output_path": "output_dir",
    "model_path": "model",
    "base_model": "model",
    "model_name_or_path": "model",
    "lora_path": "adapter",
    "adapter_name_or_path": "adapter",
    "micro_batch": "micro_batch_size",
    "per_device_train_batch_size": "micro_batch_size",
    "total_batch": "batch_size",
    "gradient_accumulation_steps": "batch_size (examples in an update; it is cut by itself)",
    "test_size": "val_size",
    "num_epoch": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "log_steps": "logging_steps",
    "prompt_type": "template",
    "lora_checkpoint": "resume (to go on), or init_adapter (weights alone)",
    "resume_from_checkpoint": "resume",
    "lora_remote_checkpoint": "resume with a hub id",
    "ignore_data_skip": "from_data_beginning",
    "wandb": "report_to wandb",
    "int8": "precision int8",
    "load_in_8bit": "precision int8",
    "load_in_4bit": "precision nf4",
    "deepspeed": "precision and gradient_checkpointing (DeepSpeed comes with multi-GPU training)",
    "max_tokens": "max_new_tokens",
    "max_length": "cutoff_len",
    "use_typewriter": "nothing: answers always stream",
    "show_beam": "show_beams",
    "use_local": "nothing: adapters of any age are opened as they are",
    "share_link": "nothing here: the page has --share",
}


class DatasetEntry(BaseModel):
    """One source of data: a file, folder, glob or hub id; how often, and how much of it."""

    model_config = ConfigDict(extra="forbid")
    path: str
    weight: float = Field(1.0, gt=0)
    max_samples: int = Field(0, ge=0)


def _entry(value: Any) -> Any:
    """`path` or `path@weight=2,max_samples=100` from the command line."""
    if not isinstance(value, str):
        return value
    if "@" in value and Path(value).exists():
        return {"path": value}
    path, _, options = value.partition("@")
    fields: dict[str, Any] = {"path": path}
    for option in filter(None, options.split(",")):
        key, _, given = option.partition("=")
        fields[key.strip()] = given.strip()
    return fields


def _entries(value: Any) -> Any:
    if value is None:
        return []
    return [_entry(v) for v in value] if isinstance(value, list) else [_entry(value)]


def _words(value: Any) -> Any:
    """A list, or words separated by commas."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, (list, tuple)):
        return [w.strip() for v in value for w in str(v).split(",") if w.strip()]
    return value


Datasets = Annotated[list[DatasetEntry], BeforeValidator(_entries)]
Words = Annotated[list[str], BeforeValidator(_words)]
Checkpointing = Annotated[
    Literal["none", "selective", "full", "offload"],
    BeforeValidator(lambda v: _SWITCH.get(str(v).lower(), v)),
]
# It was a switch once, and still is one where nothing else is said.
_SWITCH = dict.fromkeys(("true", "yes", "on", "1"), "full")
_SWITCH |= dict.fromkeys(("false", "no", "off", "0", "none"), "none")
# What a setting that is named without a value means, where it is not a plain switch.
_BARE = {"resume": "last", "gradient_checkpointing": "full"}
Texts = Annotated[list[str], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)]
EarlyStopping = Annotated[
    Literal["true", "false", "never"], BeforeValidator(lambda v: str(v).lower())
]


def _group(name: str) -> dict[str, str]:
    return {"group": name}


class Settings(BaseModel):
    """Common to all commands."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), validate_default=True)


def setting(default: Any, group: str, text: str, **limits: Any) -> Any:
    """A field with its place in the help."""
    return Field(default, description=text, json_schema_extra={"group": group}, **limits)


class DataSettings(Settings):
    """How records become examples; the same for training and for `vicuna data`."""

    model: str = setting(
        "smollm2-135m", "Base", "the base: smollm2-135m, a folder, a .gguf file, or a hub id"
    )
    template: str = setting(
        "auto",
        "Data",
        "auto (the tokenizer's own), alpaca, vicuna-chat, llama3, ..., or a YAML file",
    )
    cutoff_len: int = setting(2048, "Data", "longest example in tokens", ge=16)
    overlong: Literal["drop", "split", "cut"] = setting(
        "drop",
        "Data",
        "what happens to longer ones: drop, split at turns, or cut (never taught to end)",
    )
    train_turns: Literal["all", "last"] = setting("all", "Data", "which answers are learned")
    max_samples: int = setting(
        0, "Data", "use at most so many records of each file; 0 is all", ge=0
    )
    strict: bool = setting(False, "Data", "stop at the first bad record")
    encoding: str = setting("", "Data", "encoding of the files, where it is not found by itself")


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

    precision: Literal["auto", "fp32", "bf16", "fp16", "int8", "nf4"] = setting(
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


class AnswerSettings(Settings):
    """The settings of `vicuna generate` and `vicuna chat`."""

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
    threads: int = setting(0, "Model", "of llama.cpp; 0: one for each core it may use", ge=0)
    template: str = setting(
        "", "Model", "where not given, the adapter's own, else the tokenizer's (auto)"
    )
    allow_other_base: bool = setting(False, "Model", "accept an adapter of other weights")
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


class DataCommandSettings(DataSettings):
    """The settings of `vicuna data check` and `stats`."""

    json_output: bool = setting(False, "Output", "print one JSON object (--json)")


class PreviewSettings(DataSettings):
    """The settings of `vicuna data preview`."""

    number: int = setting(3, "Output", "how many examples to show", ge=1)
    start: int = setting(0, "Output", "the first example to show, from 0", ge=0)


class ConvertSettings(Settings):
    """The settings of `vicuna data convert`."""

    to: Literal["alpaca", "chat", "history", "sharegpt", "messages", "pair"] = setting(
        "messages", "Output", "alpaca, chat, history, sharegpt, messages, pair"
    )
    output: str = setting("", "Output", "the file to write, one JSON object a line")
    force: bool = setting(False, "Output", "replace an existing file")
    encoding: str = setting("", "Input", "encoding of the files, where it is not found by itself")


class DoctorSettings(Settings):
    """The settings of `vicuna doctor`."""

    model: str = setting("smollm2-135m", "Model", "the base to look at")
    template: str = setting("auto", "Model", "the template to check it with")
    json_output: bool = setting(False, "Output", "print one JSON object (--json)")


class DemoSettings(Settings):
    """The settings of `vicuna demo`."""

    output_dir: str = setting("runs/demo", "Demo", "the run's folder; an older demo is replaced")
    quick: bool = setting(False, "Demo", "a few updates only: to see that everything works")
    seed: int = setting(42, "Demo", "decides the order of examples and the adapter's first weights")


T = TypeVar("T", bound=Settings)
M = TypeVar("M", bound=BaseModel)


def parse(
    cls: type[T], words: Sequence[str], free: list[str] | None = None
) -> tuple[T, dict[str, Any]]:
    """Settings from what stands behind a command, and what was given by name.

    Args:
        free: takes words that are neither settings nor recipes (an instruction, file names); None
            where a command has no use for them.

    Raises: SettingsError naming every mistake.
    """
    values, mistakes = _collect(cls, list(words), free)
    return build(cls, values, mistakes), values


def build(cls: type[M], values: dict[str, Any], mistakes: Sequence[str] = ()) -> M:
    """Validate values under today's names.

    Raises: SettingsError naming every mistake.
    """
    found = list(mistakes)
    try:
        settings = cls(**values)
    except ValidationError as e:
        found += [_in_words(cls, error) for error in e.errors()]
    if found:
        raise SettingsError(found)
    return settings


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings in a YAML file; what a run notes beside them is left out.

    Raises: UserError where there is no such file, or it is not a table of settings.
    """
    import yaml

    if not path.is_file():
        raise UserError("no such recipe", where=str(path), fix=_recipes_hint())
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"not valid YAML: {e}", where=str(path)) from e
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError("expected lines of the form key: value", where=str(path))
    return {str(k): v for k, v in loaded.items() if k not in RUN_KEYS}


def builtin_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(__file__).parent / "recipes"
    return {p.stem: p for p in sorted(folder.glob("*.yaml"))}


def _recipes_hint() -> str:
    return f"Give a YAML file, or one that comes with the project: {', '.join(builtin_recipes())}."


def _collect(
    cls: type[Settings], words: list[str], free: list[str] | None
) -> tuple[dict[str, Any], list[str]]:
    values: dict[str, Any] = {}
    mistakes: list[str] = []
    i = 0
    while i < len(words):
        word = words[i]
        i += 1
        if word.startswith("--"):
            key, given, rest = word[2:].partition("=")
            key = {"json": "json_output"}.get(key, key.replace("-", "_"))
            taken: list[str] = [rest] if given else []
            while not given and i < len(words) and not words[i].startswith("--"):
                if (taken and not _is_list(cls, key)) or _is_flag(cls, key, words[i]):
                    break
                taken.append(words[i])
                i += 1
            _set(cls, values, mistakes, key, taken)
        elif _assigns(cls, word, strict=free is not None):
            key, _, rest = word.partition("=")
            _set(cls, values, mistakes, key.replace("-", "_"), [rest])
        elif free is not None:
            free.append(word)
        elif word.endswith((".yaml", ".yml")) or word in builtin_recipes():
            recipe = read_recipe(builtin_recipes().get(word, Path(word)))
            mistakes += _unknown(cls, recipe)
            values.update({k: v for k, v in recipe.items() if k in cls.model_fields})
        else:
            mistakes.append(f"{word!r} is neither a setting (--key value) nor a recipe (.yaml)")
    return values, mistakes


def _assigns(cls: type[Settings], word: str, strict: bool) -> bool:
    """Whether a word is key=value; where free text is allowed, only a known key makes it one."""
    key, equals, _ = word.partition("=")
    key = key.replace("-", "_")
    return bool(equals) and (key in cls.model_fields or (not strict and key.isidentifier()))


def _set(
    cls: type[Settings], values: dict[str, Any], mistakes: list[str], key: str, taken: list[str]
) -> None:
    if key not in cls.model_fields and key.startswith("no_") and key[3:] in cls.model_fields:
        key, taken = key[3:], ["false"]
    unknown = _unknown(cls, [key])
    if unknown:
        mistakes += unknown
        return
    if not taken:
        if key in _BARE:
            taken = [_BARE[key]]
        elif _is_bool(cls, key):
            taken = ["true"]
        else:
            mistakes.append(f"{key}: a value is missing")
            return
    if _is_list(cls, key):
        # The option may be repeated; what a recipe said is replaced by the first.
        values[key] = taken if not isinstance(values.get(key), _Given) else [*values[key], *taken]
        values[key] = _Given(values[key])
    else:
        values[key] = None if taken[0].lower() == "none" else taken[0]


class _Given(list[Any]):
    """A list that came from the command line."""


def _is_list(cls: type[Settings], key: str) -> bool:
    field = cls.model_fields.get(key)
    return field is not None and typing.get_origin(field.annotation) is list


def _is_flag(cls: type[Settings], key: str, following: str) -> bool:
    """Whether a switch stands alone: what follows it is not one of its values."""
    if key not in cls.model_fields:
        return False
    if key in _BARE and key != "resume":
        recipe = following.endswith((".yaml", ".yml")) or following in builtin_recipes()
        return recipe or "=" in following
    return _is_bool(cls, key) and following.lower() not in _SWITCH


def _is_bool(cls: type[Settings], key: str) -> bool:
    annotation = cls.model_fields[key].annotation
    return annotation is bool or bool in typing.get_args(annotation)


def _unknown(cls: type[Settings], keys: Any) -> list[str]:
    found = []
    for key in keys:
        if key in cls.model_fields:
            continue
        if key in OLD_NAMES:
            found.append(f"{key} is now {OLD_NAMES[key]}")
            continue
        close = difflib.get_close_matches(key, cls.model_fields, n=1)
        hint = f"; did you mean {close[0]}?" if close else "; vicuna COMMAND --help lists them"
        found.append(f"{key}: no such setting{hint}")
    return found


def _in_words(cls: type[BaseModel], error: Any) -> str:
    """One of pydantic's errors as a sentence with the setting, the value and what is allowed."""
    place = [str(p) for p in error["loc"]]
    name = ".".join(place)
    given = error.get("input")
    context = error.get("ctx", {})
    kind = error["type"]
    bounds = {
        "greater_than": "above {gt}",
        "greater_than_equal": "at least {ge}",
        "less_than": "below {lt}",
        "less_than_equal": "at most {le}",
        "literal_error": "{expected}",
    }
    if kind in bounds:
        return f"{name} is {given}, but must be {bounds[kind].format(**context)}"
    if kind == "missing":
        return f"{name} is missing"
    if kind == "extra_forbidden":
        close = difflib.get_close_matches(place[-1], cls.model_fields, n=1)
        return f"{name}: no such setting" + (f"; did you mean {close[0]}?" if close else "")
    expected = {"int": "a whole number", "float": "a number", "bool": "true or false"}
    expected |= {"string": "text", "tuple": "a list", "list": "a list", "mapping": "a table"}
    word = expected.get(kind.split("_")[0], error["msg"])
    return f"{name} is {given!r}, but must be {word}"
