"""The tab Data: a data set's report, its bad rows, its examples token by token, its lengths.

What is computed is in `data_view.py`, what it looks like in `data_html.py`; here are the components
and what happens on their events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from vicuna.errors import UserError
from vicuna.web import data_html as html
from vicuna.web import files
from vicuna.web.data_view import Look, Looks, Wish
from vicuna.web.error_texts import in_words
from vicuna.web.i18n import say, t
from vicuna.web.number_input import number as number_of
from vicuna.web.state import App

# Those that are met; any other can be typed.
ENCODINGS = ("utf-8", "gb18030", "big5", "utf-16", "cp1252", "shift_jis", "euc-kr")
CUTOFF = 2048
SHORTEST, LONGEST = 16, 1_000_000  # cutoffs that can be chosen
ALL = "all"
Updates = dict[Any, Any]


def build(app: App) -> None:
    """Add the tab's components."""
    DataTab(app)


class DataTab:
    """The components of the tab, and what they do.

    Per visitor there is a `gr.State` with the wish; what was found is shared between all (`Looks`).
    """

    def __init__(self, app: App) -> None:
        self.app = app
        self.looks = Looks()
        self.wish = gr.State(None)
        self._choosing()
        self.status = gr.HTML(html.note("empty", t("data.empty")), elem_id="data-status")
        self.report = gr.HTML(elem_id="data-report", visible=False)
        with gr.Row(elem_classes="v-bar"):
            self.train = gr.Button(
                t("data.train"), visible=False, size="sm", scale=0, elem_id="data-train"
            )
        with gr.Tabs(
            visible=False, overflow_behavior="wrap", elem_id="data-details"
        ) as self.details:
            with gr.Tab(t("data.tab_lengths"), id="lengths"):
                self._lengths()
            with gr.Tab(t("data.tab_preview"), id="preview"):
                self._preview()
            with gr.Tab(t("data.tab_rows"), id="rows"):
                self._rows()
        self._events()

    # What is there.

    def _choosing(self) -> None:
        with gr.Row(equal_height=True):
            with gr.Column(scale=3, min_width=300):
                self.source = gr.Dropdown(
                    files.listed(self.app),
                    value=None,
                    label=t("data.choose"),
                    info=t("data.choose_help"),
                    allow_custom_value=True,
                    elem_id="data-source",
                )
                with gr.Row():
                    self.model = gr.Dropdown(
                        files.models(self.app),
                        value=files.models(self.app)[0],
                        label=t("data.model"),
                        info=t("data.model_help"),
                        allow_custom_value=True,
                        min_width=200,
                    )
                    self.template = gr.Dropdown(
                        files.templates(),
                        value="auto",
                        label=t("data.template"),
                        info=t("data.template_help"),
                        min_width=200,
                        elem_id="data-template",
                    )
                    self.encoding = gr.Dropdown(
                        [(t("data.encoding_auto"), ""), *ENCODINGS],
                        value="",
                        label=t("data.encoding"),
                        info=t("data.encoding_help"),
                        allow_custom_value=True,
                        min_width=160,
                        elem_id="data-encoding",
                    )
            with gr.Column(scale=2, min_width=260, visible=not self.app.settings.read_only):
                self.drop = gr.File(label=t("data.drop"), height=190, elem_id="data-drop")

    def _lengths(self) -> None:
        self.chart = gr.HTML(elem_id="data-lengths")
        self.cutoff = gr.Slider(
            SHORTEST,
            4096,
            CUTOFF,
            step=16,
            label=t("data.cutoff"),
            info=t("data.cutoff_help"),
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
                label=t("data.borders"), container=False, min_width=200, elem_id="data-borders"
            )
        self.tokens = gr.HTML(elem_id="data-tokens")

    def _rows(self) -> None:
        self.page = gr.State(0)
        with gr.Row(equal_height=True, elem_classes="v-bar"):
            self.action = gr.Radio(
                [(t(f"data.action_{a}"), a) for a in (ALL, *html.ACTIONS)],
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
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        tab = self.app.tab
        chosen = [
            *(tab, self.source, self.model, self.template, self.encoding),
            *(self.wish, self.borders),
        ]
        found = [
            *(self.wish, self.status, self.report, self.details, self.train),
            *(self.cutoff, self.chart, self.lost, self.example, self.count, self.tokens),
            *(self.page, self.action, self.place, self.problems),
        ]
        kept = self.drop.upload(
            self.keep, self.drop, [self.source, self.drop, self.status], **quiet
        )
        kept.success(self.look, chosen, found, **quiet)
        # What is chosen while another data set is read does not wait for it: `look` ends the other.
        gr.on(
            [self.source.input, self.model.input, self.template.input, self.encoding.input],
            self.look, chosen, found, trigger_mode="multiple", **quiet,
        )  # fmt: skip
        gr.on(
            [self.cutoff.input, self.cutoff.release],
            self.at_cutoff,
            [self.wish, self.cutoff],
            [self.chart, self.lost],
            trigger_mode="always_last",
            **quiet,
        )
        self.cutoff.release(
            self.recount,
            [tab, self.wish, self.cutoff, self.action],
            [
                *(self.wish, self.cutoff, self.report),
                *(self.page, self.place, self.problems),
            ],
            trigger_mode="always_last",
            **quiet,
        )
        shown = [self.wish, self.example, self.borders]
        gr.on(
            [self.example.change, self.borders.change], self.show_example, shown, self.tokens,
            trigger_mode="always_last", **quiet,
        )  # fmt: skip
        for button, by in ((self.example_back, -1), (self.example_next, 1)):
            button.click(partial(self.turn, by), [self.wish, self.example], self.example, **quiet)
        rows = [self.page, self.place, self.problems]
        self.action.change(self.filter, [self.wish, self.action], rows, **quiet)
        for button, by in ((self.page_back, -1), (self.page_next, 1)):
            inputs = [self.wish, self.action, self.page]
            button.click(self._leafing(by), inputs, rows, **quiet)
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
            raise gr.Error(html.toast(e, partial(say, request)), print_exception=False) from e
        return {
            self.source: gr.update(choices=files.listed(self.app), value=str(path)),
            self.drop: None,
            self.status: html.note("busy", say(request, "data.reading")),
        }

    def look(
        self,
        tab: str,
        source: str | None,
        model: str,
        template: str,
        encoding: str | None,
        before: Wish | None,
        borders: bool,
        request: gr.Request,
    ) -> Iterator[Updates]:
        """Something was chosen: read it, and show everything there is. A cutoff that was chosen
        before is kept. Ends without a word where something else was chosen meanwhile."""
        session = self.app.sessions.get(tab)
        session.looks += 1
        mine = session.looks
        if not (source or "").strip():
            yield {
                self.wish: None,
                self.status: gr.update(
                    value=html.note("empty", say(request, "data.empty")), visible=True
                ),
                self.report: gr.update(visible=False),
                self.details: gr.update(visible=False),
                self.train: gr.update(visible=False),
            }
            return
        yield self._said(html.note("busy", say(request, "data.reading")))
        try:
            wish = Wish(
                tuple(files.allowed(self.app, str(source))),
                files.allowed_model(self.app, model or ""),
                files.allowed_template(self.app, template or ""),
                before.cutoff if before else CUTOFF,
                (encoding or "").strip(),
            )
            for step in self.looks.watch(wish):
                if session.looks != mine:
                    yield {self.wish: gr.skip()}  # gradio sends the last thing twice
                    return
                if isinstance(step, Look):
                    yield self._found(step, borders, request)
                else:
                    words = say(request, "data.reading_file", what=step)
                    yield self._said(html.note("busy", words))
        except UserError as e:
            if session.looks != mine:
                yield {self.wish: gr.skip()}
                return
            yield {
                **self._said(html.note("error", in_words(str(e), partial(say, request)))),
                self.wish: None,
                self.report: gr.update(visible=False),
                self.details: gr.update(visible=False),
                self.train: gr.update(visible=False),
            }

    def _said(self, note: str) -> Updates:
        return {self.status: gr.update(value=note, visible=True)}

    def _found(self, look: Look, borders: bool, request: gr.Request) -> Updates:
        words = partial(say, request)
        some = len(look.whole) > 0
        limit = html.limit_of(look.lengths)
        status = gr.update(value=html.note("error", words("data.nothing_usable")), visible=True)
        return {
            self.wish: look.wish,
            self.status: gr.update(visible=False) if some else status,
            self.report: gr.update(value=html.report(look.report, words), visible=True),
            self.details: gr.update(visible=True, selected="lengths" if some else "rows"),
            self.train: gr.update(visible=some and not self.app.settings.read_only),
            # A cutoff beyond all examples is at the slider's end, and stays what it was.
            self.cutoff: gr.update(maximum=limit, value=min(look.wish.cutoff, limit), visible=some),
            **self._chart(look, look.wish.cutoff, request),
            self.example: gr.update(value=1, maximum=max(1, len(look.whole))),
            self.count: words("data.example_of", count=len(look.whole)),
            self.tokens: self._tokens(look, 1, borders, request),
            self.action: ALL,
            **self._leaf(look, ALL, 0, request),
        }

    def _chart(self, look: Look, cutoff: int, request: gr.Request) -> Updates:
        if not len(look.lengths):
            return {
                self.chart: html.note("empty", say(request, "data.no_examples")),
                self.lost: "",
            }
        words = partial(say, request)
        return {
            self.chart: html.lengths(look.lengths, cutoff, words),
            self.lost: html.lost(look.lengths, cutoff, words),
        }

    def at_cutoff(self, wish: Wish | None, cutoff: float | None, request: gr.Request) -> Updates:
        """The slider moves: what this cutoff would lose."""
        if wish is None:
            return {self.chart: gr.skip()}
        return self._chart(self.looks.get(wish), _cutoff(cutoff, wish), request)

    def recount(
        self, tab: str, wish: Wish | None, cutoff: float | None, action: str, request: gr.Request
    ) -> Updates:
        """A cutoff was chosen or typed: the report, as it is with it. One beyond the slider's end
        moves the end."""
        if wish is None or _cutoff(cutoff, wish) == wish.cutoff:
            return {self.page: gr.skip()}
        session = self.app.sessions.get(tab)
        looks = session.looks
        look = self.looks.get(replace(wish, cutoff=_cutoff(cutoff, wish)))
        if session.looks != looks:  # another data set was chosen meanwhile
            return {self.page: gr.skip()}
        chosen = look.wish.cutoff
        beyond = chosen > html.limit_of(look.lengths)
        return {
            self.wish: look.wish,
            # Only then: somebody may move the slider meanwhile.
            self.cutoff: gr.update(maximum=chosen, value=chosen) if beyond else gr.skip(),
            self.report: html.report(look.report, partial(say, request)),
            **self._leaf(look, action, 0, request),
        }

    def show_example(
        self, wish: Wish | None, number: float | None, borders: bool, request: gr.Request
    ) -> Any:
        """Another example, or with token borders."""
        if wish is None:
            return gr.skip()
        return self._tokens(self.looks.get(wish), int(number_of(number, 1)), borders, request)

    def _tokens(self, look: Look, number: int, borders: bool, request: gr.Request) -> str:
        count = len(look.whole)
        if not count:
            return html.note("empty", say(request, "data.no_examples"))
        i = min(max(number, 1), count) - 1
        return html.example(look, i, borders, partial(say, request))

    def turn(self, by: int, wish: Wish | None, number: float | None) -> Any:
        """The example before or after this one."""
        if wish is None:
            return gr.skip()
        last = max(1, len(self.looks.get(wish).whole))
        return min(max(int(number_of(number, 1)) + by, 1), last)

    def filter(self, wish: Wish | None, action: str, request: gr.Request) -> Updates:
        """Only the rows of one action."""
        if wish is None:
            return {self.page: gr.skip()}
        return self._leaf(self.looks.get(wish), action, 0, request)

    def _leafing(self, by: int) -> Callable[..., Updates]:
        """The page of rows before or after this one."""

        # A function of its own: gradio sees no annotations, so no request, behind a `partial`.
        def leaf(wish: Wish | None, action: str, page: int, request: gr.Request) -> Updates:
            if wish is None:
                return {self.page: gr.skip()}
            return self._leaf(self.looks.get(wish), action, page + by, request)

        return leaf

    def _leaf(self, look: Look, action: str, page: int, request: gr.Request) -> Updates:
        rows = look.rows(next((a for a in html.ACTIONS if a == action), None))
        page = min(max(page, 0), html.pages(rows) - 1)
        first, last = page * html.PAGE + 1, min((page + 1) * html.PAGE, len(rows))
        place = ""
        if rows:
            place = say(request, "data.page_of", first=first, last=last, count=len(rows))
        return {
            self.page: page,
            self.place: place,
            self.problems: html.problems(rows, page, partial(say, request)),
        }


def _cutoff(value: Any, wish: Wish) -> int:
    """A cutoff that was chosen or typed; the one there was where the box was emptied."""
    return int(number_of(value, wish.cutoff, SHORTEST, LONGEST))
