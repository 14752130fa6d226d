"""The tab Adapters."""

from __future__ import annotations

import gradio as gr

from vicuna.app.state import App
from vicuna.app.words import t


def build(app: App) -> None:  # noqa: ARG001
    """Add the tab's components."""
    gr.Markdown(t("page.empty"))
