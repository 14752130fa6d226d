"""The tokenizer in a GGUF file's metadata as a tokenizer.json.

Built here and not by transformers, which knows one rule of cutting text where GGUF names several:
the embedded base's digits, for one, would be merged into numbers that it never saw in training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vicuna.errors import UserError
from vicuna.gguf import pretokenizers

# Values of `tokenizer.ggml.token_type`.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "▁"
_NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_ENDS = ("eos", "eot", "eom")


def write_tokenizer(gguf: Path, fields: dict[str, Any], folder: Path) -> None:
    """Write tokenizer.json and its companions into a folder.

    Args:
        gguf: for messages.
        fields: the file's metadata by key.

    Raises: UserError where it is of a kind that is not known here.
    """
    kind = fields.get("tokenizer.ggml.model")
    if kind == "gpt2":
        spec = _byte_level(gguf, fields)
    elif kind == "llama":
        spec = _sentencepiece(fields)
    else:
        raise UserError(
            f"a tokenizer of kind {kind!r}, which cannot be read from GGUF yet",
            where=str(gguf),
            fix="Use the original model in Hugging Face's layout instead.",
        )
    text = json.dumps(spec, ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", _config(fields))
    if template := fields.get("tokenizer.chat_template"):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    _add_ends(folder / "generation_config.json", fields)


def _spec(fields: dict[str, Any], **parts: Any) -> dict[str, Any]:
    """A tokenizer.json around the parts that differ."""
    empty = {"truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": None}
    post = _bos_first(fields)
    return {
        "version": "1.0",
        **empty,
        "added_tokens": _added(fields),
        "post_processor": post,
        **parts,
    }


def _model(fields: dict[str, Any], merges: list[list[str]], **more: Any) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    vocab = {token: i for i, token in enumerate(tokens) if _type(fields, i) != UNUSED}
    return {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
        "ignore_merges": False, "vocab": vocab, "merges": merges, **more,
    }  # fmt: skip


def _type(fields: dict[str, Any], token_id: int) -> int:
    types = fields.get("tokenizer.ggml.token_type")
    return int(types[token_id]) if types else NORMAL


def _added(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """Tokens that are not made by merging. Only control tokens are special."""
    tokens = fields["tokenizer.ggml.tokens"]
    kinds = {i: _type(fields, i) for i in range(len(tokens))}
    return [
        {
            "id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": kind in (CONTROL, UNKNOWN),
        }
        for i, kind in kinds.items()
        if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]  # fmt: skip


def _bos_first(fields: dict[str, Any]) -> dict[str, Any] | None:
    """The step that puts BOS in front of a text, where the file says so."""
    bos = fields.get("tokenizer.ggml.bos_token_id")
    is_spm = fields.get("tokenizer.ggml.model") == "llama"
    if bos is None or not fields.get("tokenizer.ggml.add_bos_token", is_spm):
        return None
    token = fields["tokenizer.ggml.tokens"][bos]
    text = [{"Sequence": {"id": "A", "type_id": 0}}]
    first = [{"SpecialToken": {"id": token, "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": first + text,
        "pair": [*first, *text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [int(bos)], "tokens": [token]}},
    }


# -- byte-level BPE ----


def _byte_level(gguf: Path, fields: dict[str, Any]) -> dict[str, Any]:
    name = fields.get("tokenizer.ggml.pre", "")
    family = pretokenizers.by_name(name)
    if family is None:
        known = ", ".join(f.name for f in pretokenizers.FAMILIES)
        raise UserError(
            f"its tokenizer is of the family {name!r}, which is not known here",
            where=str(gguf),
            fix=f"Known: {known}, and SentencePiece. Use the original model in Hugging Face's "
            "layout instead.",
        )
    merges = [merge.split(" ", 1) for merge in fields["tokenizer.ggml.merges"]]
    return _spec(
        fields,
        model=_model(fields, merges, ignore_merges=family.ignore_merges),
        normalizer={"type": "NFC"} if family.composed else None,
        pre_tokenizer=pretokenizers.rule(family),
        decoder={
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
    )


# -- SentencePiece ----


def _sentencepiece(fields: dict[str, Any]) -> dict[str, Any]:
    spaced = fields.get("tokenizer.ggml.add_space_prefix", True)
    unknown = fields.get("tokenizer.ggml.unknown_token_id", 0)
    merges = merges_of(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"])
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    restore = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    first = [{"type": "Prepend", "prepend": SPACE}] if spaced else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if spaced else []
    return _spec(
        fields,
        model=_model(
            fields,
            merges,
            unk_token=fields["tokenizer.ggml.tokens"][unknown],
            fuse_unk=True,
            byte_fallback=True,
        ),
        normalizer={"type": "Sequence", "normalizers": [*first, replace]},
        decoder={
            "type": "Sequence",
            "decoders": [restore, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
    )


def merges_of(tokens: list[str], scores: list[float]) -> list[list[str]]:
    """The merges that say what SentencePiece's scores say.

    SentencePiece joins whichever neighbours make the piece of the highest score. As merges: every
    way to cut a piece into two others, those of the highest score first.
    """
    ids = {token: i for i, token in enumerate(tokens)}
    found = []
    for token, i in ids.items():
        cuts = ((token[:k], token[k:]) for k in range(1, len(token)))
        pairs = [(ids[a], ids[b], a, b) for a, b in cuts if a in ids and b in ids]
        found += [(-scores[i], n, a, b) for n, (_, _, a, b) in enumerate(sorted(pairs))]
    return [[a, b] for _, _, a, b in sorted(found, key=lambda f: f[:2])]


# -- companions ----


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, key in _NAMED.items():
        i = fields.get(f"tokenizer.ggml.{key}_token_id")
        if i is not None and i < len(tokens):
            config[f"{name}_token"] = tokens[i]
    return config


def _add_ends(path: Path, fields: dict[str, Any]) -> None:
    """Note all ids that end an answer, EOS first, beside what the file already says."""
    found = (fields.get(f"tokenizer.ggml.{name}_token_id") for name in _ENDS)
    ends = list(dict.fromkeys(int(i) for i in found if i is not None))
    said = json.loads(path.read_text()) if path.is_file() else {}
    if ends:
        _write_json(path, {**said, "eos_token_id": ends if len(ends) > 1 else ends[0]})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
