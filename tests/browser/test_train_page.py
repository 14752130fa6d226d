"""The tabs Data and Train in a browser: a file dropped, a training from the page to the chat."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser_kit import Visitor
from train_kit import served

EVIL = '<img src=x onerror="window.hurt=1"> ${window.hurt=2} {{value}} <|im_end|>'


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def url(browser: Any, place: Path) -> Iterator[str]:
    with served(place) as address:
        yield address


@pytest.fixture
def visitor(browser: Any, url: str) -> Iterator[Visitor]:
    found = Visitor(browser, url, viewport={"width": 1200, "height": 900})
    yield found
    found.context.close()
    assert found.wrong == []
    assert found.outside() == []


def test_a_dropped_file_is_told_of_cut_and_shown_token_by_token(
    visitor: Visitor, tmp_path: Path
) -> None:
    records = [{"instruction": f"第{i}题？", "output": "好" * i} for i in range(1, 40)]
    records += [{"instruction": "没有回答"}, {"instruction": EVIL, "output": EVIL}]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records), "utf-8")
    visitor.tab("Data")
    visitor.see("#data-status", "Choose a data set")
    visitor.drop(path)
    visitor.see("#data-report .v-number.records", "41")
    visitor.see("#data-report .v-number.dropped", "1")
    visitor.see("#data-report", "no answer")
    visitor.see("#data-lost .v-number.kept", "100.0%")
    slider = visitor.page.locator("#data-cutoff input[type=number]")
    slider.fill("64")
    slider.press("Enter")
    visitor.see("#data-lengths .v-cut", "64")
    kept = visitor.see("#data-lost .v-number.kept b").text_content()
    assert kept != "100.0%"
    slider.fill("999999")
    slider.press("Enter")
    slider.blur()
    visitor.page.wait_for_timeout(2000)  # the browser puts it back to the slider's end
    visitor.see("#data-lost .v-number.kept b", "100.0%")
    slider.fill("64")
    slider.press("Enter")
    visitor.see("#data-lengths .v-cut", "64")
    assert visitor.page.locator(".toast-wrap .error").count() == 0
    visitor.page.get_by_role("tab", name="As the model sees it").click()
    visitor.see("#data-tokens .learned", "好")
    visitor.see("#data-tokens b.control", "<|im_start|>")
    visitor.page.locator("#data-example input").fill("40")
    visitor.see("#data-tokens", "<img src=x")
    visitor.page.locator("#data-borders input").check()
    visitor.see("#data-tokens .borders i")
    visitor.page.get_by_role("tab", name="Rows with problems").click()
    visitor.see("#data-problems td", "no answer")
    assert visitor.page.evaluate("window.hurt") is None
    assert visitor.page.locator("#tab-data img[src=x]").count() == 0


def test_a_bad_file_is_told_in_words(visitor: Visitor, tmp_path: Path, place: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"")
    visitor.tab("Data")
    visitor.drop(tmp_path / "empty.jsonl")
    visitor.see("#data-status .v-note.error", "No record")
    visitor.see("#data-report", "the file is empty")
    source = visitor.page.locator("#data-source input").first
    source.fill(str(place.parent / "secret.jsonl"))
    source.press("Enter")
    visitor.see("#data-status .v-note.error", "outside of the folders")


def test_a_training_from_the_page_is_paused_found_again_and_talked_with(
    visitor: Visitor, place: Path
) -> None:
    visitor.tab("Data")
    source = visitor.page.locator("#data-source input").first
    source.click()
    visitor.page.get_by_role("option", name="data/tiny.jsonl").click()
    visitor.see("#data-report .v-number.used", "60")
    visitor.page.locator("#data-train").click()
    visitor.see("#set-dataset", "tiny.jsonl")
    visitor.fill("batch_size", "0")
    visitor.page.locator("#train-start").click()
    visitor.see("#train-answer .v-note.error", "batch_size is 0")
    for setting, value in (("batch_size", "4"), ("max_steps", "600"), ("val_size", "6")):
        visitor.fill(setting, value)
    visitor.page.get_by_role("button", name="All other settings").click()
    visitor.fill("eval_steps", "200")
    visitor.fill("sample_prompts", EVIL)
    visitor.page.locator("#train-name").locator("input, textarea").first.fill("one")
    visitor.page.locator("#train-start").click()
    visitor.see("#train-head .v-chip.running", seconds=120)
    visitor.page.locator("#train-pause").click()
    visitor.see("#train-head .v-chip.paused", seconds=60)
    visitor.page.reload()
    visitor.tab("Train")
    visitor.tab("Runs")
    visitor.see("#train-head h3", "one")
    visitor.see("#train-head .v-chip.paused")
    visitor.page.locator("#train-resume").click()
    visitor.see("#train-head .v-chip.finished", seconds=180)
    visitor.see("#train-head", "step 600 of 600")
    visitor.see("#train-curves svg path.line")
    visitor.see("#train-samples .question", "<img src=x")
    assert visitor.page.evaluate("window.hurt") is None
    assert (place / "runs" / "one" / "adapter" / "adapter_model.safetensors").is_file()
    visitor.page.locator("#train-talk").click()
    box = visitor.page.locator("#chat-box textarea")
    box.wait_for()
    box.fill("你好")
    box.press("Enter")
    visitor.see("#tab-chat .v-turn.answer .v-stats", seconds=60)
    visitor.tab("Train")
    visitor.page.locator("#train-delete").click()
    visitor.see("#train-sure", "There is no way back")
    visitor.page.locator("#train-yes").click()
    visitor.see("#train-head", "No runs yet")
    assert not (place / "runs" / "one").exists()


def test_nothing_is_wider_than_a_phone_in_chinese(browser: Any, url: str) -> None:
    visitor = Visitor(browser, url, locale="zh-CN", viewport={"width": 390, "height": 800})
    visitor.tab("数据")
    visitor.see("#data-status", "选择一个数据集")
    assert visitor.fits()
    visitor.tab("训练")
    visitor.see("#train-start", "开始训练")
    assert visitor.fits()
    visitor.tab("训练记录")
    visitor.see("#train-head", "还没有训练")
    assert visitor.fits()
    visitor.context.close()


def test_a_page_that_only_looks_has_no_form(
    browser: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with served(tmp_path_factory.mktemp("look"), read_only=True) as address:
        visitor = Visitor(browser, address)
        visitor.tab("Train")
        visitor.see("#train-read-only", "read-only")
        assert visitor.page.locator("#train-start").count() == 0
        visitor.context.close()
