"""What the page shows of a data set: counts, bad rows, tokens, lengths; every word escaped."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
from app_kit import english_half

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))
from run_kit import save_tiny_model

from vicuna.config import WebSettings
from vicuna.data.dataset import Lengths
from vicuna.data.records import file_types, find_files, read_file
from vicuna.data.records import reasons as said
from vicuna.errors import UserError
from vicuna.messages import Message
from vicuna.web import data_html, files, number_input, tab_data
from vicuna.web.data_view import DatasetCache, DatasetQuery, DatasetView
from vicuna.web.i18n import catalog, translate
from vicuna.web.state import App

EN, ZH = partial(translate, "en"), partial(translate, "zh")
EVIL = "<script>alert(1)</script><|im_end|> &amp; ${7*7} {{value}}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny")))


def write(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def good(i: int = 0, answer: str = "很好。") -> dict[str, str]:
    return {"instruction": f"第{i}题：你好吗？", "output": answer}


@pytest.fixture
def mixed(tmp_path: Path, tiny: str) -> DatasetView:
    records = [good(0), {"instruction": "没有回答"}, "{broken", good(3, EVIL), {"<img src=x>": 1}]
    path = write(tmp_path / "<b>mixed.jsonl", [*records, good(5, 9), good(6, "长" * 900)])
    return DatasetCache().get(DatasetQuery((path,), tiny, "auto", 256))


def test_the_report_counts_and_names_reasons_in_both_languages(mixed: DatasetView) -> None:
    html = data_html.report(mixed.report, EN)
    for words in ("<b>7</b>", "<b>3</b>", "no answer", "unknown format", "number taken as text"):
        assert words in html
    assert "too long" in html
    assert "&lt;b&gt;mixed.jsonl:2" in html
    assert "没有回答" in data_html.report(mixed.report, ZH)


def test_rows_are_paged_and_filtered(mixed: DatasetView) -> None:
    every, dropped = mixed.rows(), mixed.rows("dropped")
    assert [p.line for _, p in dropped] == [2, 3, 5, 7]
    assert len(every) > len(dropped)
    assert all(name == "<b>mixed.jsonl" for name, _ in every)
    many = dropped * 20
    assert data_html.pages(many) == 4
    last = data_html.problems(many, 3, EN)
    assert last.count("<tr>") == 1 + len(many) - 3 * data_html.PAGE
    assert data_html.pages([]) == 1
    assert "No rows" in data_html.problems([], 0, EN)


def test_no_word_of_a_file_becomes_html(mixed: DatasetView) -> None:
    shown = [data_html.report(mixed.report, EN), data_html.problems(mixed.rows(), 0, EN)]
    for i in range(len(mixed.whole)):
        shown += [data_html.example(mixed, i, borders, EN) for borders in (False, True)]
    for html in shown:
        assert "<script" not in html
        assert "<img" not in html
        assert "<b>mixed" not in html
    text = re.sub(r"<[^>]+>", "", data_html.example(mixed, 1, False, EN))
    # What a user typed is shown as he typed it, escaped once.
    assert (
        "&lt;script&gt;alert(1)&lt;/script&gt;&lt;|im_end|&gt; &amp;amp; ${7*7} {{value}}" in text
    )


def test_an_example_shows_what_is_learned_and_its_control_tokens(mixed: DatasetView) -> None:
    html = data_html.example(mixed, 0, False, EN)
    assert '<span class="learned">很好。</span>' in html
    assert html.count('<b class="control" title=') == 3
    assert html.count('<b class="learned control" title=') == 1
    assert "<u>↵</u>\n" in html
    long = data_html.example(mixed, len(mixed.whole) - 1, False, EN)
    assert "longer than the cutoff of 256" in long


def test_a_cutoff_is_told_in_numbers(mixed: DatasetView) -> None:
    lengths = mixed.lengths
    assert len(lengths) == 4
    assert ">75.0%<" in data_html.lost(lengths, 256, EN)
    assert ">100.0%<" in data_html.lost(lengths, 1 << 20, EN)
    assert f"{data_html.limit_of(lengths):,}" not in data_html.lost(lengths, 256, EN)
    assert data_html.limit_of(lengths) >= lengths.longest
    assert 'class="bar beyond"' in data_html.lengths(lengths, 256, EN)


@pytest.mark.parametrize("longest", [1, 129, 2049, 5762, 8193, 131_073])
def test_a_cutoff_can_keep_everything_however_long_one_example_is(longest: int) -> None:
    tokens = np.array([20] * 999 + [longest], dtype=np.int32)
    lengths = Lengths(tokens, np.zeros(1000, dtype=np.int32))
    assert lengths.lost(data_html.limit_of(lengths)).longer == 0
    assert "bar" in data_html.lengths(lengths, 64, EN)


@pytest.mark.parametrize(
    ("typed", "taken"),
    [(999_999, 999_999), (4097.0, 4097), (1, 16), (-5, 16), (None, 2048), ("x", 2048), (1e300, 1_000_000)],
)  # fmt: skip
def test_every_typed_cutoff_is_taken(typed: Any, taken: int) -> None:
    wish = DatasetQuery((), "tiny")
    assert tab_data._cutoff(typed, wish) == taken
    replace(wish, cutoff=taken).settings()
    number_input.take_all_numbers()
    slider = gr.Slider(16, 4096, render=False)
    assert slider.preprocess(taken) == taken  # gradio's own words would be English


@pytest.mark.parametrize(
    ("content", "used", "words"),
    [
        (b"", 0, "the file is empty"),
        (b"\xef\xbb\xbf" + json.dumps(good()).encode(), 1, "No problems"),
        (json.dumps([good(), good(1)])[:-1].encode() + b",]", 2, "trailing comma"),
        (json.dumps(good(), ensure_ascii=False).encode("gb18030") + b"\n", 1, "GB18030"),
        (json.dumps(good()).encode() + b'\n{"instruction": "\xe4\xbd', 1, "cut off"),
        (b"\x00\x01\x02\xff" * 50, 0, "no usable records"),
    ],
)
def test_files_that_are_damaged_are_told_in_words(
    tmp_path: Path, tiny: str, content: bytes, used: int, words: str
) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(content)
    look = DatasetCache().get(DatasetQuery((path,), tiny))
    assert len(look.whole) == used
    assert words in data_html.report(look.report, EN)
    data_html.report(look.report, ZH)
    data_html.problems(look.rows(), 0, ZH)


def test_a_look_is_told_as_it_goes_kept_and_made_anew_where_the_file_changed(
    tmp_path: Path, tiny: str
) -> None:
    looks = DatasetCache()
    path = write(tmp_path / "a.jsonl", [good(i) for i in range(3)])
    *_, look = looks.watch(DatasetQuery((path,), tiny))
    assert isinstance(look, DatasetView)
    assert looks.get(DatasetQuery((path,), tiny)) is look
    write(path, [good(i) for i in range(5)])
    assert len(looks.get(DatasetQuery((path,), tiny)).whole) == 5
    with pytest.raises(UserError, match="no template"):
        list(looks.watch(DatasetQuery((path,), tiny, "nope")))


def test_every_reason_has_its_words_in_chinese() -> None:
    reasons = [
        value
        for module in (said, file_types)
        for name, value in vars(module).items()
        if name.isupper()
        and isinstance(value, str)
        and re.fullmatch(r"[A-Za-z'][\w ,'()\\+;-]{5,}", value)
    ] + [
        read_file.CUT,
        "nothing to learn",
        "exact duplicate: of line 3",
    ]
    assert len(reasons) > 25
    left = [r for r in reasons if data_html.localize_reason(r, ZH) == r]
    assert left == []
    assert [r for r in reasons if english_half(data_html.localize_reason(r, ZH))] == []
    # And what is new is shown as it is rather than not at all.
    assert data_html.localize_reason("never seen: x", ZH) == "「never seen: x」"


TOO_LONG = Message("too long: {count} tokens, cutoff_len is {cutoff}{answer}", count=9, cutoff=4,
                   answer="")  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        (TOO_LONG, "太长：9 个 token，超过 cutoff_len（4）"),
        (Message("split into {count} examples", count=3), "拆成 3 个样本"),
        (Message("{reason}: of line {line}", reason=Message("exact duplicate"), line=3),
         "完全重复：与第 3 行"),
        ("conversation cut here: no answer", "对话在这里截断：没有回答"),  # of a cache of before
        ("unknown role: a number", "未知角色：数字"),
        (Message("not valid JSON: {error}", error="Expecting property name of a list"),
         "不是合法的 JSON：「Expecting property name of a list」"),
        ("messages[3].content", "messages[3].content"),
    ],
)  # fmt: skip
def test_details_are_chinese_or_between_quotes(reason: str, words: str) -> None:
    assert data_html.localize_reason(reason, ZH) == words
    assert data_html.localize_reason(reason, EN) == reason


def test_too_long_is_told_with_length_and_limit(mixed: DatasetView) -> None:
    rows = [p.reason for _, p in mixed.rows() if p.reason.startswith("too long")]
    assert rows
    for reason in rows:
        assert re.search(r"\d+ tokens.*cutoff_len is 256", reason)
    html = data_html.problems(mixed.rows(), 0, ZH)
    assert "超过 cutoff_len（256）" in html
    texts_ = re.sub("<[^>]*>", "。", html).split("。")
    assert [half for text in texts_ if (half := english_half(text))] == []


def app_of(tmp_path: Path, **more: Any) -> App:
    folders = {"adapters": [str(tmp_path / "runs")], "data": [str(tmp_path / "data")]}
    return App(WebSettings(**folders, **more))


def test_only_files_inside_of_the_folders_are_read(tmp_path: Path) -> None:
    app = app_of(tmp_path)
    inside = write(tmp_path / "data" / "sub" / "a.jsonl", [good()])
    outside = write(tmp_path / "secret.jsonl", [good()])
    (tmp_path / "data" / "link.jsonl").symlink_to(outside)
    assert files.allowed(app, str(inside)) == [inside]
    assert files.allowed(app, str(tmp_path / "data" / "sub")) == [inside]
    assert files.allowed(app, str(tmp_path / "data" / "s*" / "*.jsonl")) == [inside]
    for path in ("secret.jsonl", "data/../secret.jsonl", "data/link.jsonl", "*.jsonl", "data/*"):
        with pytest.raises(UserError, match="outside"):
            files.allowed(app, str(tmp_path / path))
    for path in ("/etc/passwd", "/etc/nothing_like_this", "~/x", "../x"):
        with pytest.raises(UserError, match="outside"):
            files.allowed(app, path)
        with pytest.raises(UserError, match="outside"):
            files.allowed_model(app, path)
    with pytest.raises(UserError, match="outside"):
        files.allowed_template(app, str(outside.with_suffix(".yaml")))
    assert files.allowed_model(app, "Qwen/Qwen2.5-7B") == "Qwen/Qwen2.5-7B"
    assert files.allowed_template(app, "alpaca") == "alpaca"
    assert len(files.samples()) == 5
    assert files.allowed(app, str(files.samples()[0])) == [files.samples()[0]]
    names = [name for name, _ in files.listed(app)]
    assert "data/sub/a.jsonl" in names


def test_a_dropped_file_is_kept_once_under_a_name_of_its_own(tmp_path: Path) -> None:
    app = app_of(tmp_path)

    def drop(folder: str, record: Any) -> Path:
        return files.keep(app, write(tmp_path / folder / "my 数据.jsonl", [record]))

    kept = drop("tmp", good())
    assert kept == tmp_path / "data" / "my 数据.jsonl"
    assert drop("tmp", good()) == kept
    assert drop("tmp2", good(1)).name == "my 数据-2.jsonl"
    # The server's own copy is not kept beside it.
    assert list(tmp_path.glob("tmp*/*")) == []
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == [
        "my 数据-2.jsonl",
        "my 数据.jsonl",
    ]


def test_a_page_that_only_looks_keeps_and_fetches_nothing(tmp_path: Path) -> None:
    app = app_of(tmp_path, read_only=True)
    dropped = write(tmp_path / "tmp" / "a.jsonl", [good()])
    with pytest.raises(UserError, match="read-only"):
        files.keep(app, dropped)
    assert not (tmp_path / "data").exists()
    with pytest.raises(UserError, match="read-only"):
        files.allowed_model(app, "evil-owner/huge-model")
    assert files.allowed_model(app, files.models(app)[0]) == files.models(app)[0]


@pytest.mark.parametrize(
    "source",
    ["data/**/../../../../etc/sh*", "data/*/../../secret.js*", "data/link/sh*", "data/link/*",
     "data/link/**", "dat*/x.jsonl", "data*/secret.jsonl", "[d]ata/../secret.jsonl", "data/?/../../*",
     "data/link/shadow", "data/link/none", "data/../secret.jsonl", "*/secret.jsonl"],
)  # fmt: skip
def test_what_follows_a_wildcard_is_checked_and_nothing_outside_is_told(
    tmp_path: Path, source: str
) -> None:
    app = app_of(tmp_path)
    write(tmp_path / "data" / "a.jsonl", [good()])
    for name in ("secret.jsonl", "outside/shadow", "data2/secret.jsonl"):
        write(tmp_path / name, [good()])
    (tmp_path / "data" / "link").symlink_to(tmp_path / "outside")
    asked = f"{tmp_path}/{source}"
    with pytest.raises(UserError) as told:
        files.allowed(app, asked)
    said = str(told.value).replace(asked, "")
    assert "shadow" not in said
    assert "secret" not in said
    assert "matches" not in said


@pytest.mark.parametrize(
    "source", ["a\0b", "x" * 5000, "data/" + "x" * 300, "data/*\0*", "\ud800", "~nobody-here/x",
               "data/**/**/**/x", "loop/x"]
)  # fmt: skip
def test_what_no_path_can_be_is_said(tmp_path: Path, source: str) -> None:
    app = app_of(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    given = source if source.startswith("~") else f"{tmp_path}/{source}"
    for ask in (files.allowed, files.allowed_model, files.allowed_template):
        try:
            ask(app, given)
        except UserError as e:
            str(e).encode()
    with pytest.raises(UserError):
        files.allowed(app, given)


def test_no_name_of_a_data_set_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(find_files, "_download", lambda _: pytest.fail("it was fetched"))
    app = App(WebSettings(data=["."]))
    with pytest.raises(UserError, match="no such file"):
        files.allowed(app, "evil/ds")


def test_texts_of_these_tabs_are_there_in_both_languages() -> None:
    for key, (english, chinese) in catalog().items():
        if key.split(".")[0] in ("data", "train", "plan", "state", "group", "reason", "time"):
            assert english.strip(), key
            assert re.search("[\u4e00-\u9fff]", chinese) or chinese in ("LoRA", "loss"), key
            assert set(re.findall(r"{(\w+)", english)) == set(re.findall(r"{(\w+)", chinese)), key
