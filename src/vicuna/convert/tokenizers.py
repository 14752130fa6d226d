"""The tokenizer of a model in Meta's layout, in Hugging Face's."""

from __future__ import annotations

import shutil
from pathlib import Path

from vicuna.convert.llama3_tokenizer import is_llama3, write_tokenizer
from vicuna.errors import UserError
from vicuna.json_yaml import read_json, write_json
from vicuna.model.base import locate_vocabulary
from vicuna.weights.output_folder import copy_side_files

_MODEL = "tokenizer.model"
_OURS = ("config.json", "generation_config.json")


def bring_tokenizer(source: Path, target: Path, given: str) -> None:
    """Put a tokenizer into a folder that has none: the one that was named, or `tokenizer.model`.

    Args:
        target: has the model's config.json.
        source: of the weights; Llama 1 has its tokenizer.model one folder up.
        given: a model or folder with a tokenizer in Hugging Face's layout, or "".

    Raises: UserError where there is none, or it is one that cannot be converted.
    """
    if given:
        folder = locate_vocabulary(given)
        kept = {n: (target / n).read_bytes() for n in _OURS if (target / n).is_file()}
        copy_side_files(folder, target)
        for name in _OURS:
            (target / name).unlink(missing_ok=True)
        for name, content in kept.items():
            (target / name).write_bytes(content)
        return
    if (target / "tokenizer.json").is_file() or (target / "tokenizer_config.json").is_file():
        return
    found = next((f for f in (source / _MODEL, source.parent / _MODEL) if f.is_file()), None)
    if found is None:
        raise UserError(
            "no tokenizer beside these weights",
            where=str(source),
            fix="Put tokenizer.model there, or add --tokenizer MODEL, one of the same family.",
        )
    if is_llama3(found):
        write_tokenizer(found, target, read_json(target / "config.json"))
        (target / _MODEL).unlink(missing_ok=True)  # transformers would take it for SentencePiece's
        return
    shutil.copyfile(found, target / _MODEL)
    write_json(
        target / "tokenizer_config.json",
        {
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "add_bos_token": True,
            "add_eos_token": False,
            "legacy": True,
        },
    )
