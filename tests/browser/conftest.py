"""A real browser over a page on a tiny random model.

Without Chromium or Playwright these tests are skipped, except where CI is set: there they fail.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser_kit import FLAGS, Visitor, chromium, missing
from page_kit import make_place, open_page

from vicuna.web.state import App


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser of a module's own: its event loop would be in the way of other tests."""
    if why := missing():
        if os.environ.get("CI"):
            pytest.fail(f"the tests of the page {why}, and never skip where CI is set")
        pytest.skip(why)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium(), args=list(FLAGS))
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def served(browser: Any, place: Path) -> Iterator[tuple[App, str]]:
    with open_page(place) as opened:
        yield opened


@pytest.fixture
def visitor(browser: Any, served: tuple[App, str]) -> Iterator[Visitor]:
    made = Visitor(browser, served[1])
    made.ready()
    yield made
    made.context.close()
    assert made.wrong == []
    assert made.outside() == []


@pytest.fixture
def slow(served: tuple[App, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model takes its time, and does not end by itself: an answer can be seen growing."""
    _slow(served[0], monkeypatch, lambda: True)


@pytest.fixture
def held(served: tuple[App, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """As `slow`, and an answer that has begun does not end as long as this list holds something."""
    holding: list[str] = []
    _slow(served[0], monkeypatch, lambda: not holding)
    yield holding
    holding.clear()


def _slow(app: App, monkeypatch: pytest.MonkeyPatch, may_go_on: Callable[[], bool]) -> None:
    engine: Any = app.worker.loaded.engine
    steps = [0]
    step = engine.step

    def late(tokens: Any, parents: Any) -> Any:
        steps[0] += 1
        time.sleep(0.02)
        while steps[0] > 10 and not may_go_on():
            time.sleep(0.02)
        scores = step(tokens, parents).clone()  # its own are made in inference mode
        scores[:, [1, 3]] = -100.0  # </s> and <|im_end|>
        return scores

    monkeypatch.setattr(engine, "step", late)
