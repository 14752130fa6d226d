"""A visitor of the page: a real browser, and what the tests do in it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


def chromium() -> str:
    """Where Chromium is; "" where it is not."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if (found := shutil.which(name))), "")


def missing() -> str:
    """What these tests lack, in words; "" for nothing."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "needs playwright: pip install playwright"
    return "" if chromium() else "needs Chromium (Debian: apt-get install chromium fonts-noto-cjk)"


class Visitor:
    """A browser of somebody's: a page, what went wrong on it, what it asked for."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.url = url
        self.context = browser.new_context(**{"locale": "en-GB", **options})
        self.context.set_default_timeout(60_000)  # of a machine that has other things to do
        self.asked: list[str] = []
        self.wrong: list[str] = []
        self.page = self.open()

    def open(self) -> Any:
        page = self.context.new_page()
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("dialog", lambda dialog: (self.wrong.append("dialog"), dialog.dismiss()))
        page.goto(self.url)
        return page

    def ready(self) -> Any:
        """The page, once it can be used."""
        self.page.wait_for_selector("#chat-history .v-hello, #chat-history .v-turn")
        return self.page

    def mode(self, name: str) -> None:
        self.page.locator("#chat-mode label").get_by_text(name, exact=True).click()

    def longest(self, tokens: int, tab: str = "chat") -> None:
        box = self.page.locator(f"#{tab}-max_new_tokens input[type=number]")
        box.fill(str(tokens))
        box.blur()

    def ask(self, text: str) -> None:
        self.page.fill("#chat-box textarea", text)
        self.page.press("#chat-box textarea", "Enter")

    def answered(self, number: int = 1) -> str:
        """The text of the last of so many answers, once it is whole."""
        page = self.page
        page.wait_for_function(
            "n => document.querySelectorAll('#chat-history .v-turn.answer').length === n "
            "&& !document.querySelector('#chat-live .v-turn')",
            arg=number,
        )
        return str(page.locator("#chat-history .v-raw").nth(number - 1).input_value())

    def until(self, true: Callable[[], Any], seconds: float = 60) -> None:
        """Wait until something is true that is not on the page."""
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, "it did not come true"
            self.page.wait_for_timeout(20)

    def name(self) -> str:
        """What the server knows this tab by."""
        return str(self.page.evaluate("sessionStorage.getItem('vicuna-tab')"))

    def act(self, name: str, place: int = -1) -> None:
        found = self.page.locator(f"#chat-history [data-act={name}]")
        found.nth(place if place >= 0 else found.count() - 1).click()

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).first.click()

    def see(self, selector: str, words: str = "", seconds: float = 60) -> Any:
        """Wait until an element with these words is visible."""
        found = self.page.locator(selector)
        found = (found.filter(has_text=words) if words else found).first
        found.wait_for(timeout=1000 * seconds)
        return found

    def drop(self, path: Path) -> None:
        self.page.locator("#data-drop input[type=file]").set_input_files(str(path))

    def fill(self, setting: str, value: str) -> None:
        self.page.locator(f"#set-{setting}").locator("input, textarea").first.fill(value)

    def fits(self) -> bool:
        """Whether nothing is wider than the window."""
        wide: bool = self.page.evaluate(
            "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        )
        return wide

    def outside(self) -> list[str]:
        """Requests that went elsewhere than to the server."""
        own = (self.url, "data:", "blob:")
        return [url for url in self.asked if not url.startswith(own)]
