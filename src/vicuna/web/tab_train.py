"""The tab Train: a new training, and the runs there are.

`train_new.py` has the form and the start, `train_watch.py` a run as it goes; what they show is made
in `train_html.py`, and what they do is done by `Runs` (`runs.py`), which refuses where the server
was started with --read-only.
"""

from __future__ import annotations

import gradio as gr

from vicuna.runs.manager import Runs
from vicuna.web.data_html import note
from vicuna.web.i18n import t
from vicuna.web.state import App
from vicuna.web.train_new import NewTraining
from vicuna.web.train_watch import Watch


def build(app: App) -> None:
    """Add the tab's components."""
    runs = Runs(app.adapter_folders[0], app.settings.read_only)
    if app.settings.read_only:
        gr.HTML(note("warn", t("train.read_only")), elem_id="train-read-only")
        Watch(app, runs)
        return
    with gr.Tabs(elem_id="train-tabs") as tabs:
        with gr.Tab(t("train.tab_new"), id="new"):
            new = NewTraining(app, runs)
        with gr.Tab(t("train.tab_runs"), id="runs"):
            watch = Watch(app, runs)
    new.then(tabs, watch)
    new.from_data(tabs)
    watch.again_in(tabs, new)
