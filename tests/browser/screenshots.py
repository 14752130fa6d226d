"""Pictures of the page for the documents, on the embedded base.

    python tests/browser/screenshots.py --adapters runs --output docs/images

Needs Chromium and Playwright, and a folder with at least one adapter of the embedded base
(`vicuna demo`), which is also the run that is shown. Each picture stays under 150 kB.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [
    str(HERE),
    str(HERE.parent),
    str(HERE.parent / "generate"),
    str(HERE.parent / "web"),
]

from browser_kit import FLAGS, Visitor, chromium  # noqa: E402

WIDE = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}
LARGEST = 150_000
# Seconds that each step of the model takes longer, so that a picture can show a growing answer.
slower = [0.0]


def main() -> None:
    """Take all pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", default="runs")
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    parser.add_argument("--only", nargs="*", default=list(PICTURES), help="some of them")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    with pages(given.adapters) as (browser, url):
        for name in given.only:
            options, picture = PICTURES[name]
            person = Visitor(browser, url, **options)
            person.context.set_default_timeout(120_000)
            person.ready()
            slower[0] = 0.0
            picture(person)
            path = given.output / f"web-{name}.png"
            person.page.screenshot(path=str(path))
            person.context.close()
            size = path.stat().st_size
            print(f"{path}: {size / 1000:.0f} kB" + (" TOO LARGE" if size > LARGEST else ""))


@contextmanager
def pages(adapters: str) -> Iterator[tuple[Any, str]]:
    """(browser, address) of a page on the embedded base."""
    from playwright.sync_api import sync_playwright

    from vicuna.config import WebSettings
    from vicuna.web.server import serve
    from vicuna.web.state import App

    app = App(WebSettings(adapters=[adapters], open=False))
    page = serve(app, wait=False)
    engine: Any = app.worker.loaded.engine
    step = engine.step

    def late(*values: Any) -> Any:
        time.sleep(slower[0])
        return step(*values)

    engine.step = late
    with sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=chromium(), args=list(FLAGS)), page.local_url
    page.close(verbose=False)
    app.close()


def chat(person: Visitor) -> None:
    """A conversation, and four beams that grow."""
    person.mode("greedy")
    person.longest(60)
    person.ask("What is the capital of France?")
    person.answered(1)
    person.mode("beam")
    person.longest(200)
    slower[0] = 0.15  # beams must not end before they are seen
    person.ask("Name three things to see there, as a list with a short reason each.")
    person.page.wait_for_function(
        "Array.from(document.querySelectorAll('.v-beam')).some(b => b.textContent.length > 60)"
    )
    slower[0] = 1.0  # while the picture is taken
    time.sleep(1.5)
    assert person.page.locator(".v-beam:not(.done)").count() == 4


def instruct(person: Visitor) -> None:
    """The base and an adapter on the same question."""
    person.tab("Instruct")
    page = person.page
    page.locator("#instruct-who label").nth(1).click()
    page.locator("#instruct-mode label").get_by_text("greedy", exact=True).click()
    person.longest(80, "instruct")
    page.fill("#instruct-instruction textarea", "春天有什么水果？")
    page.click("#instruct-go")
    page.wait_for_function(
        "document.querySelectorAll('.v-column').length > 1 && document.querySelectorAll('.v-column "
        ".v-stats').length === document.querySelectorAll('.v-column').length"
    )


def adapters(person: Visitor) -> None:
    """The cards, one of them in use."""
    person.tab("Adapters")
    person.page.locator(".v-card input[type=checkbox]").first.click()
    person.page.wait_for_selector(".v-card.on")
    time.sleep(1)


def short(person: Visitor, question: str = "What is the capital of France?") -> None:
    """One question and its answer."""
    person.mode("greedy")
    person.longest(60)
    person.ask(question)
    person.answered(1)


def phone(person: Visitor) -> None:
    """The same, from the top."""
    short(person)
    person.page.locator("#tabs").scroll_into_view_if_needed()
    person.page.evaluate("window.scrollTo(0, 0)")
    time.sleep(1)


def probabilities(person: Visitor) -> None:
    """An answer token by token, with what else could have come."""
    page = person.page
    page.get_by_text("Stop words and bias").click()
    box = page.locator("#chat-logprobs input[type=number]")
    box.fill("5")
    box.blur()
    short(person)
    page.locator(".v-tok").nth(1).hover()
    page.wait_for_selector(".v-alts .own")


def chinese(person: Visitor) -> None:
    """The same in Chinese."""
    page = person.page
    page.locator("#chat-mode label").get_by_text("贪心", exact=True).click()
    person.longest(48)
    person.ask("春天有什么水果？")
    person.answered(1)


def look(person: Visitor) -> None:
    """A data set of the package: its report and the lengths."""
    person.page.locator("#tabs button[role=tab]").nth(3).click()
    person.page.locator("#data-source input").first.click()
    person.page.get_by_role("option").filter(has_text="instruct_zh.jsonl").click()
    person.page.wait_for_selector("#data-lost .v-number")
    person.page.locator("#data-report").scroll_into_view_if_needed()


def tokens(person: Visitor) -> None:
    """An example of it, token by token."""
    look(person)
    person.page.locator("#data-details button[role=tab]").nth(1).click()
    person.page.locator("#data-borders input").check()
    person.page.wait_for_selector("#data-tokens .borders")
    time.sleep(1)
    person.page.locator("#data-tokens").scroll_into_view_if_needed()


def train(person: Visitor) -> None:
    """The form of a new training."""
    person.page.locator("#tabs button[role=tab]").nth(4).click()
    person.page.wait_for_selector("#train-start")


def run(person: Visitor) -> None:
    """The newest run of the folder."""
    train(person)
    person.page.locator("#train-tabs button[role=tab]").nth(1).click()
    person.page.wait_for_selector("#train-curves svg")
    time.sleep(1)


PICTURES: dict[str, tuple[dict[str, Any], Any]] = {
    "chat": ({"viewport": WIDE}, chat),
    "instruct": ({"viewport": WIDE}, instruct),
    "adapters": ({"viewport": WIDE}, adapters),
    "phone": ({"viewport": PHONE}, phone),
    "chinese": ({"viewport": WIDE, "locale": "zh-CN"}, chinese),
    "probabilities": ({"viewport": WIDE}, probabilities),
    "dark": ({"viewport": WIDE, "color_scheme": "dark"}, short),
    "data": ({"viewport": WIDE}, look),
    "tokens": ({"viewport": WIDE, "locale": "zh-CN"}, tokens),
    "train": ({"viewport": WIDE}, train),
    "run": ({"viewport": WIDE}, run),
    "run-phone": ({"viewport": PHONE, "locale": "zh-CN", "color_scheme": "dark"}, run),
}

if __name__ == "__main__":
    main()
