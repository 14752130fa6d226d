"""The page: a line with the name and two switches, and the tabs."""

from __future__ import annotations

import gradio as gr

from vicuna.app import tab_adapters, tab_chat, tab_data, tab_instruct, tab_train
from vicuna.app.state import App
from vicuna.app.words import COOKIE, t

TABS = {
    "chat": tab_chat,
    "instruct": tab_instruct,
    "adapters": tab_adapters,
    "data": tab_data,
    "train": tab_train,
}
_SWITCH_LANGUAGE = (
    f"() => {{ document.cookie = '{COOKIE}={t('page.other_language')};path=/;max-age=31536000;"
    "samesite=lax'; location.reload(); }"
)


def build(app: App) -> gr.Blocks:
    """The page of an app; every tab's components have the id `tab-NAME` around them."""
    with gr.Blocks(title=t("page.title"), analytics_enabled=False, fill_width=True) as page:
        with gr.Row(elem_id="top"):
            gr.HTML(f"<h1>{t('page.title')}</h1>", elem_id="name")
            language = gr.Button(t("page.language"), size="sm", elem_id="language", min_width=0)
        language.click(None, js=_SWITCH_LANGUAGE)
        with gr.Tabs(elem_id="tabs"):
            for name, tab in TABS.items():
                with gr.Tab(t(f"page.{name}"), id=name, elem_id=f"tab-{name}"):
                    tab.build(app)
    return page
