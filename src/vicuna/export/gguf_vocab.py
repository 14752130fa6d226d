"""A tokenizer in GGUF's words: tokens with types, merges or scores, special ids, chat template.

llama.cpp encodes text by itself; what is written here must make it give the same ids.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vicuna.data.tokenizer import TokenizerData
from vicuna.errors import UserError
from vicuna.gguf import tokenizer as gguf_tokenizer
from vicuna.gguf.tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)

# What llama.cpp's own converter gives tokens that are never found by merging.
_NEVER_MERGED, _PADDING = -1000.0, -10000.0


@dataclass(frozen=True)
class ChatFormat:
    """How a model is talked to, where that is not what its tokenizer says: a merged adapter's way.

    chat_template: in Jinja; "" leaves the tokenizer's. end_id: the token that ends an answer.
    """

    chat_template: str = ""
    end_id: int | None = None


@dataclass
class Tokens:
    """The tokens of a vocabulary by id, and how text becomes them.

    kind: `gpt2` (byte-level BPE, with `merges` and the family `pre`) or `llama` (SentencePiece,
    with `scores`). declared: special ids by role, as the base's files declare them.
    """

    kind: str
    texts: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    pre: str
    space_first: bool = False
    declared: dict[str, int] = field(default_factory=dict)


def add_vocabulary(
    writer: Any,
    vocabulary: TokenizerData,
    folder: Path,
    rows: int,
    chat_format: ChatFormat | None = None,
) -> None:
    """Write a tokenizer into the metadata of a `gguf.GGUFWriter`.

    Args:
        folder: the base's; its tokenizer.model, where it has one, gives the exact scores.
        rows: of the embedding; ids that the tokenizer does not use are filled up.
        chat_format: in place of the tokenizer's chat template and end token.

    Raises: UserError where llama.cpp has no such tokenizer.
    """
    tokens = read_tokens(vocabulary, folder, rows)
    writer.add_tokenizer_model(tokens.kind)
    writer.add_tokenizer_pre(tokens.pre)
    writer.add_token_list(tokens.texts)
    writer.add_token_types(tokens.types)
    if tokens.kind == "llama":
        writer.add_token_scores(tokens.scores)
        writer.add_add_space_prefix(tokens.space_first)
    else:
        writer.add_token_merges(tokens.merges)
    chat_format = chat_format or ChatFormat()
    _add_specials(writer, vocabulary, tokens, chat_format.end_id)
    template = chat_format.chat_template or vocabulary.chat_template
    if template:
        writer.add_chat_template(template)


def _declared(folder: Path, rows: int) -> dict[str, int]:
    """The special ids (bos, unk, pad ...) that the base's own files declare, config.json too."""
    from gguf import SpecialVocab

    return dict(SpecialVocab(folder, n_vocab=rows).special_token_ids)


def _add_specials(
    writer: Any, vocabulary: TokenizerData, tokens: Tokens, end_id: int | None
) -> None:
    bos = vocabulary.bos_id
    if bos is None:
        bos = vocabulary.special_tokens.get(vocabulary.bos_token, tokens.declared.get("bos"))
    if bos is not None:
        writer.add_bos_token_id(bos)
    writer.add_eos_token_id(vocabulary.eos_id)
    if "unk" in tokens.declared:
        writer.add_unk_token_id(tokens.declared["unk"])
    if "pad" in tokens.declared:
        writer.add_pad_token_id(tokens.declared["pad"])
    ends = ([] if end_id is None else [end_id]) + list(vocabulary.end_ids)
    others = [i for i in ends if i != vocabulary.eos_id]
    if others:
        writer.add_eot_token_id(others[0])
    writer.add_add_bos_token(vocabulary.bos_id is not None)
    writer.add_add_eos_token(False)


