"""The tab Data: a data set's report, its bad rows, its examples token by token, its lengths.

What is computed is in `data_view.py`, what it looks like in `data_html.py`; here are the components
and what happens on their events.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from vicuna.errors import UserError
from vicuna.web import data_html as html
from vicuna.web import files
from vicuna.web.data_view import DatasetCache, DatasetQuery, DatasetView
from vicuna.web.error_texts import localize_error
from vicuna.web.events import QUIET, Updates, bind
from vicuna.web.i18n import label, translate
from vicuna.web.number_input import number as number_of
from vicuna.web.render import note, toast
from vicuna.web.state import App

# Those that are met; any other can be typed.
ENCODINGS = ("utf-8", "gb18030", "big5", "utf-16", "cp1252", "shift_jis", "euc-kr")
CUTOFF = 2048
SHORTEST, LONGEST = 16, 1_000_000  # cutoffs that can be chosen
ALL = "all"


def build(app: App) -> None:
    """Add the tab's components."""
    DataTab(app)


class DataTab:
    """The components of the tab, and what they do.

    Each visitor has a `gr.State` with the query; its result is shared by all (`DatasetCache`).
    """

    def __init__(self, app: App) -> None:
        self.app = app
        self.cache = DatasetCache()
        self.query = gr.State(None)
        self._choosing()
        self.status = gr.HTML(note("empty", label("data.empty")), elem_id="data-status")
        self.report = gr.HTML(elem_id="data-report", visible=False)
        with gr.Row(elem_classes="v-bar"):
            self.train = gr.Button(
                label("data.train"), visible=False, size="sm", scale=0, elem_id="data-train"
            )
        with gr.Tabs(
            visible=False, overflow_behavior="wrap", elem_id="data-details"
        ) as self.details:
            with gr.Tab(label("data.tab_lengths"), id="lengths"):
                self._lengths()
            with gr.Tab(label("data.tab_preview"), id="preview"):
                self._preview()
            with gr.Tab(label("data.tab_rows"), id="rows"):
                self._rows()
        self._events()

    # What is there.

    def _choosing(self) -> None:
        with gr.Row(equal_height=True):
            with gr.Column(scale=3, min_width=300):
                self.source = gr.Dropdown(
                    files.listed(self.app),
                    value=None,
                    label=label("data.choose"),
                    info=label("data.choose_help"),
                    allow_custom_value=True,
                    elem_id="data-source",
                )
                with gr.Row():
                    self.model = gr.Dropdown(
                        files.models(self.app),
                        value=files.models(self.app)[0],
                        label=label("data.model"),
                        info=label("data.model_help"),
                        allow_custom_value=True,
                        min_width=200,
                    )
                    self.template = gr.Dropdown(
                        files.templates(),
                        value="auto",
                        label=label("data.template"),
                        info=label("data.template_help"),
                        min_width=200,
                        elem_id="data-template",
                    )
                    self.encoding = gr.Dropdown(
                        [(label("data.encoding_auto"), ""), *ENCODINGS],
                        value="",
                        label=label("data.encoding"),
                        info=label("data.encoding_help"),
                        allow_custom_value=True,
                        min_width=160,
                        elem_id="data-encoding",
                    )
            with gr.Column(scale=2, min_width=260, visible=not self.app.settings.read_only):
                self.drop = gr.File(label=label("data.drop"), height=190, elem_id="data-drop")

    def _lengths(self) -> None:
        self.chart = gr.HTML(elem_id="data-lengths")
        self.cutoff = gr.Slider(
            SHORTEST,
            4096,
            CUTOFF,
            step=16,
            label=label("data.cutoff"),
            info=label("data.cutoff_help"),
            elem_id="data-cutoff",
        )
        self.lost = gr.HTML(elem_id="data-lost")

    def _preview(self) -> None:
        with gr.Row(elem_classes="v-bar"):
            self.example_back = gr.Button("‹", size="sm", min_width=44, scale=0)
            self.example = gr.Number(
                1,
                show_label=False,
                container=False,
                precision=0,
                minimum=1,
                min_width=90,
                scale=0,
                elem_id="data-example",
            )
            self.example_next = gr.Button("›", size="sm", min_width=44, scale=0)
            self.count = gr.HTML(elem_classes="v-place")
            self.borders = gr.Checkbox(
                label=label("data.borders"), container=False, min_width=200, elem_id="data-borders"
            )
        self.tokens = gr.HTML(elem_id="data-tokens")

    def _rows(self) -> None:
        self.page = gr.State(0)
        with gr.Row(equal_height=True, elem_classes="v-bar"):
            self.action = gr.Radio(
                [(label(f"data.action_{a}"), a) for a in (ALL, *html.ACTIONS)],
                value=ALL,
                show_label=False,
                container=False,
                min_width=260,
                elem_id="data-action",
            )
            self.page_back = gr.Button("‹", size="sm", min_width=44, scale=0)
            self.place = gr.HTML(elem_classes="v-place")
            self.page_next = gr.Button("›", size="sm", min_width=44, scale=0)
        self.problems = gr.HTML(elem_id="data-problems")

    def _events(self) -> None:
        tab = self.app.tab
        chosen = [
            *(tab, self.source, self.model, self.template, self.encoding),
            *(self.query, self.borders),
        ]
        found = [
            *(self.query, self.status, self.report, self.details, self.train),
            *(self.cutoff, self.chart, self.lost, self.example, self.count, self.tokens),
            *(self.page, self.action, self.place, self.problems),
        ]
        kept = self.drop.upload(
            self.keep, self.drop, [self.source, self.drop, self.status], **QUIET
        )
        kept.success(self.show_dataset, chosen, found, **QUIET)
        # A choice while another data set is read does not wait for it: `show_dataset` ends that.
        gr.on(
            [self.source.input, self.model.input, self.template.input, self.encoding.input],
            self.show_dataset, chosen, found, trigger_mode="multiple", **QUIET,
        )  # fmt: skip
        gr.on(
            [self.cutoff.input, self.cutoff.release],
            self.at_cutoff,
            [self.query, self.cutoff],
            [self.chart, self.lost],
            trigger_mode="always_last",
            **QUIET,
        )
        self.cutoff.release(
            self.recount,
            [tab, self.query, self.cutoff, self.action],
            [
                *(self.query, self.cutoff, self.report),
                *(self.page, self.place, self.problems),
            ],
            trigger_mode="always_last",
            **QUIET,
        )
        shown = [self.query, self.example, self.borders]
        gr.on(
            [self.example.change, self.borders.change], self.show_example, shown, self.tokens,
            trigger_mode="always_last", **QUIET,
        )  # fmt: skip
        for button, by in ((self.example_back, -1), (self.example_next, 1)):
            button.click(bind(self.turn, by), [self.query, self.example], self.example, **QUIET)
        rows = [self.page, self.place, self.problems]
        self.action.change(self.filter, [self.query, self.action], rows, **QUIET)
        for button, by in ((self.page_back, -1), (self.page_next, 1)):
            inputs = [self.query, self.action, self.page]
            button.click(bind(self.turn_page, by), inputs, rows, **QUIET)
        # What was dropped or saved meanwhile is in the list when the tab is opened again.
        self.app.opening.append((self.list_files, None, self.source))

    def list_files(self) -> Any:
        """The data sets there are now."""
        return gr.update(choices=files.listed(self.app))

    # What happens.

    def keep(self, dropped: str | None, request: gr.Request) -> Updates:
        """A file was dropped: it is kept, and chosen, which makes it looked at."""
        if not dropped:
            return {self.status: gr.skip()}
        try:
            path = files.keep(self.app, Path(dropped))
        except UserError as e:
            raise gr.Error(toast(e, partial(translate, request)), print_exception=False) from e
        return {
            self.source: gr.update(choices=files.listed(self.app), value=str(path)),
            self.drop: None,
            self.status: note("busy", translate(request, "data.reading")),
        }

    def show_dataset(
        self,
        tab: str,
        source: str | None,
        model: str,
        template: str,
        encoding: str | None,
        before: DatasetQuery | None,
        borders: bool,
        request: gr.Request,
    ) -> Iterator[Updates]:
        """Something was chosen: read it, and show everything there is. A cutoff that was chosen
        before is kept. Ends without a word where something else was chosen meanwhile."""
        session = self.app.sessions.get(tab)
        session.dataset_requests += 1
        request_id = session.dataset_requests
        if not (source or "").strip():
            yield {
                self.query: None,
                self.status: gr.update(
                    value=note("empty", translate(request, "data.empty")), visible=True
                ),
                self.report: gr.update(visible=False),
                self.details: gr.update(visible=False),
                self.train: gr.update(visible=False),
            }
            return
        yield self._status(note("busy", translate(request, "data.reading")))
        try:
            query = DatasetQuery(
                tuple(files.allowed(self.app, str(source))),
                files.allowed_model(self.app, model or ""),
                files.allowed_template(self.app, template or ""),
                before.cutoff if before else CUTOFF,
                (encoding or "").strip(),
            )
            for step in self.cache.watch(query):
                if session.dataset_requests != request_id:
                    yield {self.query: gr.skip()}  # gradio sends the last thing twice
                    return
                if isinstance(step, DatasetView):
                    yield self._found(step, borders, request)
                else:
                    tr = translate(request, "data.reading_file", what=step)
                    yield self._status(note("busy", tr))
        except UserError as e:
            if session.dataset_requests != request_id:
                yield {self.query: gr.skip()}
                return
            yield {
                **self._status(note("error", localize_error(e, partial(translate, request)))),
                self.query: None,
                self.report: gr.update(visible=False),
                self.details: gr.update(visible=False),
                self.train: gr.update(visible=False),
            }

    def _status(self, note: str) -> Updates:
        return {self.status: gr.update(value=note, visible=True)}

    def _found(self, view: DatasetView, borders: bool, request: gr.Request) -> Updates:
        tr = partial(translate, request)
        some = len(view.whole) > 0
        limit = html.limit_of(view.lengths)
        status = gr.update(value=note("error", tr("data.nothing_usable")), visible=True)
        return {
            self.query: view.query,
            self.status: gr.update(visible=False) if some else status,
            self.report: gr.update(value=html.report(view.report, tr), visible=True),
            self.details: gr.update(visible=True, selected="lengths" if some else "rows"),
            self.train: gr.update(visible=some and not self.app.settings.read_only),
            # A cutoff beyond all examples is at the slider's end, and stays what it was.
            self.cutoff: gr.update(
                maximum=limit, value=min(view.query.cutoff, limit), visible=some
            ),
            **self._chart(view, view.query.cutoff, request),
            self.example: gr.update(value=1, maximum=max(1, len(view.whole))),
            self.count: tr("data.example_of", count=len(view.whole)),
            self.tokens: self._tokens(view, 1, borders, request),
            self.action: ALL,
            **self._leaf(view, ALL, 0, request),
        }

    def _chart(self, view: DatasetView, cutoff: int, request: gr.Request) -> Updates:
        if not len(view.lengths):
            return {
                self.chart: note("empty", translate(request, "data.no_examples")),
                self.lost: "",
            }
        tr = partial(translate, request)
        return {
            self.chart: html.lengths(view.lengths, cutoff, tr),
            self.lost: html.lost(view.lengths, cutoff, tr),
        }

    def at_cutoff(
        self, query: DatasetQuery | None, cutoff: float | None, request: gr.Request
    ) -> Updates:
        """The slider moves: what this cutoff would lose."""
        if query is None:
            return {self.chart: gr.skip()}
        return self._chart(self.cache.get(query), _cutoff(cutoff, query), request)

    def recount(
        self,
        tab: str,
        query: DatasetQuery | None,
        cutoff: float | None,
        action: str,
        request: gr.Request,
    ) -> Updates:
        """A cutoff was chosen or typed: the report, as it is with it. One beyond the slider's end
        moves the end."""
        if query is None or _cutoff(cutoff, query) == query.cutoff:
            return {self.page: gr.skip()}
        session = self.app.sessions.get(tab)
        request_id = session.dataset_requests
        view = self.cache.get(replace(query, cutoff=_cutoff(cutoff, query)))
        if session.dataset_requests != request_id:  # another data set was chosen meanwhile
            return {self.page: gr.skip()}
        chosen = view.query.cutoff
        beyond = chosen > html.limit_of(view.lengths)
        return {
            self.query: view.query,
            # Only then: somebody may move the slider meanwhile.
            self.cutoff: gr.update(maximum=chosen, value=chosen) if beyond else gr.skip(),
            self.report: html.report(view.report, partial(translate, request)),
            **self._leaf(view, action, 0, request),
        }

    def show_example(
        self, query: DatasetQuery | None, number: float | None, borders: bool, request: gr.Request
    ) -> Any:
        """Another example, or with token borders."""
        if query is None:
            return gr.skip()
        return self._tokens(self.cache.get(query), int(number_of(number, 1)), borders, request)

    def _tokens(self, view: DatasetView, number: int, borders: bool, request: gr.Request) -> str:
        count = len(view.whole)
        if not count:
            return note("empty", translate(request, "data.no_examples"))
        i = min(max(number, 1), count) - 1
        return html.example(view, i, borders, partial(translate, request))

    def turn(self, by: int, query: DatasetQuery | None, number: float | None) -> Any:
        """The example before or after this one."""
        if query is None:
            return gr.skip()
        last = max(1, len(self.cache.get(query).whole))
        return min(max(int(number_of(number, 1)) + by, 1), last)

    def filter(self, query: DatasetQuery | None, action: str, request: gr.Request) -> Updates:
        """Only the rows of one action."""
        if query is None:
            return {self.page: gr.skip()}
        return self._leaf(self.cache.get(query), action, 0, request)

    def turn_page(
        self, by: int, query: DatasetQuery | None, action: str, page: int, request: gr.Request
    ) -> Updates:
        """The page of rows before or after this one."""
        if query is None:
            return {self.page: gr.skip()}
        return self._leaf(self.cache.get(query), action, page + by, request)

    def _leaf(self, view: DatasetView, action: str, page: int, request: gr.Request) -> Updates:
        rows = view.rows(next((a for a in html.ACTIONS if a == action), None))
        page = min(max(page, 0), html.pages(rows) - 1)
        first, last = page * html.PAGE + 1, min((page + 1) * html.PAGE, len(rows))
        place = ""
        if rows:
            place = translate(request, "data.page_of", first=first, last=last, count=len(rows))
        return {
            self.page: page,
            self.place: place,
            self.problems: html.problems(rows, page, partial(translate, request)),
        }


def _cutoff(value: Any, query: DatasetQuery) -> int:
    """A cutoff that was chosen or typed; the one there was where the box was emptied."""
    return int(number_of(value, query.cutoff, SHORTEST, LONGEST))
