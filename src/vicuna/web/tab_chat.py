"""The tab Chat: a conversation that streams, with its beams, settings, and files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Any

import gradio as gr

from vicuna.data.conversation import Turn
from vicuna.errors import UserError
from vicuna.generate.chat import DENSE, Chat, check_length
from vicuna.generate.settings import Settings
from vicuna.generate.thoughts import Parts, split
from vicuna.serve.queue import Job
from vicuna.serve.worker import GenerateRequest, Queued, Snapshot
from vicuna.terminal import say_traceback
from vicuna.web import chat_html, files, markdown
from vicuna.web.chat_files import ChatFiles
from vicuna.web.controls import Controls
from vicuna.web.events import QUIET, Updates
from vicuna.web.html_events import address_of, clickable_html, event_payload, number
from vicuna.web.i18n import label, translate
from vicuna.web.number_input import number as number_of
from vicuna.web.probabilities import ShownToken, shown_tokens, thought_tokens
from vicuna.web.render import Translate
from vicuna.web.sessions import Session, rate
from vicuna.web.state import App

STRONGEST = 2.0
VIEWS = ("columns", "rows", "hidden")


def build(app: App) -> None:
    """Add the tab's components."""
    ChatTab(app)


class ChatTab:
    """The components of the tab, and what they do. What was said is in the tab's `Session`."""

    def __init__(self, app: App) -> None:
        self.app = app
        with gr.Row(elem_classes="v-split"):
            with gr.Column(scale=3, min_width=320, elem_classes="v-main"):
                self._conversation()
            with gr.Column(scale=1, min_width=290, elem_id="chat-side", elem_classes="v-side"):
                self._side()
        self.inputs = [
            app.tab, self.adapters, self.strength, self.system, self.template, self.memory,
            self.view, *self.controls.values,
        ]  # fmt: skip
        self.shown = [
            self.box, self.history, self.live, self.send, self.stop, self.gauge, self.note,
        ]  # fmt: skip
        app.kept += [
            self.strength, self.template, self.memory, self.view, *self.controls.kept,
        ]  # fmt: skip
        app.of_session.append(self.system)
        self._events()

    # What is there.

    def _conversation(self) -> None:
        with gr.Column(elem_id="thread", elem_classes="v-thread"):
            self.history = clickable_html(elem_id="chat-history")
            self.live = gr.HTML(elem_id="chat-live")
        self.note = clickable_html(elem_id="chat-note")
        with gr.Row(elem_classes="v-ask"):
            self.box = gr.Textbox(
                placeholder=label("chat.ask"), show_label=False, container=False, lines=1,
                max_lines=8, max_length=DENSE * self.app.worker.context, scale=6, min_width=160,
                elem_id="chat-box", autofocus=True,
            )  # fmt: skip
            self.send = gr.Button(
                label("chat.send"), variant="primary", scale=0, min_width=86, elem_id="chat-send"
            )
            self.stop = gr.Button(
                label("chat.stop"), scale=0, min_width=86, visible=False, elem_id="chat-stop"
            )
        with gr.Row(elem_classes="v-under"):
            self.gauge = gr.HTML(elem_id="chat-gauge", elem_classes="v-grow")
            self.view = gr.Radio(
                [(label(f"chat.beams_{v}"), v) for v in VIEWS], value="columns",
                label=label("chat.beams"), elem_id="chat-view", elem_classes="v-pills v-inline",
                scale=0, min_width=230, visible=False,
            )  # fmt: skip
            self.clear = gr.Button(
                label("chat.clear"), size="sm", scale=0, min_width=120, elem_id="chat-clear"
            )

    def _side(self) -> None:
        self.adapters = gr.Dropdown(
            list(self.app.registry.choices()), multiselect=True, label=label("chat.adapters"),
            info=label("chat.adapters_info"), elem_id="chat-adapters",
        )  # fmt: skip
        self.strength = gr.Slider(
            0, STRONGEST, 1, step=0.05, label=label("chat.strength"),
            info=label("chat.strength_info"), elem_id="chat-strength", visible=False,
        )  # fmt: skip
        self.controls = Controls("chat", several=False)
        with gr.Accordion(label("chat.prompt"), open=False, elem_id="chat-prompt"):
            self.system = gr.Textbox(
                lines=2, max_lines=8, max_length=DENSE * self.app.worker.context,
                label=label("chat.system"), info=label("chat.system_info"),
                elem_id="chat-system",
            )  # fmt: skip
            self.template = gr.Dropdown(
                [(label("chat.template_auto"), ""), *files.templates()[1:]], value="",
                label=label("chat.template"), info=label("chat.template_info"),
                elem_id="chat-template",
            )  # fmt: skip
            context = self.app.worker.context
            self.memory = gr.Slider(
                min(128, context), context, context, step=1, label=label("chat.memory"),
                info=label("chat.memory_info"), elem_id="chat-memory",
            )  # fmt: skip
        with gr.Accordion(label("chat.keep"), open=False, elem_id="chat-keep"):
            self.files = ChatFiles(self)

    # What happens.

    def _events(self) -> None:
        gr.on(
            [self.box.submit, self.send.click], self.answer, [self.box, *self.inputs],
            self.shown, show_progress="hidden", api_name="chat",
        )  # fmt: skip
        # Multiple: a click that comes before the answer to the last one is not lost.
        self.history.click(self.act, self.inputs, self.shown, trigger_mode="multiple", **QUIET)
        self.note.click(self.act, self.inputs, self.shown, trigger_mode="multiple", **QUIET)
        self.stop.click(self.end, self.app.tab, None, **QUIET)
        self.clear.click(self.forget, self.inputs, self.shown, **QUIET)
        counted = [self.memory.release, self.system.blur, self.template.input]
        latest: dict[str, Any] = {"trigger_mode": "always_last", **QUIET}
        gr.on(counted, self.count, self.inputs, self.gauge, **latest)
        self.controls.mode.change(
            lambda mode: gr.update(visible="beam" in mode), self.controls.mode, self.view, **QUIET
        )
        self.adapters.input(self.mix, [self.app.tab, self.adapters], self.strength, **latest)
        self.files.events()
        self.app.opening.append(
            (self.opened, self.inputs, [self.gauge, self.adapters, self.strength])
        )
        self.app.arriving.append((self.arrived, None, self.adapters))
        self.app.loading.append(
            (self.come_back, self.inputs, [*self.shown, self.system, self.app.tab])
        )

    def asked(
        self, values: tuple[Any, ...], strict: bool = False
    ) -> tuple[Session, GenerateRequest, str]:
        """(session, what is asked but for its turns, view), from the values of `inputs`; a system
        prompt of None leaves it as it was.

        Args:
            strict: settings that are wrong raise; else the defaults stand in for them.

        Raises: UserError, SettingsError.
        """
        tab, adapters, strength, system, template, memory, view, *rest = values
        session = self.app.sessions.get(tab)
        if system is not None:
            session.chat.system = str(system).strip()
        known = self.app.registry.paths()
        by = number_of(strength, 1.0, 0.0, STRONGEST)
        mix = {a: session.mix.get(a, 1.0) * by for a in adapters or [] if a in known}
        template = template if template in ("", *files.templates()) else ""
        try:
            settings = self.controls.settings(rest)
        except UserError:
            if strict:
                raise
            settings = Settings()
        view = view if view in VIEWS else "columns"
        return (
            session,
            GenerateRequest((), settings, mix, template, int(number_of(memory, 0.0, 0.0))),
            view,
        )

    async def answer(
        self, request: gr.Request, question: str, *values: Any
    ) -> AsyncIterator[Updates]:
        """Answer a question, showing how the answer grows."""
        if not isinstance(question, str) or not question.strip():
            yield {self.box: ""}
            return
        async for update in self._answer(question.strip(), values, request):
            yield update

    async def _answer(
        self, question: str, values: tuple[Any, ...], request: gr.Request, cut: int | None = None
    ) -> AsyncIterator[Updates]:
        """Answer a question; `cut` is the one that it replaces, with all behind it."""
        tr = partial(translate, request)
        try:
            session, ask, view = await asyncio.to_thread(self.asked, values, True)
            who = await asyncio.to_thread(self._who, ask, tr)
            if session.busy:
                raise UserError(tr("chat.busy"))
            if cut is not None:
                question = session.cut(cut)
            prompt = Chat(session.chat.system).ask(question)
            check_length(prompt, self.app.worker.context)
            self._begin(session, replace(ask, turns=session.begin(question)), who, request)
        except UserError as e:
            yield {self.note: chat_html.error_note(e, tr)}
            return
        yield {self.box: "", self.note: ""}
        async for update in self._follow(session, ask, view, request):
            yield update

    def _begin(self, session: Session, ask: GenerateRequest, who: str, request: gr.Request) -> None:
        """Queue a question. Raises: UserError where too many wait; it is forgotten then."""
        request_id = session.request_id
        try:
            # Kept where it ends, whether or not somebody still looks.
            session.job = self.app.worker.submit(
                session.name, ask,
                lambda job: session.end(request_id, *_kept(job, who), *self._tokens(job)),
                address_of(request),
            )  # fmt: skip
        except UserError:
            session.end(request_id, Parts(), {})
            raise

    async def _follow(
        self, session: Session, ask: GenerateRequest, view: str, request: gr.Request
    ) -> AsyncIterator[Updates]:
        """Show how what is being computed for a session goes, to its end."""
        tr, job = partial(translate, request), session.job
        heard = partial(self.app.listened, request.session_hash)
        assert job is not None
        draw = markdown.Growing()
        question = session.chat.turns[-1].text if session.open_question else ""
        yield {
            self.live: chat_html.waiting(0, tr), self.history: self._history(session, tr),
            **self._running(True),
        }  # fmt: skip
        try:
            async for now in self.app.worker.follow(job, heard):
                if session.job is not job:
                    break
                if isinstance(now, Queued):
                    yield {self.live: chat_html.waiting(now.position, tr)}
                elif now.finished is None:
                    yield {self.live: chat_html.growing(now, view, tr, draw)}
            silent = _silent(job)
            problem = chat_html.problem(tr("chat.silent")) if silent else ""
            if job.cancelled.is_set():
                problem = ""
        except Exception as e:
            silent, problem = _silent(job), self._problem(e, tr)
        if session.job is not job:  # the conversation was replaced by another meanwhile
            # Gradio sends the last update twice: it must not be a snapshot of the old answer.
            yield self._last() if session.busy else {self.live: "", **self._running(False)}
            return
        yield {
            self.box: question if silent else gr.skip(), self.live: "", self.note: problem,
            self.history: self._history(session, tr), **self._running(False),
            self.gauge: await asyncio.to_thread(self._gauge, session, ask, tr),
        }  # fmt: skip

    def _tokens(self, job: Job) -> tuple[list[ShownToken], int]:
        """(how likely each token of an answer was, where that was asked for; how many of them are
        the thought's)."""
        snapshot = job.latest
        if not isinstance(snapshot, Snapshot) or snapshot.finished is None:
            return [], 0
        tokens = shown_tokens(
            snapshot.finished.answers[0], self.app.worker.loaded.renderer.tokenizer
        )
        return tokens, thought_tokens(tokens, snapshot.parts())

    def _who(self, ask: GenerateRequest, tr: Translate) -> str:
        """The adapters that answered, in words."""
        return self.app.registry.describe(ask.mix) or tr("chat.base")

    def _problem(self, error: Exception, tr: Translate) -> str:
        if isinstance(error, UserError):
            return chat_html.error_note(error, tr)
        say_traceback(error)
        return chat_html.problem(tr("chat.failed", words=f"{type(error).__name__}: {error}"))

    def _history(self, session: Session, tr: Translate) -> str:
        return chat_html.history(session, tr, not self.app.settings.read_only)

    def _running(self, on: bool) -> Updates:
        return {self.send: gr.update(visible=not on), self.stop: gr.update(visible=on)}

    def _gauge(self, session: Session, ask: GenerateRequest, tr: Translate) -> str:
        """The room that the conversation and its longest next answer take. In a thread: a template
        is rendered, and may take its time."""
        limit = min(ask.limit or self.app.worker.context, self.app.worker.context)
        turns = session.chat.all_turns()
        if not session.chat.turns:
            return chat_html.gauge(0, limit, 0, tr)
        if not session.open_question:
            # The answers so far are in the next prompt: an empty question stands for it.
            turns.append(Turn("user", ""))
        try:
            fitted = self.app.worker.fitted(replace(ask, turns=turns))
        except UserError:  # which is told to the one who asks
            return chat_html.gauge(0, limit, 0, tr)
        return chat_html.gauge(len(fitted.prompt_ids), limit, len(fitted.dropped), tr)

    async def act(
        self, request: gr.Request, event: gr.EventData, *values: Any
    ) -> AsyncIterator[Updates]:
        """What a button beside a turn is for."""
        found, tr = event_payload(event), partial(translate, request)
        try:
            session, ask, _ = await asyncio.to_thread(self.asked, values)
            if session.busy:
                raise UserError(tr("chat.busy"))
            act, i = found.get("act"), number(found)
            if act == "again":
                async for update in self._answer("", values, request, cut=i):
                    yield update
                return
            changed = self._do(act, i, session, tr)
            yield {**changed, self.gauge: await asyncio.to_thread(self._gauge, session, ask, tr)}
            yield self._last()
        except UserError as e:
            yield {self.note: chat_html.error_note(e, tr)}

    def _do(self, act: str | None, i: int, session: Session, tr: Translate) -> Updates:
        """Change the conversation. Raises: UserError where that is not possible."""
        changed: Updates = {self.note: ""}
        if act == "edit":
            changed[self.box] = session.question(i)
            session.editing = i
            changed[self.note] = chat_html.editing(i, tr)
        elif act == "leave":
            changed[self.box] = "" if session.editing is not None else gr.skip()
            session.editing = None
        elif act == "undo":
            changed[self.box] = session.cut(i)
        elif act in ("up", "down"):
            self.app.may_write()
            path = self.app.data_folders[0] / f"rated-{act}.jsonl"
            rate(session, i, act, path)  # type: ignore[arg-type]
            if session.notes[i].rating:
                gr.Info(tr("chat.rated", path=path.name), duration=3)
        changed[self.history] = self._history(session, tr)
        return changed

    def end(self, tab: str) -> None:
        """Stop the answer; what was said stays."""
        self.app.sessions.get(tab).stop()

    def forget(self, request: gr.Request, *values: Any) -> Updates:
        """Begin a new conversation."""
        tr = partial(translate, request)
        session, ask, _ = self.asked(values)
        session.clear()
        return {**self.replaced(session, ask, tr), self.box: ""}

    def replaced(self, session: Session, ask: GenerateRequest, tr: Translate) -> Updates:
        """The page where another conversation took the place of what there was."""
        return {
            self.history: self._history(session, tr), self.note: "", self.live: "",
            self.gauge: self._gauge(session, ask, tr), **self._running(False),
        }  # fmt: skip

    def count(self, request: gr.Request, *values: Any) -> str:
        """The gauge, where something changed that it depends on."""
        session, ask, _ = self.asked(values)
        return self._gauge(session, ask, partial(translate, request))

    def mix(self, tab: str, adapters: list[str]) -> Any:
        """Adapters were chosen: each with the weight it had."""
        session = self.app.sessions.get(tab)
        known = self.app.registry.paths()
        session.mix = {a: session.mix.get(a, 1.0) for a in adapters if a in known}
        return gr.update(visible=bool(adapters))

    def opened(self, request: gr.Request, *values: Any) -> list[Any]:
        """The tab is opened: the adapters there are, and those that were chosen elsewhere."""
        tab, adapters, strength, _, *rest = values
        session, ask, _ = self.asked((tab, adapters, strength, None, *rest))
        choices = self.app.registry.choices()
        known = [path for _, path in choices]
        session.mix = {a: w for a, w in session.mix.items() if a in known}
        if not session.greeted and self.app.default_adapter in known:
            session.mix = {self.app.default_adapter: 1.0}
        session.greeted = True
        chosen = list(session.mix)
        return [
            self._gauge(session, ask, partial(translate, request)),
            gr.update(choices=choices, value=chosen), gr.update(visible=bool(chosen)),
        ]  # fmt: skip

    def arrived(self) -> Any:
        """The adapters there are now; what was chosen stands."""
        return gr.update(choices=self.app.registry.choices())

    async def come_back(self, request: gr.Request, *values: Any) -> AsyncIterator[Updates]:
        """A browser comes, or comes again: its conversation, and the answer that still grows."""
        tr = partial(translate, request)
        tab, adapters, strength, _, *rest = values
        asked = (tab, adapters, strength, None, *rest)
        session, ask, view = await asyncio.to_thread(self.asked, asked)
        shown: Updates = {}
        if session.editing is not None and 0 <= session.editing < len(session.notes):
            shown = {
                self.box: session.question(session.editing),
                self.note: chat_html.editing(session.editing, tr),
            }
        yield {
            self.history: self._history(session, tr), self.system: session.chat.system,
            self.app.tab: session.name, **shown,
        }  # fmt: skip
        if session.busy:
            async for update in self._follow(session, ask, view, request):
                yield update
        else:
            yield self._last()

    def _last(self) -> Updates:
        """An update that changes nothing: gradio sends the last one twice, and what a visitor has
        typed since the first time must stay."""
        return {self.note: gr.skip()}


def _silent(job: Job) -> bool:
    """Whether nothing was said."""
    return not "".join(_kept(job, "")[0]).strip()


def _kept(job: Job, who: str) -> tuple[Parts, dict[str, Any]]:
    """(what an answer said until its end, numbers of it)."""
    snapshot = job.latest
    if not isinstance(snapshot, Snapshot):
        return Parts(), {}
    found = snapshot.finished
    if found is None:
        return split(snapshot.text, snapshot.marks), {}
    return snapshot.parts(), {
        "tokens": len(found.token_ids),
        "speed": found.tokens_per_second,
        "first": found.first_token_seconds,
        "why": found.finish_reason,
        "who": who,
    }
