"""Llama 3's tokenizer.model in Hugging Face's layout: the ids are those of tiktoken's rule."""

from __future__ import annotations

import base64
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from vicuna.convert.llama3_tokenizer import control_tokens, is_llama3, read_ranks
from vicuna.convert.tokenizers import bring_tokenizer
from vicuna.errors import UserError
from vicuna.json_yaml import write_json

# Merged in the order of their ranks, each from two that came before.
PAIRS = ["he", "ll", "llo", "hello", " w", "or", "ld", " wor", " world", "12", "123", "你"]
MIDDLE = "你".encode()[:2]


def model_file(path: Path) -> list[bytes]:
    tokens = [bytes([b]) for b in range(256)] + [MIDDLE] + [p.encode() for p in PAIRS]
    lines = [base64.b64encode(t) + b" %d\n" % rank for rank, t in enumerate(tokens)]
    path.write_bytes(b"".join(lines))
    return tokens


def config_of(vocabulary: int, rope: str = "default") -> dict[str, Any]:
    return {
        "model_type": "llama", "vocab_size": vocabulary, "rope_parameters": {"rope_type": rope},
    }  # fmt: skip


def by_ranks(piece: bytes, tokens: list[bytes]) -> list[int]:
    """tiktoken's rule: a whole piece that is a token; else the pair of the lowest rank is merged."""
    ranks = {t: n for n, t in enumerate(tokens)}
    if piece in ranks:
        return [ranks[piece]]
    parts = [bytes([b]) for b in piece]
    while True:
        pairs = [(ranks.get(a + b, 1 << 30), i) for i, (a, b) in enumerate(pairwise(parts))]
        if not pairs or min(pairs)[0] == 1 << 30:
            return [ranks[p] for p in parts]
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    source, target = tmp_path / "meta", tmp_path / "hf"
    source.mkdir()
    target.mkdir()
    return source, target


def test_ids_are_those_of_tiktokens_rule(folders: tuple[Path, Path]) -> None:
    source, target = folders
    tokens = model_file(source / "tokenizer.model")
    (target / "tokenizer.model").write_bytes((source / "tokenizer.model").read_bytes())
    write_json(target / "config.json", config_of(len(tokens) + 256))
    bring_tokenizer(source, target, "")
    assert not (target / "tokenizer.model").exists()
    loaded = AutoTokenizer.from_pretrained(target)
    assert len(loaded) == len(tokens) + 256
    cut = {
        "hello world": ["hello", " world"],
        "helloworld": ["helloworld"],
        "1234": ["123", "4"],
        "你好 hell": ["你好", " hell"],
    }
    for text, pieces in cut.items():
        wanted = [n for piece in pieces for n in by_ranks(piece.encode(), tokens)]
        assert loaded(text)["input_ids"] == [len(tokens), *wanted], text
        assert loaded.decode(wanted) == text
    assert loaded.encode("<|eot_id|>", add_special_tokens=False) == [len(tokens) + 9]
    assert (loaded.bos_token_id, loaded.eos_token_id) == (len(tokens), len(tokens) + 1)


def test_control_tokens_have_metas_names() -> None:
    """As in the published tokenizer.py of Llama 3 and in the published files of 3.1."""
    old, new = control_tokens(256, False), control_tokens(256, True)
    assert len(set(old)) == len(set(new)) == 256
    assert old[8:11] == [
        "<|reserved_special_token_4|>", "<|eot_id|>", "<|reserved_special_token_5|>",
    ]  # fmt: skip
    assert old[-1] == "<|reserved_special_token_250|>"
    assert new[3:6] == [
        "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>",
    ]  # fmt: skip
    assert new[8:12] == [
        "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|reserved_special_token_3|>",
    ]  # fmt: skip
    assert new[-1] == "<|reserved_special_token_247|>"


def test_it_is_told_from_sentencepiece(tmp_path: Path) -> None:
    model_file(tmp_path / "a")
    (tmp_path / "b").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\2\n")
    assert is_llama3(tmp_path / "a")
    assert not is_llama3(tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: [*lines[:7], b"!!! 7", *lines[8:]], "line 8 is no token and rank"),
        (lambda lines: [*lines[:7], b"AA==", *lines[8:]], "line 8 is no token and rank"),
        (lambda lines: lines[:3] + lines[4:], "not 0, 1, 2"),
        (lambda lines: lines[:200], "no token for the byte 0xc8"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, change: Any, said: str) -> None:
    model_file(tmp_path / "x")
    lines = (tmp_path / "x").read_bytes().splitlines()
    (tmp_path / "x").write_bytes(b"\n".join(change(lines)))
    with pytest.raises(UserError, match=said):
        read_ranks(tmp_path / "x")


def test_another_models_tokenizer_is_refused(folders: tuple[Path, Path]) -> None:
    source, target = folders
    tokens = model_file(source.parent / "tokenizer.model")  # one folder up, as with Llama 1
    write_json(target / "config.json", config_of(len(tokens) + 5))
    with pytest.raises(UserError, match="do not belong together"):
        bring_tokenizer(source, target, "")
