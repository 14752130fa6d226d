"""The tab Adapters: what there is, which of them answer, merged, deleted."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import gradio as gr

from vicuna import untrusted
from vicuna.errors import UserError
from vicuna.web import adapters_html, chat_html, files
from vicuna.web.html_events import acting, address_of, told
from vicuna.web.i18n import say, t
from vicuna.web.state import App

Updates = dict[Any, Any]
_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
_NAME = re.compile(r"[\w-][\w.-]{0,63}")
_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def build(app: App) -> None:
    """Add the tab's components."""
    AdaptersTab(app)


class AdaptersTab:
    """The components of the tab, and what they do. Which adapters answer is in the `Session`."""

    def __init__(self, app: App) -> None:
        self.app = app
        writable = not app.settings.read_only
        with gr.Row(elem_classes="v-split"):
            with gr.Column(scale=3, min_width=320, elem_classes="v-main"):
                self.note = gr.HTML(elem_id="adapters-note")
                with gr.Row(visible=False, elem_classes="v-ask") as self.sure:
                    self.yes = gr.Button(
                        t("adapters.delete_yes"), variant="stop", scale=0, min_width=130,
                        elem_id="adapters-yes",
                    )  # fmt: skip
                    self.no = gr.Button(
                        t("adapters.delete_no"), scale=0, min_width=100, elem_id="adapters-no"
                    )
                self.cards = acting(elem_id="adapters-cards")
            with gr.Column(scale=1, min_width=290, elem_classes="v-side"):
                self.mix = gr.HTML(elem_id="adapters-mix")
                self.load = gr.Button(t("adapters.load"), size="sm", elem_id="adapters-load")
                self.name = gr.Textbox(
                    label=t("adapters.merge_name"), info=t("adapters.merge_info"), visible=writable,
                    elem_id="adapters-name",
                )  # fmt: skip
                self.merge = gr.Button(
                    t("adapters.merge"), size="sm", visible=writable, elem_id="adapters-merge"
                )
                self.where = gr.Textbox(
                    label=t("adapters.add"), info=t("adapters.add_info"), elem_id="adapters-where"
                )
                with gr.Row():
                    self.add = gr.Button(
                        t("adapters.add_button"), size="sm", elem_id="adapters-add"
                    )
                    self.refresh = gr.Button(
                        t("adapters.refresh"), size="sm", elem_id="adapters-refresh"
                    )
        self.asked = gr.State("")  # the adapter that may be deleted, once the visitor is sure
        self._shown = [self.cards, self.mix, self.note, self.sure, self.asked]
        self._events()

    def _events(self) -> None:
        tab = self.app.tab
        # No click is lost that comes before the answer to the last one, and they are answered in
        # their order.
        self.cards.click(
            self.act, tab, self._shown, trigger_mode="multiple", concurrency_limit=1, **_QUIET
        )
        self.refresh.click(self.show, tab, self._shown, **_QUIET)
        self.app.opening.append((self.show, tab, self._shown))
        self.app.arriving.append((self.arrived, tab, [self.cards, self.mix]))
        self.yes.click(self.delete, [tab, self.asked], self._shown, **_QUIET)
        self.no.click(self.show, tab, self._shown, **_QUIET)
        self.load.click(self.try_it, tab, self._shown, show_progress_on=self.mix)
        self.merge.click(self.join, [tab, self.name], self._shown, show_progress_on=self.mix)
        gr.on(
            [self.add.click, self.where.submit], self.put, [tab, self.where], self._shown,
            show_progress_on=self.where, api_visibility="private",
        )  # fmt: skip

    def show(self, tab: str, request: gr.Request) -> Updates:
        """Everything as it is now."""
        return self._now(tab, request)

    def arrived(self, tab: str, request: gr.Request) -> Updates:
        """The cards there are now; what is being asked or told stays."""
        now = self._now(tab, request)
        return {part: now[part] for part in (self.cards, self.mix)}

    def _now(self, tab: str, request: gr.Request, note: str = "") -> Updates:
        words, session = partial(say, request), self.app.sessions.get(tab)
        writable = not self.app.settings.read_only
        found = self.app.registry.adapters()
        who = self.app.registry.describe(session.mix) or words("adapters.mix_base")
        mix = f"<h4>{words('adapters.mix')}</h4><p>{chat_html.escape(who)}</p>"
        return {
            self.cards: adapters_html.cards(found, session.mix, writable, words),
            self.mix: f'<div class="v-mix">{mix}</div>', self.note: note,
            self.sure: gr.update(visible=False), self.asked: "",
        }  # fmt: skip

    def act(self, tab: str, request: gr.Request, event: gr.EventData) -> Updates:
        """A card's checkbox, its strength, or its button to delete."""
        words, found = partial(say, request), told(event)
        session = self.app.sessions.get(tab)
        try:
            card = self.app.registry.get(found.get("of", ""))
        except UserError as e:
            return self._now(tab, request, chat_html.mistake(e, words))
        act = found.get("act")
        if card.problem and act == "use":
            return self._now(tab, request, chat_html.problem(words("adapters.unreadable")))
        if act == "delete" and not self.app.settings.read_only:
            sure = words("adapters.delete_sure", name=card.name, path=card.path)
            return {
                **self._now(tab, request, chat_html.problem(sure)),
                self.sure: gr.update(visible=True), self.asked: card.path,
            }  # fmt: skip
        if act == "use":
            session.mix.pop(card.path, None)
            if found.get("value") == "true":
                session.mix[card.path] = 1.0
        elif act == "strength" and card.path in session.mix:
            session.mix[card.path] = _strength(found.get("value", ""))
        return self._now(tab, request)

    async def try_it(self, tab: str, request: gr.Request) -> Updates:
        """Load the mix now, so that what does not fit is said at once."""
        session = self.app.sessions.get(tab)
        mix = dict(session.mix)
        try:
            worker = self.app.worker
            await worker.settled(worker.choose(session.name, mix, address_of(request)))
        except UserError as e:
            return self._now(tab, request, chat_html.mistake(e, partial(say, request)))
        who = self.app.registry.describe(mix) or say(request, "adapters.mix_base")
        return self._good(tab, request, "adapters.loaded", names=who)

    def _good(self, tab: str, request: gr.Request, key: str, **fields: str) -> Updates:
        text = chat_html.escape(say(request, key, **fields))
        return self._now(tab, request, f'<div class="v-note good"><p>{text}</p></div>')

    def join(self, tab: str, name: str, request: gr.Request) -> Updates:
        """Merge the mix to a new adapter in the first folder."""
        from vicuna.model.adapter import read_adapter
        from vicuna.model.lora_delta import save_weighted_sum

        session = self.app.sessions.get(tab)
        name = (name or "").strip()
        try:
            self.app.may_write()
            if not _NAME.fullmatch(name):
                raise UserError(say(request, "adapters.bad_name"))
            parts = {path: (read_adapter(path), w) for path, w in session.mix.items()}
            save_weighted_sum(parts, self.app.adapter_folders[0] / name)
        except UserError as e:
            return self._now(tab, request, chat_html.mistake(e, partial(say, request)))
        return self._good(tab, request, "adapters.merged", name=name)

    def put(self, tab: str, where: str, request: gr.Request) -> Updates:
        """Add an adapter by path or hub id."""
        where = (where or "").strip()
        try:
            if not _HUB.fullmatch(where) or self.app.exists(where):
                folder = self.app.inside(where)
                untrusted.check_links(folder, self.app.adapter_folders + self.app.data_folders)
                where = str(folder)
            else:
                files.may_fetch(self.app, where)
            path = self.app.registry.add(where)
        except UserError as e:
            return self._now(tab, request, chat_html.mistake(e, partial(say, request)))
        return self._good(tab, request, "adapters.added", name=self.app.registry.get(path).name)

    def delete(self, tab: str, path: str, request: gr.Request) -> Updates:
        """Delete an adapter, now that the visitor is sure."""
        try:
            self.app.may_write()
            card = self.app.registry.get(path)
            self.app.registry.delete(path)
        except UserError as e:
            return self._now(tab, request, chat_html.mistake(e, partial(say, request)))
        self.app.sessions.get(tab).mix.pop(path, None)
        return self._good(tab, request, "adapters.deleted", name=card.name)


def _strength(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return 1.0
    return min(2.0, max(-1.0, value)) if math.isfinite(value) else 1.0
