"""The tokenizer in a GGUF file's metadata as a tokenizer.json.

Built here and not by transformers, whose conversion lacks the rule of the embedded base (digits by
themselves: it would merge them into numbers never seen in training), Qwen's NFC, and Llama 3's
`ignore_merges`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vicuna.errors import UserError

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
            "a tokenizer of kind {type!r}, which cannot be read from GGUF yet",
            type=kind,
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
    family = family_by_name(name)
    if family is None:
        known = ", ".join(f.name for f in FAMILIES)
        raise UserError(
            "its tokenizer is of the family {name!r}, which is not known here",
            name=name,
            known=known,
            where=str(gguf),
            fix="Known: {known}, and SentencePiece. Use the original model in Hugging Face's "
            "layout instead.",
        )
    merges = [merge.split(" ", 1) for merge in fields["tokenizer.ggml.merges"]]
    return _spec(
        fields,
        model=_model(fields, merges, ignore_merges=family.ignore_merges),
        normalizer={"type": "NFC"} if family.composed else None,
        pre_tokenizer=pre_tokenizer_of(family),
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


# -- how byte-level BPE families cut text before merging -------------------------------------------
#
# A GGUF file names only the family (`tokenizer.ggml.pre`); a tokenizer.json spells the rule out.
# Both directions are needed: to read the tokenizer of a GGUF file, and to write one.

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA3 = _WORDS + r"|\p{N}{1,3}" + _REST
_QWEN2 = _WORDS + r"|\p{N}" + _REST
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_LETTERS[0]}*{_LETTERS[1]}+"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_LETTERS[0]}+{_LETTERS[1]}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PretokenizerFamily:
    """A rule. steps: regular expressions text is split by, or `digits` (each digit by itself), or
    `gpt2` (the rule built into the byte-level step). ignore_merges: a word that is a token as a
    whole is taken at once. composed: text is brought into Unicode's form NFC first."""

    name: str
    steps: tuple[str, ...]
    ignore_merges: bool = False
    composed: bool = False


FAMILIES = (
    PretokenizerFamily("gpt-2", ("gpt2",)),
    PretokenizerFamily("smollm", ("digits", "gpt2")),
    PretokenizerFamily("llama-bpe", (_LLAMA3,), ignore_merges=True),
    PretokenizerFamily("qwen2", (_QWEN2,), composed=True),
    PretokenizerFamily("tekken", (_TEKKEN,), ignore_merges=True),
)


def family_by_name(name: str) -> PretokenizerFamily | None:
    """The family that GGUF calls so, where it is known here."""
    return next((f for f in FAMILIES if f.name == name), None)


def family_by_rule(tokenizer: dict[str, Any]) -> PretokenizerFamily | None:
    """The family of a tokenizer.json (parsed), where it is known here."""
    steps = _steps(tokenizer.get("pre_tokenizer"))
    return next((f for f in FAMILIES if f.steps == steps), None)


def _steps(part: dict[str, Any] | None) -> tuple[str, ...]:
    kind = (part or {}).get("type")
    if part is None or kind is None:
        return ()
    if kind == "Sequence":
        return tuple(s for inner in part["pretokenizers"] for s in _steps(inner))
    if kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
        return (str(part["pattern"].get("Regex")),)
    if kind == "Digits" and part.get("individual_digits"):
        return ("digits",)
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return ("gpt2",) if part.get("use_regex", True) else ()
    return (f"unknown {kind}",)


def pre_tokenizer_of(family: PretokenizerFamily) -> dict[str, Any]:
    """The `pre_tokenizer` of a tokenizer.json for a family."""
    parts: list[dict[str, Any]] = []
    for step in family.steps:
        if step == "digits":
            parts.append({"type": "Digits", "individual_digits": True})
        elif step != "gpt2":
            pattern = {"Regex": step}
            parts.append(
                {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
            )
    last = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": "gpt2" in family.steps,
    }
    return {"type": "Sequence", "pretokenizers": [*parts, last]}
