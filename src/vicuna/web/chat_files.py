"""Conversations as files: saved where the server is, handed out to the browser, taken from it."""

from __future__ import annotations

import json
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from vicuna.errors import UserError
from vicuna.web import chat_html
from vicuna.web.error_texts import in_words
from vicuna.web.i18n import say, t

if TYPE_CHECKING:
    from vicuna.web.tab_chat import ChatTab

LONGEST = 4_000_000  # characters of a conversation that is loaded
_DOWNLOAD = """(text) => {
  if (!text) return;
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], {type: 'application/jsonl'}));
  link.download = 'conversation.jsonl';
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}"""


class ChatFiles:
    """The components that save and load, and what they do with the conversation of a `ChatTab`."""

    def __init__(self, chat: ChatTab) -> None:
        self._chat = chat
        self.save = gr.Button(
            t("chat.save"), size="sm", visible=not chat.app.settings.read_only, elem_id="chat-save"
        )
        self.download = gr.Button(t("chat.download"), size="sm", elem_id="chat-download")
        self.export = gr.Textbox(visible="hidden", show_label=False)
        self.load = gr.UploadButton(
            t("chat.load"), file_types=[".jsonl", ".json"], size="sm", elem_id="chat-load",
            visible=not chat.app.settings.read_only,
        )  # fmt: skip

    def events(self) -> None:
        """Say what the buttons do, now that the whole tab is there."""
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        inputs, shown = self._chat.inputs, [*self._chat.shown, self._chat.system]
        self.save.click(self.keep, inputs, None, **quiet)
        self.download.click(self.hand_out, inputs, self.export, **quiet).then(
            None, self.export, None, js=_DOWNLOAD
        )
        self.load.upload(self.take, [self.load, *inputs], shown, **quiet)

    def keep(self, request: gr.Request, *values: Any) -> None:
        """Save the conversation on the server, in the data folder."""
        words, app = partial(say, request), self._chat.app
        session, _, _ = self._chat.asked(values)
        if not session.notes:
            gr.Warning(words("chat.nothing"))
            return
        try:
            app.may_write()
            folder = app.data_folders[0]
            folder.mkdir(parents=True, exist_ok=True)
            session.answered().save(folder / "conversations.jsonl")
        except UserError as e:
            gr.Warning(escape(in_words(str(e), words)))
            return
        gr.Info(words("chat.saved", path="conversations.jsonl"))

    def hand_out(self, request: gr.Request, *values: Any) -> str:
        """The conversation as a line of JSONL, which the browser keeps as a file."""
        session, _, _ = self._chat.asked(values)
        if not session.notes:
            gr.Warning(say(request, "chat.nothing"))
            return ""
        return json.dumps({"messages": session.answered().messages()}, ensure_ascii=False) + "\n"

    def take(self, request: gr.Request, file: str, *values: Any) -> dict[Any, Any]:
        """Go on with a conversation from a file: its first line."""
        words, chat = partial(say, request), self._chat
        session, ask, _ = chat.asked(values)
        try:
            session.load(_first_line(Path(file)))
        except UserError as e:
            return {chat.note: chat_html.mistake(e, words)}
        finally:
            Path(file).unlink(missing_ok=True)
        gr.Info(words("chat.loaded", number=len(session.notes)))
        return {**chat.replaced(session, ask, words), chat.system: session.chat.system}


def _first_line(file: Path) -> str:
    """The first line that is not empty. Raises: UserError where it is no text, or too long."""
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for _ in range(100):
                line = lines.readline(LONGEST + 1)
                if len(line) > LONGEST:
                    raise UserError(
                        f"a conversation may have {LONGEST} characters", where="conversation"
                    )
                if line.strip() or not line:
                    return line.strip()
    except ValueError:
        raise UserError("this file is not text in UTF-8", where="conversation") from None
    return ""
