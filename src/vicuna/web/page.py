"""The page: a line with the name and two switches, and the tabs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from vicuna.web import kept_values, tab_adapters, tab_chat, tab_data, tab_instruct, tab_train
from vicuna.web.event_errors import plainly
from vicuna.web.events import QUIET
from vicuna.web.i18n import COOKIE, label
from vicuna.web.number_input import take_all_numbers
from vicuna.web.render import render
from vicuna.web.state import App

TABS = {
    "chat": tab_chat,
    "instruct": tab_instruct,
    "adapters": tab_adapters,
    "data": tab_data,
    "train": tab_train,
}
SECONDS = 4.0  # between looks for new adapters
CLEAN = 3600  # seconds that an uploaded file is kept, and between looks for old ones
HEAD = f"<script>{(Path(__file__).parent / 'static/page.js').read_text(encoding='utf-8')}</script>"


def build(app: App) -> gr.Blocks:
    """The page of an app; every tab's components have the id `tab-NAME` around them."""
    base = app.worker.loaded
    take_all_numbers()
    with gr.Blocks(
        title=label("page.title"),
        analytics_enabled=False,
        fill_width=True,
        delete_cache=(CLEAN, CLEAN),
    ) as page:
        app.tab = gr.Textbox(visible="hidden", elem_id="session", show_label=False)
        for noted in (app.opening, app.loading, app.arriving, app.kept, app.of_session):
            noted.clear()
        with gr.Row(elem_id="top"):
            read_only = label("page.read_only") if app.settings.read_only else ""
            gr.HTML(
                render("page.name", title=label("page.title"), base=base.base, read_only=read_only),
                elem_id="name",
            )
            dark = gr.Button(label("page.appearance"), size="sm", elem_id="dark", min_width=0)
            language = gr.Button(label("page.language"), size="sm", elem_id="language", min_width=0)
        other = label("page.other_language")
        language.click(None, js=f"() => vicunaSwitchLanguage('{COOKIE}', '{other}')")
        dark.click(None, js="() => vicunaSwitchDark()")
        with gr.Tabs(elem_id="tabs", overflow_behavior="wrap"):
            for name, tab in TABS.items():
                with gr.Tab(label(f"page.{name}"), id=name, elem_id=f"tab-{name}") as inside:
                    before = len(app.opening)
                    tab.build(app)
                # What a tab shows is looked up again whenever it is opened.
                for fn, inputs, outputs in app.opening[before:]:
                    inside.select(fn, inputs, outputs, **QUIET)
        kept_values.keep(app.kept)
        _watch_adapters(app)
        opened = page.load(
            None, app.kept, app.kept, show_progress="hidden",
            js=f"(...now) => {{ vicunaOpen(); return {kept_values.restored(app.kept)}; }}",
        )  # fmt: skip
        for fn, inputs, outputs in [*app.loading, *app.opening]:
            opened.then(fn, inputs, outputs, **QUIET)
    _name(page, app)
    return page


def _watch_adapters(app: App) -> None:
    """What shows adapters is drawn anew when one appeared or went, as when a run has ended. The
    clock stands outside of the tabs: what is in one that was not opened yet does not tick."""
    known = gr.State(None)

    def look(known: list[str] | None) -> Any:
        now = app.registry.recent_paths()
        return gr.skip() if now == known else now

    gr.Timer(SECONDS).tick(look, known, known, trigger_mode="once", **QUIET)
    for fn, inputs, outputs in app.arriving:
        known.change(fn, inputs, outputs, **QUIET)


def _name(page: gr.Blocks, app: App) -> None:
    """Every event reports its errors (`plainly`), and one that belongs to a session is given the
    tab's name when it is sent. Some are sent before the page has opened: by gradio, which selects
    the first tab, or by a quick hand. The hidden field of the name holds it once the page has been
    told its session (`ChatTab.come_back`): until then the page sends null for what belongs to the
    session, so that an empty field does not replace what the server has."""
    for event in page.fns.values():
        if event.fn is not None:
            event.fn = plainly(event.fn)
        if app.tab in event.inputs:
            tab = event.inputs.index(app.tab)
            owned = [event.inputs.index(c) for c in app.of_session if c in event.inputs]
            event.js = (
                f"(...sent) => {{ if (sent[{tab}] !== vicunaTab()) for (const i of {owned}) "
                f"sent[i] = null; sent[{tab}] = vicunaTab(); return sent; }}"
            )
