"""Tokenizers are read as they are, and what is wrong with them is found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from generate_kit import byte_level, sentencepiece, vocabulary
from tokenizers import Tokenizer as HFTokenizer

from kit import metaspace, save_tokenizer
from vicuna.data.templates.registry import find_template
from vicuna.data.tokenizer import Tokenizer, TokenizerData
from vicuna.errors import UserError
from vicuna.model.vocabulary import Finding, check_up, load_vocabulary


def findings(
    known: TokenizerData, template: str = "alpaca", rows: int | None = None, **config: Any
) -> list[Finding]:
    encoder = Tokenizer(known)
    size = encoder.vocab_size if rows is None else rows
    return check_up(encoder, find_template(template, known), size, config)


def bad(*args: Any, **config: Any) -> list[tuple[str, str]]:
    return [(f.level, f.text) for f in findings(*args, **config) if f.level != "ok"]


@pytest.mark.parametrize("make", [byte_level, sentencepiece, metaspace])
@pytest.mark.parametrize("template", ["alpaca", "chatml", "vicuna-chat"])
def test_a_sane_tokenizer_has_no_findings(make: Any, template: str) -> None:
    assert bad(vocabulary(make()), template, eos_token_id=1 if template != "chatml" else 3) == []


def test_an_end_token_that_is_not_special_is_found() -> None:
    tokenizer = byte_level()
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] != "</s>"]
    known = replace(vocabulary(tokenizer), tokenizer_json=json.dumps(spec))
    assert ("error", "not marked special") in [
        (a, "not marked special") for a, b in bad(known) if "not marked special" in b
    ]


@pytest.mark.parametrize("name", ["bos_id", "eos_id", "pad_id"])
def test_ids_outside_the_vocabulary_are_found(name: str) -> None:
    known = replace(vocabulary(byte_level()), **{name: 32000})
    assert any(a == "error" and "outside the vocabulary" in b for a, b in bad(known))


def test_a_model_with_fewer_rows_than_tokens_is_found() -> None:
    assert any("only 300 rows" in b for _, b in bad(vocabulary(byte_level()), rows=300))


@pytest.mark.parametrize("declared", [7, [7, 8]])
def test_a_disagreement_with_the_models_config_is_found(declared: Any) -> None:
    found = bad(vocabulary(byte_level()), eos_token_id=declared)
    assert [a for a, b in found if str(declared) in b] == ["warning"]


@pytest.mark.parametrize("declared", [None, 1, [7, 1]])
def test_agreement_with_the_models_config_is_fine(declared: Any) -> None:
    assert bad(vocabulary(byte_level()), eos_token_id=declared) == []


def test_a_templates_end_that_the_vocabulary_lacks_is_found() -> None:
    found = bad(vocabulary(byte_level()), "llama3")
    assert [a for a, b in found if "<|eot_id|>" in b and "</s>" in b] == ["warning"]


def test_a_lossy_tokenizer_is_found() -> None:
    from tokenizers import normalizers

    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFKC()  # type: ignore[assignment]
    assert any("round trip" in b for _, b in bad(vocabulary(tokenizer)))


# -- reading ----


def read(tmp_path: Path, tokenizer: HFTokenizer | None = None, **words: Any) -> TokenizerData:
    save_tokenizer(tmp_path, tokenizer, **words)
    return load_vocabulary(tmp_path)


def test_names_and_ids_are_read(tmp_path: Path) -> None:
    known = read(tmp_path, eos_token="<|im_end|>")
    assert (known.eos_token, known.eos_id) == ("<|im_end|>", 3)
    assert (known.bos_token, known.pad_id) == ("<s>", 1)
    assert known.special_tokens["<|im_start|>"] == 2


def test_bos_counts_only_where_the_tokenizer_puts_it(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    assert read(tmp_path / "plain").bos_id is None
    tokenizer = byte_level()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert read(tmp_path / "bos", tokenizer).bos_id == 0


def test_pad_falls_back_to_the_end(tmp_path: Path) -> None:
    assert read(tmp_path, pad_token=None).pad_id == 1


def test_all_ends_of_the_makers_are_kept(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
    assert read(tmp_path).end_ids == (1, 3)


def test_a_second_reading_comes_from_the_cache_and_a_change_is_seen(tmp_path: Path) -> None:
    first = read(tmp_path)
    assert load_vocabulary(tmp_path) == first
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert load_vocabulary(tmp_path) == replace(first, end_ids=(3,))


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="end-of-sequence"):
        read(tmp_path, eos_token=None, pad_token=None)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no usable tokenizer"):
        load_vocabulary(tmp_path)
