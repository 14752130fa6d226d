"""The tab Instruct: one instruction, answered side by side by the base and by adapters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gradio as gr

from vicuna.data.conversation import Turn
from vicuna.errors import UserError
from vicuna.generate.chat import DENSE, check_length
from vicuna.serve.queue import Job
from vicuna.serve.worker import GenerateRequest, Queued, Snapshot
from vicuna.web import chat_html, instruct_html, markdown
from vicuna.web.controls import Controls
from vicuna.web.error_texts import localize_error
from vicuna.web.events import QUIET, Updates
from vicuna.web.html_events import address_of
from vicuna.web.i18n import label, translate
from vicuna.web.render import Translate, render
from vicuna.web.state import App

BASE = ""  # the choice that is no adapter
MOST = 6  # columns


def build(app: App) -> None:
    """Add the tab's components."""
    InstructTab(app)


@dataclass
class _Column:
    """What one adapter answers."""

    name: str
    job: Job
    now: Queued | Snapshot | str  # a text is what went wrong
    draw: markdown.Growing = field(default_factory=markdown.Growing)


class InstructTab:
    """The components of the tab, and what they do. Nothing is kept of a visitor."""

    def __init__(self, app: App) -> None:
        self.app = app
        self._jobs: dict[str, list[Job]] = {}  # by session
        with gr.Row(elem_classes="v-split"):
            with gr.Column(scale=3, min_width=320, elem_classes="v-main"):
                self._question()
                self.answers = gr.HTML(
                    render("instruct.hello", text=label("instruct.begin")),
                    elem_id="instruct-answers",
                )
            with gr.Column(scale=1, min_width=290, elem_classes="v-side"):
                self.controls = Controls("instruct", several=True)
        app.kept += self.controls.kept
        self._events()

    def _question(self) -> None:
        longest = DENSE * self.app.worker.context
        self.instruction = gr.Textbox(
            lines=2, max_lines=10, max_length=longest, label=label("instruct.instruction"),
            placeholder=label("instruct.placeholder"), elem_id="instruct-instruction",
        )  # fmt: skip
        self.material = gr.Textbox(
            lines=1, max_lines=12, max_length=longest, label=label("instruct.input"),
            info=label("instruct.input_info"), elem_id="instruct-input",
        )  # fmt: skip
        first = [self.app.default_adapter] if self.app.default_adapter else []
        self.who = gr.CheckboxGroup(
            [(label("chat.base"), BASE), *self.app.registry.choices()], value=[BASE, *first],
            label=label("instruct.who"), elem_id="instruct-who", elem_classes="v-pills",
        )  # fmt: skip
        with gr.Row(elem_classes="v-ask"):
            self.go = gr.Button(
                label("instruct.go"),
                variant="primary",
                scale=0,
                min_width=120,
                elem_id="instruct-go",
            )
            self.stop = gr.Button(
                label("chat.stop"), scale=0, min_width=90, visible=False, elem_id="instruct-stop"
            )

    def _events(self) -> None:
        inputs = [
            self.app.tab, self.instruction, self.material, self.who, *self.controls.values,
        ]  # fmt: skip
        self.go.click(
            self.answer, inputs, [self.answers, self.go, self.stop], show_progress="hidden",
            api_name="instruct",
        )  # fmt: skip
        self.stop.click(self.end, self.app.tab, None, **QUIET)
        for noted in (self.app.opening, self.app.arriving):
            noted.append((self.choices, self.who, self.who))

    def choices(self, who: list[str], request: gr.Request) -> Any:
        """The base, and the adapters there are now; who was chosen and is still there stays so.

        Without need no value is sent: it would undo a choice made since this was asked.
        """
        choices = [(translate(request, "chat.base"), BASE), *self.app.registry.choices()]
        present = [name for name in who if name in (path for _, path in choices)]
        if present == who:
            return gr.update(choices=choices)
        return gr.update(choices=choices, value=present)

    def end(self, tab: str) -> None:
        """Stop this visitor's answers; what was said stays."""
        for job in self._jobs.get(self.app.sessions.get(tab).name, []):
            job.cancel()

    async def answer(
        self, request: gr.Request, tab: str, instruction: str, material: str, who: list[str],
        *values: Any,
    ) -> AsyncIterator[Updates]:  # fmt: skip
        """Answer side by side, one column after another."""
        tr = partial(translate, request)
        try:
            name = self.app.sessions.get(tab).name
            if not str(instruction or "").strip():
                raise UserError(tr("instruct.nothing"))
            if self._jobs.get(name):
                raise UserError(tr("chat.busy"))
            turns = [Turn("user", str(instruction).strip(), str(material or "").strip())]
            check_length(turns, self.app.worker.context)
            columns = await asyncio.to_thread(self._begin, name, turns, who, values, request)
        except UserError as e:
            yield {self.answers: chat_html.error_note(e, tr)}
            return
        buttons = {self.go: gr.update(visible=False), self.stop: gr.update(visible=True)}
        yield {self.answers: _grid(columns, tr), **buttons}
        heard = partial(self.app.listened, request.session_hash)
        try:
            for column in columns:
                async for _ in self._watch(column, tr, heard):
                    yield {self.answers: _grid(columns, tr)}
        finally:
            for column in columns:
                column.job.cancel()
            self._jobs.pop(name, None)
        buttons = {self.go: gr.update(visible=True), self.stop: gr.update(visible=False)}
        yield {self.answers: _grid(columns, tr), **buttons}

    def _begin(
        self, name: str, turns: list[Turn], who: list[str], values: Any, request: gr.Request
    ) -> list[_Column]:
        """Queue a request for each column.

        Raises: UserError for settings that are wrong, or where too many wait already.
        """
        tr, address = partial(translate, request), address_of(request)
        settings = self.controls.settings(values)
        known = self.app.registry.paths()
        chosen = [a for a in who or [] if a == BASE or a in known] or [BASE]
        if len(chosen) > MOST:
            raise UserError(tr("instruct.too_many", most=MOST))
        columns: list[_Column] = []
        for adapter in chosen:
            mix = {adapter: 1.0} if adapter else {}
            try:
                job = self.app.worker.submit(
                    name, GenerateRequest(turns, settings, mix), address=address
                )
            except UserError:
                for column in columns:
                    column.job.cancel()
                raise
            title = self.app.registry.describe(mix) or tr("chat.base")
            columns.append(_Column(title, job, Queued(self.app.worker.queue.position(job))))
        self._jobs[name] = [column.job for column in columns]
        return columns

    async def _watch(
        self, column: _Column, tr: Translate, heard: Callable[[], bool]
    ) -> AsyncIterator[None]:
        """Follow a column to its end; what goes wrong is told in it, and the others go on."""
        try:
            async for now in self.app.worker.follow(column.job, heard):
                column.now = now
                yield
        except UserError as e:
            column.now = localize_error(e, tr)
        except Exception as e:
            column.now = f"{type(e).__name__}: {e}"
        if isinstance(column.now, Queued):  # it was cancelled before its turn
            column.now = Snapshot()
        yield


def _grid(columns: list[_Column], tr: Translate) -> str:
    return instruct_html.grid([(c.name, c.now, c.draw) for c in columns], tr)
