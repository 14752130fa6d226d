"""How records become examples, and the settings of `vicuna data`."""

from __future__ import annotations

from typing import Literal

from vicuna.config.base import Settings, setting


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
    cutoff_len: int = setting(2048, "Data", "tokens of the longest example", ge=16)
    overlong: Literal["drop", "split", "cut"] = setting(
        "drop",
        "Data",
        "what to do with longer ones: drop, split at turns, or cut (their end token is not "
        "learned)",
    )
    train_turns: Literal["all", "last"] = setting(
        "all", "Data", "which answers are in the loss: all, or the last one"
    )
    thinking: Literal["auto", "on", "off"] = setting(
        "auto",
        "Data",
        "answers begin with a thought: as each record has it (auto), always (on), or never: "
        "thoughts are left out (off)",
    )
    thinking_loss: bool = setting(
        True, "Data", "thoughts are in the loss, not only the text after them"
    )
    max_samples: int = setting(0, "Data", "records to use of each file; 0: all", ge=0)
    strict: bool = setting(False, "Data", "stop at the first bad record")
    encoding: str = setting("", "Data", "encoding of the files, if it is not detected correctly")


class DataCheckSettings(DataSettings):
    """The settings of `vicuna data check` and `stats`."""

    json_output: bool = setting(False, "Output", "print one JSON object (--json)")


class DataPreviewSettings(DataSettings):
    """The settings of `vicuna data preview`."""

    number: int = setting(3, "Output", "how many examples to show", ge=1)
    start: int = setting(0, "Output", "the first example to show, from 0", ge=0)


class DataConvertSettings(Settings):
    """The settings of `vicuna data convert`."""

    to: Literal["alpaca", "chat", "history", "sharegpt", "messages", "pair"] = setting(
        "messages", "Output", "alpaca, chat, history, sharegpt, messages, pair"
    )
    output: str = setting("", "Output", "the file to write, one JSON object per line")
    force: bool = setting(False, "Output", "replace an existing file")
    encoding: str = setting("", "Input", "encoding of the files, if it is not detected correctly")
