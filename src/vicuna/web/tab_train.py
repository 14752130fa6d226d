"""The tab Train: a new training, and the runs there are.

`train_new.py` has the form and the start, `train_watch.py` a run as it goes; what they show is made
in `train_html.py`, and what they do is done by `Runs` (`runs.py`), which refuses where the server
was started with --read-only.
"""

from __future__ import annotations

import gradio as gr

from vicuna.runs.manager import Runs
from vicuna.web.i18n import label
from vicuna.web.render import note
from vicuna.web.state import App
from vicuna.web.train_new import NewTraining
from vicuna.web.train_watch import Watch


def build(app: App) -> None:
    """Add the tab's components."""
    runs = Runs(app.adapter_folders[0], app.may_write)
    if app.settings.read_only:
        gr.HTML(note("warn", label("train.read_only")), elem_id="train-read-only")
        Watch(app, runs)
        return
    with gr.Tabs(elem_id="train-tabs") as tabs:
        with gr.Tab(label("train.tab_new"), id="new"):
            new = NewTraining(app, runs)
        with gr.Tab(label("train.tab_runs"), id="runs"):
            watch = Watch(app, runs)
    new.then(tabs, watch)
    new.from_data(tabs)
    watch.again_in(tabs, new)
