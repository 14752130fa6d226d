"""Pictures of the tabs Data and Train for docs/images, of real data and real runs.

python tests/browser/train_pictures.py DATA_FILE RUNS_FOLDER docs/images
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parent))
from train_kit import CHROMIUM, FLAGS, Visitor

from vicuna.app.server import serve
from vicuna.app.state import App
from vicuna.config import WebSettings

DESKTOP, PHONE = {"width": 1200, "height": 860}, {"width": 390, "height": 844}
NAMES = {
    "en-US": ("Data", "Train", "Runs", "As the model sees it", "Rows with problems"),
    "zh-CN": ("数据", "训练", "训练记录", "模型看到的样子", "有问题的行"),
}


def main() -> None:
    data, runs, out = map(Path, sys.argv[1:4])
    settings = WebSettings(adapters=[str(runs)], data=[str(data.parent)], open=False)
    app = App(settings)
    page = serve(app, wait=False)
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        for locale, scheme, size, tail in (
            ("en-US", "light", DESKTOP, ""),
            ("zh-CN", "dark", DESKTOP, "-zh-dark"),
            ("zh-CN", "light", PHONE, "-phone"),
        ):
            context = browser.new_context(locale=locale, color_scheme=scheme, viewport=size)
            _pictures(Visitor(context, page.local_url), NAMES[locale], data, out, tail)
            context.close()
        browser.close()
    page.close()
    app.close()


def _pictures(visitor: Visitor, names: Any, data: Path, out: Path, tail: str) -> None:
    tab_data, tab_train, tab_runs, preview, rows = names

    def shot(name: str, whole: bool = False) -> None:
        time.sleep(1)
        visitor.page.screenshot(path=str(out / f"{name}{tail}.png"), full_page=whole)

    visitor.tab(tab_data)
    source = visitor.page.locator("#data-source input").first
    source.fill(str(data))
    source.press("Enter")
    visitor.see("#data-lost .v-number.kept", seconds=120)
    shot("data-lengths", whole=True)
    visitor.page.get_by_role("tab", name=preview).click()
    visitor.page.locator("#data-borders input").check()
    visitor.see("#data-tokens .borders")
    shot("data-preview", whole=True)
    visitor.page.get_by_role("tab", name=rows).click()
    shot("data-rows")
    visitor.tab(tab_train)
    visitor.see("#train-start")
    shot("train-new", whole=True)
    visitor.tab(tab_runs)
    visitor.see("#train-curves svg")
    shot("train-run", whole=True)
    visitor.page.locator("#train-compare input").first.click()
    visitor.page.get_by_role("option").last.click()
    visitor.page.keyboard.press("Escape")
    shot("train-compare")


if __name__ == "__main__":
    main()
