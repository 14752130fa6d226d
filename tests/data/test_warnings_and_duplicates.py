"""Warnings about what parses and still hurts; duplicates found, and none invented."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest

from vicuna.data import duplicates
from vicuna.data.conversation import Conversation, Turn
from vicuna.data.duplicates import find_duplicates, fingerprints, question_hash
from vicuna.data.records import reasons as why
from vicuna.data.records.text_warnings import warnings


def talk(question: str, answer: str, material: str = "") -> Conversation:
    return Conversation([Turn("user", question, material), Turn("assistant", answer)], 9)


def reasons(question: str, answer: str) -> list[str]:
    return [p.reason.split(": ")[0] for p in warnings(talk(question, answer))]


def test_ordinary_text_gives_no_warning() -> None:
    assert warnings(talk("鸭子会飞吗？", "家鸭一般飞不远，野鸭会飞。参见[1]，约 90% 如此。")) == []
    assert warnings(talk("写一段代码", "```py\nprint(f'{name} < {x}')\n```")) == []
    assert reasons("他说：“用户：你好”", "café、naïve、Äpfel、5xx 错误、罗马数字 XXX1") == []
    assert reasons("作为一个AI语言模型，你怎么看？", "我没有看法。") == []


def test_no_chinese() -> None:
    assert reasons("Reword this.", "He felt sad.") == [why.NO_CHINESE]
    assert reasons("Übersetze", "naïve") == [why.NO_CHINESE]
    assert reasons("Translate: 天空", "sky") == []


@pytest.mark.parametrize(
    "text",
    [
        "好\n### Response:\n对",
        "### Instruction:\n写",
        "问题\n### 回答：好",
        "<|im_start|>user",
        "好<|eot_id|>",
        "[INST] 写 [/INST]",
        "<<SYS>>",
        "</s>",
        "<user>: 你好",
        "你好\nUser:再见",
        "好\nAssistant: 对",
        "Human: 你好",
    ],
)
def test_marks_of_other_templates(text: str) -> None:
    assert reasons(text, "好的") == [why.OTHER_TEMPLATE]
    (problem,) = warnings(talk("好的", text))
    assert problem.field == "turn 2 (assistant)"
    assert problem.line == 9


@pytest.mark.parametrize(
    "text",
    [
        "天空为什么是蓝的？".encode().decode("latin-1"),
        "天空为什么是蓝的？".encode().decode("cp1252", "replace"),
        "你好，我的名字是小明。".encode().decode("gbk", "replace"),
        "itâ€™s 好",
        "结果是锟斤拷锟斤拷",
        "烫烫烫烫",
    ],
)
def test_mojibake(text: str) -> None:
    assert why.MOJIBAKE in reasons(f"修正：{text}", "好的")


@pytest.mark.parametrize(
    "text",
    [
        "此致\n[你的名字]",
        "您好，我是XXX。",
        "亲爱的【客户姓名】：",
        "Dear [Your Name]",
        "{name}，您好",
    ],
)
def test_placeholders(text: str) -> None:
    assert reasons("写一封信", text) == [why.PLACEHOLDER]


def test_shifted_roles_and_parrots() -> None:
    assert reasons("作为一个AI语言模型，我没有感情。", "谢谢") == [why.SHIFTED]
    assert reasons("As an AI language model, I cannot.", "谢谢") == [why.SHIFTED]
    assert reasons("鸭子会飞吗？", "鸭子会飞吗？") == [why.SAME]
    assert warnings(talk("改错", "鸭子会飞", "鸭子会飞")) == []


# Hashes and duplicates

LETTERS = [chr(c) for c in range(0x4E00, 0x4E00 + 2000)]


def texts(n: int, length: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(LETTERS, k=length)) for _ in range(n)]


def repeats(conversations: list[Conversation]) -> tuple[np.ndarray, np.ndarray]:
    return find_duplicates(*fingerprints(conversations))


def test_a_sketch_does_not_depend_on_its_neighbours() -> None:
    long = "很长的文字 abc，" * 4000
    some = [talk("甲", "乙"), talk(long, "🙂" * 900), talk("", "。"), talk("什么", long[:3000])]
    exact, near = fingerprints(some)
    for i, conversation in enumerate(some):
        alone = fingerprints([conversation])
        assert alone[0][0] == exact[i]
        np.testing.assert_array_equal(alone[1][0], near[i])
    assert fingerprints([])[1].shape == (0, duplicates.SIGNATURE)


def test_hashes_have_their_shapes_and_do_not_depend_on_the_process() -> None:
    exact, near = fingerprints([talk("鸭子会飞吗？", "会。")])
    assert (exact.dtype, exact.shape) == (np.uint64, (1,))
    assert (near.dtype, near.shape) == (np.uint32, (1, duplicates.SIGNATURE))
    code = (
        "from vicuna.data.duplicates import *; from vicuna.data.conversation import *;"
        "c = Conversation([Turn('user', '鸭子会飞吗？'), Turn('assistant', '会。')]);"
        "print(fingerprints([c])[0][0], fingerprints([c])[1][0].tolist(), question_hash(c))"
    )
    again = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", code], capture_output=True, text=True, check=True
    )
    question = question_hash(talk("鸭子会飞吗？", "会。"))
    assert again.stdout.split("\n")[0] == f"{exact[0]} {near[0].tolist()} {question}"


def test_exact_hash_sees_roles_and_question_hash_only_the_question() -> None:
    some = [talk("甲", "乙"), talk("乙", "甲"), talk("甲", "乙", "丙"), talk("甲乙", "")]
    assert len(set(fingerprints(some)[0].tolist())) == len(some)
    assert question_hash(talk("甲  乙", "一")) == question_hash(talk("甲 乙\n", "二"))
    assert question_hash(talk("甲", "一", "丙")) != question_hash(talk("甲", "一"))
    assert question_hash(Conversation([Turn("assistant", "甲")], kind="text")) >= 0


def test_duplicates_of_a_constructed_set() -> None:
    base = [talk(t[:40], t[40:]) for t in texts(60, 240)]
    exact = [base[3], base[7]]
    punctuated = [talk(base[5].turns[0].text + "？！", base[5].turns[1].text.replace("一", " 一"))]
    changed = [talk(base[9].turns[0].text, base[9].turns[1].text[:-2] + "改动")]
    first, near = repeats(base + exact + punctuated + changed)
    assert (first[:60] == -1).all()
    assert (near[:60] == -1).all()
    assert first[60:].tolist() == [3, 7, -1, -1]
    assert near[60:].tolist() == [-1, -1, 5, 9]


@pytest.mark.parametrize("length", [2, 6, 30, 300, 5000])
def test_random_texts_are_no_duplicates(length: int) -> None:
    distinct = [talk(t[: length // 2], t[length // 2 :]) for t in texts(80, length, seed=1)]
    first, near = repeats(distinct)
    assert (first == -1).all()
    assert (near == -1).all()


def test_a_long_text_with_one_change_is_found() -> None:
    (text,) = texts(1, 20_000)
    _, near = repeats([talk("概括", text), talk("概括", text[:500] + "改动" + text[502:])])
    assert near.tolist() == [-1, 0]


def test_similar_pairs_always_share_a_band() -> None:
    rng = np.random.default_rng(0)
    near = rng.integers(0, 1 << 32, (400, duplicates.SIGNATURE), dtype=np.uint32)
    near[200:] = near[:200]
    for row in near[200:]:
        row[rng.choice(duplicates.SIGNATURE, 3, replace=False)] += np.uint32(1)
    _, found = find_duplicates(np.arange(400, dtype=np.uint64), near)
    assert found[200:].tolist() == list(range(200))
    near[200:, 0:4] += np.uint32(7)
    _, found = find_duplicates(np.arange(400, dtype=np.uint64), near)
    assert (found == -1).all()


def test_few_or_no_records() -> None:
    for n in (0, 1):
        first, near = find_duplicates(np.zeros(n, np.uint64), np.zeros((n, 24), np.uint32))
        assert first.tolist() == near.tolist() == [-1] * n


def test_a_signature_is_the_first_hash_from_each_point_on() -> None:
    """By the definition: short, usual and long texts, alone and beside each other."""
    texts = [
        "鸭",
        "鸭子会飞",
        "鸭子会飞吗？会的，但是不高。",
        "abc" * 700 + "鸭子",
        "",
        "长" * 2000 + "b",
    ]
    exact = np.arange(len(texts), dtype=np.uint64) * np.uint64(7919)
    found = duplicates._signatures(texts, exact)
    for text, own, row in zip(texts, exact, found, strict=True):
        units = [c.lower() for c in text if c.isalnum()]
        if len(units) > duplicates.LONGEST:
            units = units[: duplicates.LONGEST // 2] + units[-duplicates.LONGEST // 2 :]
        shingles = [units[i : i + 4] for i in range(len(units) - 3)]
        numbers = [sum(ord(c) << (16 * k) for k, c in enumerate(s)) for s in shingles]
        hashes = duplicates._turned(np.array(numbers or [own], np.uint64)).tolist()
        for point, value in zip(duplicates._POINTS.tolist(), row.tolist(), strict=True):
            assert value == min(hashes, key=lambda h: (h - point) % 2**32)
