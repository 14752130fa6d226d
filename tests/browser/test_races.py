"""What happens while something else happens: reloads, quick hands, answers that come late."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from app_kit import write_run
from browser_kit import Visitor
from page_kit import open_page

from vicuna.web.state import App


def longest(visitor: Visitor, tokens: int) -> None:
    visitor.mode("greedy")
    visitor.longest(tokens)


def test_every_question_of_the_page_says_whose_it_is(
    visitor: Visitor, served: tuple[App, str]
) -> None:
    """Gradio selects the first tab when it is drawn, before the page knows its name."""
    page, sent = visitor.page, []
    asks: dict[str, list[Any]] = {}
    page.on("request", lambda r: sent.append(r) if "/queue/join" in r.url else None)
    page.reload()
    visitor.ready()
    page.wait_for_timeout(500)
    place = {
        d["id"]: d["inputs"].index(served[0].tab._id)
        for d in page.evaluate("window.gradio_config").get("dependencies", [])
        if served[0].tab._id in d["inputs"]
    }
    for request in sent:
        data = request.post_data_json
        if data["fn_index"] in place:
            asks.setdefault(data["data"][place[data["fn_index"]]], []).append(data["fn_index"])
    assert list(asks) == [visitor.name()]
    assert len(asks[visitor.name()]) >= 3


def test_what_is_asked_at_opening_changes_nothing_where_it_comes_late(visitor: Visitor) -> None:
    page, late = visitor.page, []
    longest(visitor, 8)
    opening = True
    page.route("**/queue/join*", lambda r: late.append(r) if opening else r.continue_())
    page.reload()
    visitor.until(lambda: len(late) >= 4)
    opening = False
    visitor.ask("hello?")
    visitor.answered(1)
    for route in reversed(late):
        route.continue_()
    page.wait_for_selector("#chat-gauge .v-gauge")
    page.wait_for_timeout(500)
    assert visitor.answered(1)


def test_a_reload_in_the_middle_of_an_answer_finds_it_again(
    held: list[str], visitor: Visitor
) -> None:
    page = visitor.page
    held.append("until it was found again")
    longest(visitor, 120)
    page.get_by_text("Prompt and context").click()
    page.fill("#chat-system textarea", "be brief")
    visitor.ask("hello?")
    page.wait_for_selector("#chat-live .v-growing")
    page.reload()
    page.wait_for_selector("#chat-live .v-growing")
    page.wait_for_selector("#chat-stop")
    held.clear()
    assert visitor.answered(1)
    assert "120 tokens" in page.inner_text("#chat-history .v-stats")
    page.get_by_text("Prompt and context").click()
    page.wait_for_function("document.querySelector('#chat-system textarea').value === 'be brief'")
    visitor.ask("and?")
    visitor.answered(2)


def test_a_page_that_was_not_told_its_conversation_yet_does_not_write_to_it(
    visitor: Visitor, served: tuple[App, str]
) -> None:
    page, session = visitor.page, served[0].sessions.get(visitor.name())
    longest(visitor, 8)
    page.get_by_text("Prompt and context").click()
    page.fill("#chat-system textarea", "be brief")
    visitor.ask("hello?")
    visitor.answered(1)
    assert session.chat.system == "be brief"
    held: list[Any] = []
    opening = True
    page.route("**/queue/join*", lambda r: held.append(r) if opening else r.continue_())
    page.reload()
    visitor.until(lambda: len(held) >= 4)
    opening = False
    page.get_by_text("Prompt and context").click()
    page.focus("#chat-system textarea")
    page.focus("#chat-box textarea")  # the prompt's field is left: its value is counted
    page.wait_for_timeout(500)
    visitor.ask("and?")
    visitor.answered(2)
    assert session.chat.system == "be brief"
    for route in held:
        route.continue_()
    page.wait_for_function("document.querySelector('#chat-system textarea').value === 'be brief'")
    visitor.answered(2)


def test_other_tabs_can_be_opened_while_an_answer_grows(slow: None, visitor: Visitor) -> None:
    page = visitor.page
    longest(visitor, 80)
    visitor.ask("hello?")
    page.wait_for_selector("#chat-live .v-growing")
    visitor.tab("Adapters")
    page.wait_for_selector(".v-card")
    visitor.tab("Chat")
    page.wait_for_selector("#chat-gauge .v-gauge")
    assert visitor.answered(1)
    assert page.locator(".toast-wrap .error").count() == 0


def test_a_conversation_that_is_cleared_while_it_grows_stays_so(
    slow: None, visitor: Visitor, served: tuple[App, str]
) -> None:
    page, session = visitor.page, served[0].sessions.get(visitor.name())
    longest(visitor, 300)
    visitor.ask("hello?")
    page.wait_for_selector("#chat-live .v-growing")
    page.click("#chat-clear")
    page.wait_for_selector("#chat-history .v-hello")
    page.wait_for_selector("#chat-send")
    page.wait_for_selector("#chat-live .v-turn", state="detached")
    visitor.until(lambda: served[0].worker.queue.length() == 0)
    assert (session.chat.turns, session.notes) == ([], [])
    visitor.longest(8)
    visitor.ask("anew?")
    assert visitor.answered(1)


def test_who_stops_while_waiting_does_not_wait(
    slow: None, browser: Any, visitor: Visitor, served: tuple[App, str]
) -> None:
    other = Visitor(browser, served[1])
    other.ready()
    for person in (visitor, other):
        longest(person, 400)
    visitor.ask("hello?")
    visitor.page.wait_for_selector("#chat-live .v-growing")
    other.ask("and I?")
    other.page.wait_for_selector("#chat-live .v-wait")
    other.page.click("#chat-stop")
    other.page.wait_for_selector("#chat-send")
    assert visitor.page.locator("#chat-live .v-growing").count() == 1
    assert other.page.input_value("#chat-box textarea") == "and I?"
    visitor.page.click("#chat-stop")
    visitor.answered(1)
    other.context.close()
    assert other.wrong == []


def test_an_answer_again_with_settings_that_are_wrong_loses_nothing(visitor: Visitor) -> None:
    page = visitor.page
    longest(visitor, 8)
    visitor.ask("hello?")
    text = visitor.answered(1)
    page.get_by_text("Stop words and bias").click()
    page.fill("#chat-logit_bias textarea", "no number")
    visitor.act("again")
    page.wait_for_selector("#chat-note .v-note.error")
    page.reload()
    assert visitor.answered(1) == text


def test_no_tick_of_a_quick_hand_is_lost(visitor: Visitor, served: tuple[App, str]) -> None:
    page, session = visitor.page, served[0].sessions.get(visitor.name())
    visitor.tab("Adapters")
    page.wait_for_selector(".v-card")
    page.evaluate(
        "document.querySelectorAll('.v-card input[type=checkbox]').forEach(b => b.click())"
    )
    page.wait_for_function("document.querySelectorAll('.v-card.on').length === 3")
    assert len(session.mix) == 3
    page.evaluate("document.querySelectorAll('.v-card').forEach((c, i) => i && "
                  "c.querySelector('input[type=checkbox]').click())")  # fmt: skip
    page.wait_for_function("document.querySelectorAll('.v-card.on').length === 1")
    assert len(session.mix) == 1


def test_who_answers_side_by_side_is_kept_while_other_tabs_are_looked_at(visitor: Visitor) -> None:
    page = visitor.page
    visitor.tab("Instruct")
    page.locator("#instruct-who label").get_by_text("law", exact=True).click()
    visitor.tab("Adapters")
    page.wait_for_selector(".v-card")
    visitor.tab("Instruct")
    page.wait_for_timeout(500)
    assert page.locator("#instruct-who label.selected").all_inner_texts() == ["base", "law"]


def test_the_newest_choice_of_a_data_set_is_what_is_shown(
    visitor: Visitor, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vicuna.web import data_view

    for name, count in (("slow", 5), ("quick", 7)):
        lines = [json.dumps({"instruction": f"{i}?", "output": "ja"}) for i in range(count)]
        (place / "data" / f"{name}.jsonl").write_text("\n".join(lines), "utf-8")
    page, look = visitor.page, data_view._prepare
    begun: list[str] = []
    ready: list[str] = []

    def late(wish: Any, say: Any) -> Any:
        begun.append(wish.files[0].stem)
        visitor_waits = wish.files[0].stem == "slow"
        while visitor_waits and not ready:
            data_view.threading.Event().wait(0.05)
        return look(wish, say)

    monkeypatch.setattr(data_view, "_prepare", late)
    visitor.tab("Data")
    source = page.locator("#data-source input").first
    for name in ("slow", "quick"):
        source.fill(str(place / "data" / f"{name}.jsonl"))
        source.press("Enter")
        visitor.until(lambda name=name: name in begun)
    visitor.see("#data-report .v-number.records", "7")
    ready.append("now")
    page.wait_for_timeout(1500)
    visitor.see("#data-report .v-number.records", "7")
    assert not page.is_visible("#data-status")


def test_a_question_about_a_run_is_about_that_run(
    browser: Any, place: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        write_run(tmp_path / "mine" / name, {"event": "step", "step": 1, "loss": 2.0})
    with open_page(place, adapters=[str(tmp_path / "mine")]) as (_, url):
        visitor = Visitor(browser, url)
        page = visitor.ready()
        visitor.tab("Train")
        visitor.tab("Runs")
        for chosen in ("one", "two"):
            page.locator("#train-run input").click()
            page.get_by_role("option").filter(has_text=chosen).click()
            visitor.see("#train-head h3", chosen)
            if chosen == "one":
                page.click("#train-delete")
                visitor.see("#train-sure", "Delete the run one")
        page.wait_for_selector("#train-sure", state="hidden")
        assert (tmp_path / "mine" / "one").is_dir()
        page.click("#train-delete")
        visitor.see("#train-sure", "Delete the run two")
        page.click("#train-yes")
        visitor.see("#train-head h3", "one")
        assert not (tmp_path / "mine" / "two").exists()
        visitor.context.close()
        assert visitor.wrong == []


def test_editing_is_left_by_a_button_and_by_escape_and_outlives_a_reload(
    visitor: Visitor, served: tuple[App, str]
) -> None:
    page, session = visitor.page, served[0].sessions.get(visitor.name())
    longest(visitor, 8)
    visitor.ask("first?")
    text = visitor.answered(1)
    for leave in ("button", "escape"):
        visitor.act("edit", 0)
        visitor.see("#chat-note", "Editing question 1")
        page.reload()
        visitor.see("#chat-note", "Editing question 1")
        assert page.input_value("#chat-box textarea") == "first?"
        if leave == "button":
            page.click("#chat-note [data-act=leave]")
        else:
            page.press("#chat-box textarea", "Escape")
        page.wait_for_selector("#chat-note .v-note", state="detached")
        visitor.until(lambda: session.editing is None)
        assert page.input_value("#chat-box textarea") == ""
        assert page.locator("#chat-history .faded").count() == 0
    visitor.ask("second?")
    visitor.answered(2)
    assert page.locator("#chat-history .v-raw").first.input_value() == text


def test_what_was_chosen_survives_a_reload_and_stays_in_its_tab(visitor: Visitor) -> None:
    page = visitor.page
    visitor.mode("beam")
    page.wait_for_selector("#chat-view")
    page.locator("#chat-view label").get_by_text("rows", exact=True).click()
    visitor.longest(33)
    beams = page.locator("#chat-num_beams input[type=number]")
    beams.fill("3")
    beams.blur()
    page.get_by_text("Stop words and bias").click()
    page.fill("#chat-stop textarea >> visible=true", "User:")
    visitor.tab("Instruct")
    page.locator("#instruct-preset label").get_by_text("creative", exact=True).click()
    page.wait_for_timeout(500)
    for _ in range(2):
        page.reload()
        visitor.ready()
        page.wait_for_selector("#chat-num_beams")
        selected = "#chat-{} label.selected"
        assert page.locator(selected.format("mode")).inner_text().strip() == "beam"
        assert page.locator(selected.format("view")).inner_text().strip() == "rows"
        assert page.locator(selected.format("preset")).count() == 0
        assert page.input_value("#chat-max_new_tokens input[type=number]") == "33"
        assert page.input_value("#chat-num_beams input[type=number]") == "3"
        visitor.tab("Instruct")
        chosen = page.locator("#instruct-preset label.selected")
        assert chosen.inner_text().strip() == "creative"
        visitor.see("#tab-instruct .v-fine", "stories")
        visitor.tab("Chat")
    visitor.ask("hello?")
    visitor.answered(1)
    other = visitor.open()
    other.wait_for_selector("#chat-history .v-hello")
    assert other.locator(selected.format("mode")).inner_text().strip() == "sample"
    other.close()


def test_the_language_of_one_tab_is_not_another_s(visitor: Visitor) -> None:
    page = visitor.page
    other = visitor.open()
    other.wait_for_selector("#chat-history .v-hello")
    other.click("#language")
    other.get_by_role("tab", name="对话").wait_for()
    for _ in range(2):
        visitor.tab("Instruct")
        page.click("#instruct-go")
        visitor.see("#instruct-answers", "Write an instruction first.")
        page.reload()
        visitor.ready()
        page.get_by_role("tab", name="Chat").wait_for()
    other.get_by_role("tab", name="指令").click()
    other.click("#instruct-go")
    other.get_by_text("请先写下指令").wait_for()
    other.reload()
    other.get_by_role("tab", name="对话").wait_for()
    other.close()


def test_a_run_that_ends_is_among_the_adapters_of_pages_that_are_open(
    browser: Any, place: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    with open_page(place, adapters=[str(mine)]) as (_, url):
        visitor = Visitor(browser, url)
        page = visitor.ready()
        box = page.locator("#chat-adapters input")
        found = page.get_by_role("option").filter(has_text="fresh")
        aside = tmp_path / "aside"
        write_run(aside, {"event": "step", "step": 9, "loss": 2.0}, {"event": "end", "step": 9})
        shutil.copytree(place / "runs" / "law", aside / "adapter")
        aside.rename(mine / "fresh")

        def offered() -> bool:
            page.keyboard.press("Escape")
            box.blur()
            box.click()
            page.wait_for_timeout(300)
            return bool(found.count())

        visitor.until(offered)
        visitor.context.close()
        assert visitor.wrong == []
