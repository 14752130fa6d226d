"""The page as people use it, in a real browser; it asks nothing of any other machine."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from browser_kit import Visitor
from page_kit import open_page

from vicuna.web.i18n import translate
from vicuna.web.state import App

LONG = 300


def greedy(visitor: Visitor, tokens: int = 12) -> None:
    visitor.mode("greedy")
    visitor.longest(tokens)


def test_an_answer_is_seen_growing_and_says_how_fast_it_was(slow: None, visitor: Visitor) -> None:
    page = visitor.page
    visitor.mode("sample")
    visitor.longest(60)
    page.evaluate(
        "window.sizes = new Set(); new MutationObserver(() => { const seen = document.querySelector"
        "('#chat-live .v-growing'); if (seen) sizes.add(seen.textContent.length); })"
        ".observe(document.body, {subtree: true, childList: true, characterData: true})"
    )
    visitor.ask("今天天气怎么样？")
    visitor.answered()
    assert page.evaluate("sizes.size") >= 3
    assert "今天天气怎么样？" in page.inner_text("#chat-history .v-turn.user")
    stats = page.inner_text("#chat-history .v-stats")
    assert "tokens/s" in stats
    assert "first after" in stats
    assert "of 512 tokens" in page.inner_text("#chat-gauge")


@pytest.mark.parametrize("mode", ["greedy", "sample", "beam", "beam-sample"])
def test_every_mode_answers_and_shows_only_what_acts_in_it(visitor: Visitor, mode: str) -> None:
    page = visitor.page
    visitor.mode(mode)
    page.wait_for_function(
        "([id, on]) => !!document.querySelector(id)?.offsetParent === on",
        arg=["#chat-temperature", "sample" in mode],
    )
    page.wait_for_selector("#chat-num_beams", state="visible" if "beam" in mode else "hidden")
    visitor.longest(8)
    visitor.ask("hello?")
    assert visitor.answered()


def test_four_beams_are_seen_live_and_can_be_hidden(slow: None, visitor: Visitor) -> None:
    page = visitor.page
    visitor.mode("beam")
    visitor.longest(LONG)
    page.wait_for_selector("#chat-view")
    for view in ("columns", "rows"):
        page.locator("#chat-view label").get_by_text(view, exact=True).click()
        visitor.ask("hello?")
        page.wait_for_function(
            "view => document.querySelectorAll(`.v-beams.${view} .v-beam`).length >= 4", arg=view
        )
        found = page.evaluate("[...document.querySelectorAll('.v-beam')].map(b => b.innerText)")
        assert any("-" in text for text in found)  # scores
        page.click("#chat-stop")
        page.wait_for_selector("#chat-send")
    page.locator("#chat-view label").get_by_text("hidden", exact=True).click()
    visitor.longest(40)
    visitor.ask("hello?")
    page.wait_for_selector("#chat-live .v-turn")
    assert page.locator(".v-beams").count() == 0


def test_stop_ends_within_a_second_and_keeps_what_was_said(
    slow: None, visitor: Visitor, served: tuple[App, str]
) -> None:
    page = visitor.page
    visitor.mode("sample")
    visitor.longest(2000)
    visitor.ask("tell me everything")
    page.wait_for_function(
        "document.querySelector('#chat-live .v-growing')?.innerText.trim().length > 5"
    )
    job = served[0].sessions.get(visitor.name()).job
    assert job is not None
    times = []
    cancel, then = job.cancel, job.then
    job.cancel = lambda: (times.append(time.monotonic()), cancel())
    job.then = lambda job: (times.append(time.monotonic()), then(job))
    page.click("#chat-stop")
    assert visitor.answered()
    assert times[1] - times[0] < 1  # without what a busy machine needs to draw it
    assert "stopped" in page.inner_text("#chat-history .v-stats")


def test_edit_again_take_back_and_begin_anew(visitor: Visitor, served: tuple[App, str]) -> None:
    page, session = visitor.page, served[0].sessions.get(visitor.name())
    greedy(visitor)
    visitor.ask("first?")
    first = visitor.answered(1)
    visitor.ask("second?")
    visitor.answered(2)
    visitor.act("again")
    visitor.until(lambda: session.request_id == 3)
    visitor.answered(2)
    visitor.act("edit", 0)
    page.wait_for_function("document.querySelector('#chat-box textarea').value === 'first?'")
    assert "Editing question 1" in page.inner_text("#chat-note")
    visitor.ask("other?")
    assert visitor.answered(1) != first
    assert page.inner_text("#chat-history .v-turn.user .v-said") == "other?"
    visitor.act("undo")
    page.wait_for_selector("#chat-history .v-hello")
    assert page.input_value("#chat-box textarea") == "other?"
    visitor.ask("third?")
    visitor.answered(1)
    page.reload()
    assert visitor.answered(1)  # a reload loses nothing
    page.click("#chat-clear")
    page.wait_for_selector("#chat-history .v-hello")


def test_another_adapter_gives_another_answer_without_a_new_base(
    visitor: Visitor, served: tuple[App, str]
) -> None:
    page, base = visitor.page, served[0].worker.loaded.engine
    greedy(visitor)
    visitor.ask("hello?")
    alone = visitor.answered(1)
    page.click("#chat-clear")
    page.wait_for_selector("#chat-history .v-hello")
    page.click("#chat-adapters input")
    page.get_by_role("option", name="law", exact=True).click()
    page.wait_for_selector("#chat-strength")
    page.keyboard.press("Escape")
    visitor.ask("hello?")
    assert visitor.answered(1) != alone
    assert "law" in page.inner_text("#chat-history .v-stats")
    assert served[0].worker.loaded.engine is base


def test_answers_side_by_side(visitor: Visitor) -> None:
    page = visitor.page
    visitor.tab("Instruct")
    for name in ("law", "poems"):
        page.locator("#instruct-who label").get_by_text(name, exact=True).click()
    page.locator("#instruct-mode label").get_by_text("greedy", exact=True).click()
    visitor.longest(10, "instruct")
    page.fill("#instruct-instruction textarea", "翻译")
    page.fill("#instruct-input textarea", "the moon")
    page.click("#instruct-go")
    page.wait_for_function("document.querySelectorAll('.v-column .v-stats').length === 3")
    answers = page.locator(".v-column .v-answer").all_inner_texts()
    assert len(answers) == 3
    assert len(set(answers)) == 3
    page.locator("#instruct-who label").get_by_text("poems", exact=True).click()
    page.locator("#instruct-who label").get_by_text("law", exact=True).click()
    page.locator("#instruct-mode label").get_by_text("sample", exact=True).click()
    box = page.locator("#instruct-num_return_sequences input[type=number]")
    box.fill("3")
    box.blur()
    page.click("#instruct-go")
    page.wait_for_function("document.querySelectorAll('.v-column .v-answer header').length === 3")


def test_adapters_are_mixed_refused_merged_and_deleted(
    visitor: Visitor, place: Path, served: tuple[App, str]
) -> None:
    page = visitor.page
    visitor.tab("Adapters")
    page.wait_for_selector(".v-card")
    assert page.locator(".v-card").count() == 3

    def use(name: str) -> None:
        page.locator(".v-card", has_text=name).locator("input[type=checkbox]").first.click()

    use("law")
    page.wait_for_selector(".v-card.on")
    use("poems")
    page.wait_for_function("document.querySelectorAll('.v-card.on').length === 2")
    page.locator(".v-card.on", has_text="poems").locator("input[type=range]").fill("0.5")
    page.wait_for_function(
        "document.querySelector('#adapters-mix').innerText.includes('poems 0.5')"
    )
    page.click("#adapters-load")
    page.wait_for_selector("#adapters-note .v-note.good")
    page.fill("#adapters-name input, #adapters-name textarea", "both")
    page.click("#adapters-merge")
    page.wait_for_function("document.querySelectorAll('.v-card').length === 4")
    assert (place / "runs" / "both" / "adapter_model.safetensors").is_file()
    use("stranger")
    page.wait_for_function("document.querySelectorAll('.v-card.on').length === 3")
    page.click("#adapters-load")
    page.wait_for_selector("#adapters-note .v-note.error")
    assert "base of another shape" in page.inner_text("#adapters-note")
    page.locator(".v-card", has_text="both").locator("[data-act=delete]").first.click()
    page.wait_for_selector("#adapters-yes")
    page.click("#adapters-no")
    page.wait_for_selector("#adapters-yes", state="hidden")
    page.locator(".v-card", has_text="both").locator("[data-act=delete]").first.click()
    page.click("#adapters-yes")
    page.wait_for_function("document.querySelectorAll('.v-card').length === 3")
    assert not (place / "runs" / "both").exists()


def test_two_people_have_two_conversations(browser: Any, served: tuple[App, str]) -> None:
    people = [Visitor(browser, served[1]), Visitor(browser, served[1], locale="zh-CN")]
    for person in people:
        person.ready()
    english, chinese = people
    assert chinese.page.get_by_role("tab", name="对话").is_visible()
    english.mode("greedy")
    english.longest(10)
    english.ask("hello?")
    chinese.ask("你好？")
    english.answered(1)
    chinese.answered(1)
    assert "你好" not in english.page.inner_text("#chat-history")
    assert "hello" not in chinese.page.inner_text("#chat-history")
    chinese.page.click("#language")
    chinese.page.get_by_role("tab", name="Chat").wait_for()
    assert chinese.answered(1)  # the conversation is still there
    for person in people:
        person.context.close()
        assert person.wrong == []
        assert person.outside() == []


def test_no_text_runs_as_script(visitor: Visitor, served: tuple[App, str]) -> None:
    page = visitor.page
    evil = (
        "<img src=x onerror=\"document.title='owned'\"> <script>document.title='owned'</script> "
        "![i](http://example.com/i.png) [l](javascript:document.title='owned') "
        "${document.title='owned'} {{value}}"
    )
    visitor.mode("greedy")
    visitor.longest(6)
    visitor.ask(evil)
    visitor.answered(1)
    session = served[0].sessions.get(visitor.name())
    session.chat.turns[-1].text = evil  # as if the model had said it
    page.reload()
    visitor.ready()
    assert "<script>" in page.inner_text("#chat-history .v-turn.user")
    assert "<script>" in page.inner_text("#chat-history .v-turn.answer")
    assert page.title() != "owned"
    assert page.locator("#chat-history img, #chat-history script").count() == 0


def test_conversations_are_saved_rated_and_loaded(visitor: Visitor, place: Path) -> None:
    page = visitor.page
    greedy(visitor)
    visitor.ask("你好")
    text = visitor.answered(1)
    visitor.act("up")
    page.wait_for_selector("#chat-history .v-act.on[data-act=up]")
    (line,) = (place / "data" / "rated-up.jsonl").read_text(encoding="utf-8").splitlines()
    assert [m["content"] for m in json.loads(line)["messages"]] == ["你好", text]
    page.get_by_text("Save and load").click()
    page.click("#chat-save")
    saved = place / "data" / "conversations.jsonl"
    visitor.until(lambda: saved.is_file() and saved.read_text("utf-8").endswith("\n"))
    with page.expect_download() as kept:
        page.click("#chat-download")
    assert Path(kept.value.path()).read_text("utf-8") == saved.read_text("utf-8")
    page.click("#chat-clear")
    page.wait_for_selector("#chat-history .v-hello")
    page.set_input_files("#chat-load input[type=file], input[type=file]", str(saved))
    assert visitor.answered(1) == text


def test_a_memory_limit_drops_the_oldest_and_says_so(visitor: Visitor) -> None:
    page = visitor.page
    greedy(visitor, 16)
    page.get_by_text("Prompt and context").click()
    box = page.locator("#chat-memory input[type=number]")
    box.fill("128")
    box.blur()
    for number in range(1, 4):
        visitor.ask("床前明月光，疑是地上霜。举头望明月，低头思故乡。" * 2)
        visitor.answered(number)
    assert "of 128 tokens" in page.inner_text("#chat-gauge")
    assert "no longer fit" in page.inner_text("#chat-gauge")


def test_presets_and_reset(visitor: Visitor) -> None:
    page = visitor.page
    page.locator("#chat-preset label").get_by_text("translation", exact=True).click()
    page.wait_for_selector("#chat-num_beams")
    page.click("#chat-reset")
    page.wait_for_selector("#chat-num_beams", state="hidden")
    assert page.locator("#chat-mode label.selected").inner_text().strip() == "sample"


@pytest.mark.parametrize("locale", ["en-GB", "zh-CN"])
def test_nothing_is_wider_than_a_phone(browser: Any, served: tuple[App, str], locale: str) -> None:
    size = {"width": 390, "height": 844}
    phone = Visitor(browser, served[1], viewport=size, locale=locale, is_mobile=True)
    page = phone.ready()
    phone.ask("床前明月光" * 30)
    phone.answered(1)
    for name in ("chat", "instruct", "adapters", "data", "train"):
        word = translate(locale[:2], f"page.{name}")
        page.get_by_role("tab", name=word, exact=True).first.click()
        page.wait_for_selector(f"#tab-{name} > div")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        wide = page.evaluate(
            "[...document.querySelectorAll('.tabitem *')].filter(e => e.offsetParent && "
            "!e.closest('.v-scroll, pre, table, .v-plot, .v-beams') && "
            "e.getBoundingClientRect().right > 391).map(e => e.outerHTML.slice(0, 120))"
        )
        assert wide == []
    phone.context.close()


def test_a_password_is_asked(browser: Any, place: Path) -> None:
    with open_page(place, password="secret-word") as (_, url):
        person = Visitor(browser, url)
        page = person.page
        page.wait_for_selector("input[type=password]")
        page.locator("input").first.fill("vicuna")
        page.fill("input[type=password]", "secret-word")
        page.press("input[type=password]", "Enter")
        person.ready()
        assert person.outside() == []
        person.context.close()


def test_a_read_only_page_offers_no_writing(browser: Any, place: Path) -> None:
    with open_page(place, read_only=True) as (_, url):
        person = Visitor(browser, url)
        page = person.ready()
        assert "read-only" in page.inner_text("#name")
        person.longest(6)
        person.ask("hello?")
        person.answered(1)
        assert page.locator("[data-act=up]").count() == 0
        page.get_by_role("tab", name="Adapters", exact=True).click()
        page.wait_for_selector(".v-card")
        assert page.locator("[data-act=delete], #adapters-merge").count() == 0
        person.context.close()


def test_probabilities_of_tokens_are_pointed_at_tapped_and_reached_by_keys(
    browser: Any, served: tuple[App, str]
) -> None:
    phone = Visitor(
        browser, served[1], viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True
    )
    page = phone.ready()
    greedy(phone, 8)
    page.get_by_text("Stop words and bias").click()
    box = page.locator("#chat-logprobs input[type=number]")
    box.fill("3")
    box.blur()
    phone.ask("hello?")
    phone.answered(1)
    tokens = page.locator("#chat-history .v-tok")
    tokens.nth(1).wait_for()
    tokens.nth(1).tap()
    rows = page.locator("#chat-history .v-alts div")
    rows.nth(2).wait_for()
    assert rows.count() in (3, 4)
    assert rows.first.get_attribute("class") == "own"
    assert page.locator(".v-alts .own span").inner_text().endswith("%")
    page.focus("#chat-history .v-toks")
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector("#chat-history .v-tok:first-child.at")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#chat-history .v-tok:nth-child(2).at")
    assert phone.fits()
    phone.context.close()
    assert phone.wrong == []
