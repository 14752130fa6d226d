"""The texts that models are compared on: Chinese and English that no training here has seen."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from vicuna.config import VerifySettings
from vicuna.data.records.formats import parse
from vicuna.data.records.read_file import read
from vicuna.data.tokenizer import Tokenizer
from vicuna.errors import UserError
from vicuna.verify.logits import Texts

# Tokens of a text that are compared; what is longer is cut.
LONGEST = 256


def texts_for(settings: VerifySettings, tokenizer: Tokenizer) -> dict[str, Texts]:
    """The token ids of the texts, by kind: `zh` and `en`, or `data` where a file was given.

    Raises: UserError where the file has no usable text.
    """
    if settings.verify_data:
        sources = {"data": Path(settings.verify_data)}
    else:
        samples = Path(str(resources.files("vicuna.samples")))
        sources = {"zh": samples / "heldout_zh.jsonl", "en": samples / "plain_en.txt"}
    return {
        kind: _encoded(path, tokenizer, settings.verify_tokens) for kind, path in sources.items()
    }


def _encoded(path: Path, tokenizer: Tokenizer, budget: int) -> list[list[int]]:
    """The texts of a file, until so many tokens are reached."""
    if not path.is_file():
        raise UserError("no such file", where=f"verify_data {path}")
    found: list[list[int]] = []
    for text in _texts(path):
        if budget < 2:
            break
        ids = _ids(text, tokenizer)[: min(LONGEST, budget)]
        if len(ids) > 1:
            found.append(ids)
            budget -= len(ids)
    if not found:
        raise UserError(
            "no text in this file to compare with",
            where=str(path),
            fix="Any data file will do; vicuna data check shows what is wrong with it.",
        )
    return found


def _texts(path: Path) -> Iterable[str]:
    for raw in read(path, []):
        conversation = parse(raw).conversation
        if conversation is not None:
            yield "\n".join(turn.text for turn in conversation.turns)


def _ids(text: str, tokenizer: Tokenizer) -> list[int]:
    bos = tokenizer.data.bos_id
    return ([] if bos is None else [bos]) + tokenizer.text(text, first=True)
