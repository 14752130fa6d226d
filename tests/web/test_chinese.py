"""The Chinese page: one vocabulary, and no sentence that is half English."""

from __future__ import annotations

import re

import pytest
from app_kit import english_half

from vicuna.i18n.translate import catalogue
from vicuna.web.i18n import catalog

TEXTS = {key: both[1] for key, both in catalog().items()} | catalogue("zh")

# One word for each thing. Left: what is not said; right: what is said instead.
NOT_SAID = {
    "底座": "基座",
    "词元": "token",
    r"(?<![结约])束(?!缚)": "beam",
    "评估": "验证集，验证",
    "次更新": "步",
    "微调器|适配层": "适配器",
}


@pytest.mark.parametrize("wrong", NOT_SAID)
def test_one_vocabulary(wrong: str) -> None:
    found = {key: text for key, text in TEXTS.items() if re.search(wrong, text)}
    assert found == {}, f"say {NOT_SAID[wrong]}"


def test_no_text_of_the_chinese_page_has_an_english_half() -> None:
    found = {key: half for key, text in TEXTS.items() if (half := english_half(text))}
    for own in ("page.language", "instruct.placeholder"):  # which say it in the other language
        found.pop(own, None)
    assert found == {}


@pytest.mark.parametrize(
    ("text", "half"),
    [
        ("太长: 5762 tokens in one turn", "tokens in one turn"),
        ("基座（this CPU has no bf16）", "this CPU has no"),
        ("请用 --model FOLDER 或 --engine cpu 启动 vicuna web。", ""),
        ("无法读取：「no such file」", ""),
    ],
)
def test_halves_are_found(text: str, half: str) -> None:
    assert english_half(text) == half
