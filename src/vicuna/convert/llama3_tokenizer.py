"""Llama 3's `tokenizer.model`, lines of a token in base64 and its rank, as Hugging Face's files.

The control tokens are not in the file: Meta's code adds them behind the ranks, by these names.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

from vicuna.errors import UserError
from vicuna.json_yaml import write_json

_BEGIN, _END = "<|begin_of_text|>", "<|end_of_text|>"
# In the order of their ids; `None` is the next reserved one. 3.1 gave names to three of them.
_NAMES: dict[bool, tuple[str | None, ...]] = {
    False: (_BEGIN, _END, None, None, None, None, "<|start_header_id|>", "<|end_header_id|>",
            None, "<|eot_id|>"),
    True: (_BEGIN, _END, None, None, "<|finetune_right_pad_id|>", None, "<|start_header_id|>",
           "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
}  # fmt: skip


def is_llama3(path: Path) -> bool:
    """Whether a `tokenizer.model` is of this kind; SentencePiece's is binary."""
    with path.open("rb") as f:
        token, _, rank = f.readline(200).partition(b" ")
    return bool(token) and token.isascii() and rank.strip().isdigit()


def read_ranks(path: Path) -> dict[bytes, int]:
    """The tokens by their bytes.

    Raises: UserError where a line is damaged, or a rank or a single byte is missing.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as e:
            raise _damaged(path, f"line {number} is no token and rank") from e
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise _damaged(path, f"the ranks of its {len(ranks)} tokens are not 0, 1, 2 and so on")
    lacking = [b for b in range(256) if bytes([b]) not in ranks]
    if lacking:
        raise _damaged(path, f"it has no token for the byte {lacking[0]:#04x}")
    return ranks


def control_tokens(count: int, later: bool) -> list[str]:
    """The names of so many control tokens.

    Args:
        later: Llama 3.1 or later, told by its scaled positions.
    """
    names: list[str] = []
    reserved = 0
    for name in (*_NAMES[later], *[None] * count)[:count]:
        names.append(name or f"<|reserved_special_token_{reserved}|>")
        reserved += not name
    return names


def write_tokenizer(path: Path, folder: Path, config: dict[str, Any]) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` into a folder.

    Args:
        path: Llama 3's `tokenizer.model`.
        config: the model's config.json (parsed): how many tokens it has, and which Llama 3 it is.

    Raises: UserError where the file is damaged, or is not this model's.
    """
    from tokenizers import processors

    ranks = read_ranks(path)
    later = config["rope_parameters"]["rope_type"] == "llama3"
    count = int(config["vocab_size"]) - len(ranks)
    if count < len(_NAMES[later]):
        raise UserError(
            "the model has {vocab_size} tokens, its tokenizer {count} and {specials} special "
            "tokens",
            vocab_size=config["vocab_size"],
            count=len(ranks),
            specials=len(_NAMES[later]),
            where=str(path),
            fix="They do not belong together; take the model's own tokenizer.model.",
        )
    made = _converter(ranks, control_tokens(count, later)).converted()
    begin = (_BEGIN, len(ranks))
    made.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(f"{_BEGIN} $A", f"{_BEGIN} $A {_BEGIN}:1 $B:1", [begin]),
        ]
    )
    made.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": _BEGIN,
            "eos_token": _END,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        },
    )


def _converter(ranks: dict[bytes, int], control: list[str]) -> Any:
    """transformers' own, which cuts text as Llama 3 does, without the package `tiktoken`."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Converter(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:  # noqa: ARG004
            return ranks

    return Converter(vocab_file="", extra_special_tokens=control)


def _damaged(path: Path, why: str) -> UserError:
    return UserError(
        "the tokenizer is damaged: {why}", why=why, where=str(path), fix="Download the file again."
    )
