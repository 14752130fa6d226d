"""A browser in front of a page with a tiny model: what the tests of the tabs Data and Train share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))
from browser_kit import FLAGS as FLAGS
from browser_kit import chromium
from run_kit import save_tiny_model, write_data

from vicuna.app.state import App
from vicuna.config import WebSettings

CHROMIUM = chromium()


@contextmanager
def served(place: Path, **more: Any) -> Iterator[str]:
    """The address of a page over a folder with `tiny`, `data` and `runs`."""
    from vicuna.app.server import serve

    if not (place / "tiny").is_dir():
        save_tiny_model(place / "tiny")
        (place / "data").mkdir()
        write_data(place / "data" / "tiny.jsonl", 60)
    folders = {"adapters": [str(place / "runs")], "data": [str(place / "data")]}
    app = App(WebSettings(model=str(place / "tiny"), open=False, **folders, **more))
    page = serve(app, wait=False)
    try:
        yield page.local_url
    finally:
        page.close()
        app.close()


class Visitor:
    """A browser's page; everything that it asked for and complained of."""

    def __init__(self, context: Any, url: str) -> None:
        self.page = context.new_page()
        self.asked: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda r: self.asked.append(r.url))
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.goto(url)

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

    def only_asked(self, url: str) -> bool:
        """Whether nothing was fetched from anywhere else."""
        return all(a.startswith((url, "data:", "blob:")) for a in self.asked)