def read_tokens(vocabulary: TokenizerData, folder: Path, rows: int) -> Tokens:
    """The tokens of a tokenizer, `rows` of them.

    Raises: UserError where it is neither byte-level BPE of a known family nor SentencePiece.
    """
    spec = json.loads(vocabulary.tokenizer_json)
    model = spec["model"]
    if model["type"] != "BPE":
        raise UserError(
            "tokenizers of type {type} cannot be written as GGUF",
            type=model["type"],
            where=str(folder),
            fix="Byte-level BPE (Llama 3, Qwen) and SentencePiece BPE (Llama 2, Mistral) can.",
        )
    texts = {i: text for text, i in model["vocab"].items()}
    added = {t["id"]: t for t in spec["added_tokens"]}
    texts |= {i: t["content"] for i, t in added.items()}
    if max(texts) >= rows:
        raise UserError(
            "the tokenizer has token {texts}, the embedding only {rows} rows",
            texts=max(texts),
            rows=rows,
            where=str(folder),
            fix="Tokenizer and weights do not belong together.",
        )
    tokens = _byte_level(spec, folder) if not model.get("byte_fallback") else _sentencepiece(spec)
    tokens.declared = _declared(folder, rows)
    unknown = model.get("unk_token")
    scores: dict[str, float] = {}
    if tokens.kind == "llama" and (pieces := _pieces(folder)):
        scores = {pieces.id_to_piece(i): pieces.get_score(i) for i in range(pieces.vocab_size())}
        unknown = pieces.id_to_piece(pieces.unk_id())
    elif tokens.kind == "llama":
        scores = _scores_of_merges(model)
    for i in range(rows):
        text = texts.get(i, f"[PAD{i}]")
        kind = _type(text, i in texts, added.get(i), tokens.kind, unknown)
        tokens.texts.append(_written(text, added.get(i), tokens.kind))
        tokens.types.append(kind)
        if tokens.kind == "llama":
            tokens.scores.append(_score(scores, text, kind))
    return tokens


def _type(text: str, used: bool, added: dict[str, Any] | None, kind: str, unknown: Any) -> int:
    if not used:
        return UNUSED
    if text == unknown and kind == "llama":
        return UNKNOWN
    if kind == "llama" and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return BYTE
    if added is None:
        return NORMAL
    return CONTROL if added["special"] or _spelt_as_control(text) else USER_DEFINED


def _spelt_as_control(text: str) -> bool:
    """Whether llama.cpp's own converter takes an added token for a control token by its spelling.

    Some bases do not mark theirs as special. `<think>` and `<tool_call>` are not among them: they
    belong to the answer, and a runtime would not print them.
    """
    ends = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    named = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
    return text in named or any(text.startswith(a) and text.endswith(z) for a, z in ends)


def _written(text: str, added: dict[str, Any] | None, kind: str) -> str:
    """The text as GGUF holds it: tokens outside the vocabulary proper are plain there, too."""
    return text.replace(" ", SPACE) if kind == "llama" and added is None else text


# -- byte-level BPE ----


def _byte_level(spec: dict[str, Any], folder: Path) -> Tokens:
    family = gguf_tokenizer.family_by_rule(spec)
    if family is None:
        known = ", ".join(f.name for f in gguf_tokenizer.FAMILIES)
        rule = json.dumps(spec.get("pre_tokenizer"), ensure_ascii=False)
        raise UserError(
            "a tokenizer of no known family; it cuts text by {rule}",
            rule=rule[:400],
            known=known,
            where=str(folder),
            fix="Known: {known}, and SentencePiece. llama.cpp would encode text differently.",
        )
    merges = [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]]
    return Tokens("gpt2", [], [], [], merges, family.name)


# -- SentencePiece ----


def _sentencepiece(spec: dict[str, Any]) -> Tokens:
    return Tokens("llama", [], [], [], [], "default", space_first=_puts_space_first(spec))


def _puts_space_first(spec: dict[str, Any]) -> bool:
    """Whether text gets a space in front: by a normalizer, or by the Metaspace step."""

    def search(part: Any) -> bool:
        if not isinstance(part, dict):
            return False
        if part.get("type") == "Prepend":
            return True
        if part.get("type") == "Metaspace":
            return part.get("prepend_scheme", "always") != "never"
        inner = [*(part.get("normalizers") or ()), *(part.get("pretokenizers") or ())]
        return any(search(p) for p in inner)

    return search(spec.get("normalizer")) or search(spec.get("pre_tokenizer"))


def _pieces(folder: Path) -> Any:
    """The tokenizer.model of a base, None if it has none."""
    path = folder / "tokenizer.model"
    if not path.is_file():
        return None
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(path))


def _scores_of_merges(model: dict[str, Any]) -> dict[str, float]:
    """Scores by piece, which say what merges first, from the order of a tokenizer.json's merges."""
    scores: dict[str, float] = {}
    for rank, merge in enumerate(model["merges"]):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        scores.setdefault("".join(pair), -1.0 - rank)
    return scores


def _score(scores: dict[str, float], text: str, kind: int) -> float:
    if kind == UNUSED:
        return _PADDING
    if kind in (CONTROL, UNKNOWN, BYTE):
        return scores.get(text, 0.0)
    # Single characters are never made by merging; their scores decide nothing.
    return scores.get(text, 0.0 if len(text) == 1 else _NEVER_MERGED)
