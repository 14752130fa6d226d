"""Conversations as files: saved where the server is, handed out to the browser, taken from it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from vicuna.errors import UserError
from vicuna.web import chat_html
from vicuna.web.events import QUIET
from vicuna.web.i18n import label, translate
from vicuna.web.render import toast

if TYPE_CHECKING:
    from vicuna.web.tab_chat import ChatTab

LONGEST = 4_000_000  # characters of a conversation that is loaded


class ChatFiles:
    """The components that save and load, and what they do with the conversation of a `ChatTab`."""

    def __init__(self, chat: ChatTab) -> None:
        self._chat = chat
        self.save = gr.Button(
            label("chat.save"),
            size="sm",
            visible=not chat.app.settings.read_only,
            elem_id="chat-save",
        )
        self.download = gr.Button(label("chat.download"), size="sm", elem_id="chat-download")
        self.export = gr.Textbox(visible="hidden", show_label=False)
        self.load = gr.UploadButton(
            label("chat.load"), file_types=[".jsonl", ".json"], size="sm", elem_id="chat-load",
            visible=not chat.app.settings.read_only,
        )  # fmt: skip

    def events(self) -> None:
        """Say what the buttons do, now that the whole tab is there."""
        inputs, shown = self._chat.inputs, [*self._chat.shown, self._chat.system]
        self.save.click(self.save_conversation, inputs, None, **QUIET)
        self.download.click(self.download_conversation, inputs, self.export, **QUIET).then(
            None, self.export, None, js="(text) => vicunaDownload(text)"
        )
        self.load.upload(self.load_conversation, [self.load, *inputs], shown, **QUIET)

    def save_conversation(self, request: gr.Request, *values: Any) -> None:
        """Save the conversation on the server, in the data folder."""
        tr, app = partial(translate, request), self._chat.app
        session, _, _ = self._chat.asked(values)
        if not session.notes:
            gr.Warning(tr("chat.nothing"))
            return
        try:
            app.may_write()
            folder = app.data_folders[0]
            folder.mkdir(parents=True, exist_ok=True)
            session.answered().save(folder / "conversations.jsonl")
        except UserError as e:
            gr.Warning(toast(e, tr))
            return
        gr.Info(tr("chat.saved", path="conversations.jsonl"))

    def download_conversation(self, request: gr.Request, *values: Any) -> str:
        """The conversation as a line of JSONL, which the browser keeps as a file."""
        session, _, _ = self._chat.asked(values)
        if not session.notes:
            gr.Warning(translate(request, "chat.nothing"))
            return ""
        return json.dumps({"messages": session.answered().messages()}, ensure_ascii=False) + "\n"

    def load_conversation(self, request: gr.Request, file: str, *values: Any) -> dict[Any, Any]:
        """Go on with a conversation from a file: its first line."""
        tr, chat = partial(translate, request), self._chat
        session, ask, _ = chat.asked(values)
        try:
            session.load(_first_line(Path(file)))
        except UserError as e:
            return {chat.note: chat_html.error_note(e, tr)}
        finally:
            Path(file).unlink(missing_ok=True)
        gr.Info(tr("chat.loaded", number=len(session.notes)))
        return {**chat.replaced(session, ask, tr), chat.system: session.chat.system}


def _first_line(file: Path) -> str:
    """The first line that is not empty. Raises: UserError where it is no text, or too long."""
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for _ in range(100):
                line = lines.readline(LONGEST + 1)
                if len(line) > LONGEST:
                    raise UserError(
                        "a conversation may have {longest} characters",
                        longest=LONGEST,
                        where="conversation",
                    )
                if line.strip() or not line:
                    return line.strip()
    except ValueError:
        raise UserError("this file is not text in UTF-8", where="conversation") from None
    return ""
