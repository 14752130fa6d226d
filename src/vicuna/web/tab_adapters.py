"""The tab Adapters: what there is, which of them answer, merged, deleted."""

from __future__ import annotations

import math
import re
from functools import partial

import gradio as gr

from vicuna import untrusted
from vicuna.errors import UserError
from vicuna.web import adapters_html, chat_html
from vicuna.web.events import QUIET, Updates
from vicuna.web.html_events import address_of, clickable_html, event_payload
from vicuna.web.i18n import label, translate
from vicuna.web.render import render
from vicuna.web.state import App

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
                with gr.Row(visible=False, elem_classes="v-ask") as self.confirm:
                    self.yes = gr.Button(
                        label("adapters.delete_yes"), variant="stop", scale=0, min_width=130,
                        elem_id="adapters-yes",
                    )  # fmt: skip
                    self.no = gr.Button(
                        label("adapters.delete_no"), scale=0, min_width=100, elem_id="adapters-no"
                    )
                self.cards = clickable_html(elem_id="adapters-cards")
            with gr.Column(scale=1, min_width=290, elem_classes="v-side"):
                self.mix = gr.HTML(elem_id="adapters-mix")
                self.load = gr.Button(label("adapters.load"), size="sm", elem_id="adapters-load")
                self.name = gr.Textbox(
                    label=label("adapters.merge_name"), info=label("adapters.merge_info"),
                    visible=writable, elem_id="adapters-name",
                )  # fmt: skip
                self.combine_button = gr.Button(
                    label("adapters.merge"), size="sm", visible=writable, elem_id="adapters-merge"
                )
                self.where = gr.Textbox(
                    label=label("adapters.add"),
                    info=label("adapters.add_info"),
                    elem_id="adapters-where",
                )
                with gr.Row():
                    self.add = gr.Button(
                        label("adapters.add_button"), size="sm", elem_id="adapters-add"
                    )
                    self.refresh = gr.Button(
                        label("adapters.refresh"), size="sm", elem_id="adapters-refresh"
                    )
        self.to_delete = gr.State("")  # the adapter that may be deleted, once the visitor is sure
        self._shown = [self.cards, self.mix, self.note, self.confirm, self.to_delete]
        self._events()

    def _events(self) -> None:
        tab = self.app.tab
        # No click is lost that comes before the answer to the last one, and they are answered in
        # their order.
        self.cards.click(
            self.act, tab, self._shown, trigger_mode="multiple", concurrency_limit=1, **QUIET
        )
        self.refresh.click(self.show, tab, self._shown, **QUIET)
        self.app.opening.append((self.show, tab, self._shown))
        self.app.arriving.append((self.arrived, tab, [self.cards, self.mix]))
        self.yes.click(self.delete, [tab, self.to_delete], self._shown, **QUIET)
        self.no.click(self.show, tab, self._shown, **QUIET)
        self.load.click(self.load_mix, tab, self._shown, show_progress_on=self.mix)
        self.combine_button.click(
            self.combine, [tab, self.name], self._shown, show_progress_on=self.mix
        )
        gr.on(
            [self.add.click, self.where.submit], self.add_adapter, [tab, self.where], self._shown,
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
        tr, session = partial(translate, request), self.app.sessions.get(tab)
        writable = not self.app.settings.read_only
        found = self.app.registry.adapters()
        who = self.app.registry.describe(session.mix) or tr("adapters.mix_base")
        return {
            self.cards: adapters_html.cards(found, session.mix, writable, tr),
            self.mix: render("adapters.mix", title=tr("adapters.mix"), who=who), self.note: note,
            self.confirm: gr.update(visible=False), self.to_delete: "",
        }  # fmt: skip

    def act(self, tab: str, request: gr.Request, event: gr.EventData) -> Updates:
        """A card's checkbox, its strength, or its button to delete."""
        tr, found = partial(translate, request), event_payload(event)
        session = self.app.sessions.get(tab)
        try:
            card = self.app.registry.get(found.get("of", ""))
        except UserError as e:
            return self._now(tab, request, chat_html.error_note(e, tr))
        act = found.get("act")
        if card.problem and act == "use":
            return self._now(tab, request, chat_html.problem(tr("adapters.unreadable")))
        if act == "delete" and not self.app.settings.read_only:
            sure = tr("adapters.delete_sure", name=card.name, path=card.path)
            return {
                **self._now(tab, request, chat_html.problem(sure)),
                self.confirm: gr.update(visible=True), self.to_delete: card.path,
            }  # fmt: skip
        if act == "use":
            session.mix.pop(card.path, None)
            if found.get("value") == "true":
                session.mix[card.path] = 1.0
        elif act == "strength" and card.path in session.mix:
            session.mix[card.path] = _strength(found.get("value", ""))
        return self._now(tab, request)

    async def load_mix(self, tab: str, request: gr.Request) -> Updates:
        """Load the mix now, so that what does not fit is said at once."""
        session = self.app.sessions.get(tab)
        mix = dict(session.mix)
        try:
            worker = self.app.worker
            await worker.settled(worker.choose(session.name, mix, address_of(request)))
        except UserError as e:
            return self._now(tab, request, chat_html.error_note(e, partial(translate, request)))
        who = self.app.registry.describe(mix) or translate(request, "adapters.mix_base")
        return self._good(tab, request, "adapters.loaded", names=who)

    def _good(self, tab: str, request: gr.Request, key: str, **fields: str) -> Updates:
        text = translate(request, key, **fields)
        return self._now(tab, request, render("adapters.good", text=text))

    def combine(self, tab: str, name: str, request: gr.Request) -> Updates:
        """Merge the mix to a new adapter in the first folder."""
        from vicuna.model.adapter import read_adapter
        from vicuna.model.lora_delta import save_weighted_sum

        session = self.app.sessions.get(tab)
        name = (name or "").strip()
        try:
            self.app.may_write()
            if not _NAME.fullmatch(name):
                raise UserError(translate(request, "adapters.bad_name"))
            parts = {path: (read_adapter(path), w) for path, w in session.mix.items()}
            save_weighted_sum(parts, self.app.adapter_folders[0] / name)
        except UserError as e:
            return self._now(tab, request, chat_html.error_note(e, partial(translate, request)))
        return self._good(tab, request, "adapters.merged", name=name)

    def add_adapter(self, tab: str, where: str, request: gr.Request) -> Updates:
        """Add an adapter by path or hub id."""
        where = (where or "").strip()
        try:
            if not _HUB.fullmatch(where) or self.app.exists(where):
                folder = self.app.inside(where)
                untrusted.check_links(folder, self.app.adapter_folders + self.app.data_folders)
                where = str(folder)
            else:
                self.app.may_write()  # a hub id is fetched
            path = self.app.registry.add(where)
        except UserError as e:
            return self._now(tab, request, chat_html.error_note(e, partial(translate, request)))
        return self._good(tab, request, "adapters.added", name=self.app.registry.get(path).name)

    def delete(self, tab: str, path: str, request: gr.Request) -> Updates:
        """Delete an adapter, now that the visitor is sure."""
        try:
            self.app.may_write()
            card = self.app.registry.get(path)
            self.app.registry.delete(path)
        except UserError as e:
            return self._now(tab, request, chat_html.error_note(e, partial(translate, request)))
        self.app.sessions.get(tab).mix.pop(path, None)
        return self._good(tab, request, "adapters.deleted", name=card.name)


def _strength(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return 1.0
    return min(2.0, max(-1.0, value)) if math.isfinite(value) else 1.0
