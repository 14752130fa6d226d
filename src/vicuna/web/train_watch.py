"""A run as it goes: numbers, curves, answers; what can be done with it; other runs beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gradio as gr
from markupsafe import escape

from vicuna.errors import UserError
from vicuna.runs.manager import Run, Runs
from vicuna.web import train_html
from vicuna.web.events import QUIET, Updates, bind
from vicuna.web.html_events import address_of
from vicuna.web.i18n import label, language_of, translate
from vicuna.web.render import note, toast
from vicuna.web.state import App
from vicuna.web.train_new import NewTraining, of_page

SECONDS = 2.0
# The buttons that make sense in a state.
_PAUSABLE = ("starting", "running")
_RESUMABLE = ("paused", "stopped", "killed", "failed")


class Watch:
    """The components that show a run, and what they do.

    last_sent: what the browser shows already; where nothing is new, nothing is sent.
    """

    def __init__(self, app: App, runs: Runs) -> None:
        self.app, self.runs = app, runs
        self.last_sent = gr.State(None)
        self.pending = gr.State(None)  # [what was asked for, the run it was asked for]
        self._layout()
        self.inputs = [self.run, self.compare, self.last_sent]
        self.shown = [
            *(self.run, self.compare, self.last_sent, self.head, self.buttons, self.curves),
            *(self.others, self.samples, self.output, self.terminal, self.table, self.body),
            *(self.pause, self.resume, self.stop, self.talk, self.again, self.delete, self.sure),
        ]
        self._events()

    # What is there.

    def _layout(self) -> None:
        with gr.Row():
            self.run = gr.Dropdown([], label=label("train.run"), min_width=220, elem_id="train-run")
            self.compare = gr.Dropdown(
                [],
                multiselect=True,
                label=label("train.compare"),
                info=label("train.compare_help"),
                min_width=220,
                elem_id="train-compare",
            )
        self.head = gr.HTML(note("empty", label("train.no_runs")), elem_id="train-head")
        with gr.Row(visible=False, elem_classes="v-bar") as self.buttons:
            small: dict[str, Any] = {"size": "sm", "min_width": 90, "scale": 0}
            self.pause = gr.Button(label("train.pause"), elem_id="train-pause", **small)
            self.resume = gr.Button(
                label("train.resume"), variant="primary", elem_id="train-resume", **small
            )
            self.stop = gr.Button(label("train.stop"), elem_id="train-stop", **small)
            self.talk = gr.Button(
                label("train.talk"), variant="primary", elem_id="train-talk", **small
            )
            self.again = gr.Button(label("train.again"), elem_id="train-again", **small)
            self.delete = gr.Button(label("train.delete"), elem_id="train-delete", **small)
        with gr.Group(visible=False, elem_id="train-sure") as self.sure:
            self.question = gr.HTML()
            with gr.Row():
                self.yes = gr.Button(label("train.yes_delete"), variant="stop", elem_id="train-yes")
                self.no = gr.Button(label("train.no"), elem_id="train-no")
        with gr.Column(visible=False) as self.body:
            self.curves = gr.HTML(elem_id="train-curves")
            with gr.Accordion(label("train.more_curves"), open=False):
                self.others = gr.HTML()
            with gr.Accordion(label("train.samples"), open=True):
                self.samples = gr.HTML(elem_id="train-samples")
            with gr.Accordion(label("train.output"), open=False):
                self.output = gr.Code(
                    language=None, show_label=False, lines=1, elem_id="train-output"
                )
            with gr.Accordion(label("train.terminal"), open=False):
                self.terminal = gr.Code(
                    language="shell", show_label=False, lines=1, elem_id="train-terminal"
                )
        with gr.Accordion(label("train.all_runs"), open=False):
            self.table = gr.HTML(elem_id="train-table")

    def _events(self) -> None:
        self.app.opening.append((self.refresh, self.inputs, self.shown))
        gr.Timer(SECONDS).tick(self.refresh, self.inputs, self.shown, trigger_mode="once", **QUIET)
        for chosen in (self.run, self.compare):
            chosen.input(self.refresh, self.inputs, self.shown, trigger_mode="always_last", **QUIET)
        for button, action in ((self.pause, self.runs.pause), (self.resume, self.runs.resume)):
            button.click(bind(self.act, action), self.run, self.last_sent, **QUIET).then(
                self.refresh, self.inputs, self.shown, **QUIET
            )
        self.talk.click(self.talk_with, [self.app.tab, self.run], of_page("tabs"), **QUIET)
        asking = [self.pending, self.sure, self.question, self.yes]
        for button, name in ((self.stop, "stop"), (self.delete, "delete")):
            button.click(bind(self.ask, name), self.run, asking, **QUIET)
        for forgets in (self.no.click, self.run.input):
            forgets(
                lambda: (None, gr.update(visible=False)), None, [self.pending, self.sure], **QUIET
            )
        self.yes.click(
            self.confirmed, self.pending, [self.pending, self.sure, self.last_sent], **QUIET
        ).then(self.refresh, self.inputs, self.shown, **QUIET)

    def again_in(self, tabs: gr.Tabs, new: NewTraining) -> None:
        """The settings of a run go into the form of a new one."""

        def fill(name: str | None) -> list[Any]:
            values = new.values(self.runs.get(name or "").settings())
            return [gr.update(selected="new"), *values]

        self.again.click(
            fill, self.run, [tabs, *new.inputs.values()], **QUIET
        )  # fmt: skip

    # What happens.

    def names(self, request: gr.Request) -> list[tuple[str, str]]:
        """The runs as (what is shown, name)."""
        return [(_shown(run, request), run.name) for run in self.runs.all()]

    def refresh(
        self,
        name: str | None,
        compared: list[str] | None,
        last_sent: Any,
        request: gr.Request,
    ) -> Updates:
        """Whatever is new about the runs."""
        runs = self.runs.all()
        by_name = {run.name: run for run in runs}
        run = by_name.get(name or "") or next((r for r in runs if r.working), None)
        run = run or next(iter(runs), None)
        others = [by_name[n] for n in compared or [] if n in by_name and n != (run and run.name)]
        listed: list[Any] = [run and run.name, [o.name for o in others], language_of(request)]
        listed += [(r.name, r.state) for r in runs]
        now = [listed, _fingerprint(run), [r.log.step for r in runs]]
        if now == last_sent:
            return {self.last_sent: gr.skip()}
        updates: Updates = {
            self.last_sent: now,
            self.table: train_html.all_runs(runs, partial(translate, request)),
        }
        # What can be clicked is left alone while only numbers change.
        if last_sent is None or last_sent[0] != listed:
            updates |= self._clickable(runs, run, request)
            # Somebody may choose another one right now: a choice that stands is not sent again.
            if run is None or run.name != name:
                updates[self.run]["value"] = run.name if run else None
            if any(n not in by_name for n in compared or []):
                updates[self.compare]["value"] = [o.name for o in others]
        if run is None:
            empty = note("empty", translate(request, "train.no_runs"))
            return {**updates, self.head: empty, self.sure: gr.update(visible=False)}
        return {**updates, **self._run(run, others, request)}

    def _clickable(self, runs: Sequence[Run], run: Run | None, request: gr.Request) -> Updates:
        choices = [(_shown(r, request), r.name) for r in runs]
        updates: Updates = {
            self.run: gr.update(choices=choices),
            self.compare: gr.update(choices=choices),
            self.buttons: gr.update(visible=run is not None and not self.app.settings.read_only),
            self.body: gr.update(visible=run is not None),
        }
        if run is not None:
            updates |= {
                self.pause: gr.update(visible=run.state in _PAUSABLE),
                self.resume: gr.update(visible=run.state in _RESUMABLE),
                self.stop: gr.update(visible=run.working),
                self.talk: gr.update(visible=run.has_adapter and not run.working),
                self.again: gr.update(visible=not run.working),
                self.delete: gr.update(visible=not run.working),
            }
        return updates

    def _run(self, run: Run, others: Sequence[Run], request: gr.Request) -> Updates:
        tr = partial(translate, request)
        return {
            self.head: train_html.head(run, tr),
            self.curves: train_html.loss_chart(run, others, tr),
            self.others: train_html.other_charts(run, tr),
            self.samples: train_html.samples(run, tr),
            self.output: train_html.output(run),
            self.terminal: train_html.commands(run),
        }

    def act(self, action: Callable[[str], Any], name: str | None, request: gr.Request) -> None:
        """Pause or resume; the page is drawn anew then."""
        try:
            action(name or "")
        except UserError as e:
            raise gr.Error(toast(e, partial(translate, request)), print_exception=False) from e

    async def talk_with(self, tab: str, name: str | None, request: gr.Request) -> Any:
        """Answer with the run's adapter alone from now on, in this browser's tab, and go there."""
        try:
            path = self.app.registry.get(
                str((self.runs.get(name or "").path / "adapter").resolve())
            ).path
            session = self.app.sessions.get(tab)
            mix = {path: 1.0}
            # Loaded now, so that an adapter of another base is refused here and not at a question.
            worker = self.app.worker
            await worker.settled(worker.choose(session.name, mix, address_of(request)))
        except UserError as e:
            raise gr.Error(toast(e, partial(translate, request)), print_exception=False) from e
        session.mix.clear()
        session.mix.update(mix)
        return gr.update(selected="chat")

    def ask(self, action: str, name: str | None, request: gr.Request) -> Updates:
        """Ask whether it is really meant."""
        if not name:
            return {self.pending: None}
        return {
            self.pending: [action, name],
            self.sure: gr.update(visible=True),
            self.question: note("warn", translate(request, f"train.sure_{action}", name=name)),
            self.yes: translate(request, f"train.yes_{action}"),
        }

    def confirmed(self, pending: list[str] | None, request: gr.Request) -> Any:
        """It was really meant, of the run that was named in the question."""
        action, name = pending or ("", "")
        try:
            if action == "delete":
                self.runs.delete(name)
                gr.Info(escape(translate(request, "train.deleted", name=name)))
            elif action == "stop":
                self.runs.stop(name)
        except UserError as e:
            raise gr.Error(toast(e, partial(translate, request)), print_exception=False) from e
        return None, gr.update(visible=False), None


def _shown(run: Run, request: gr.Request) -> str:
    return f"{run.name} · {translate(request, f'state.{run.state}')}"


def _fingerprint(run: Run | None) -> list[Any]:
    """What decides how a run looks, beside its name and state: as JSON would have it."""
    if run is None:
        return []
    log = run.log
    counts = (len(log.evaluations), len(log.samples), len(log.warnings), len(log.steps["step"]))
    printed = train_html.output_size(run) if run.working else 0
    return [run.name, run.error, *counts, printed]
