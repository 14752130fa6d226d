"""All texts of the page, in English and in Chinese.

They are in `texts/*.yaml`, a file for each tab, `key: [English, Chinese]` each. Two ways to them:

    gr.Button(label("chat.send"))                          # while the page is built
    gr.Info(translate(request, "chat.saved", path=path))   # in an event, for the browser that asks

`label` returns a mark that is replaced when a page leaves the server (`Translation`), whatever it
is part of: labels, choices, HTML. So it must reach the browser as it is: no text may be cut,
compared or formatted on the way. `translate` gives the text itself, with its {fields} filled in.

The language is the one that the tab speaks already, which it says in a header or its address; else
that of the cookie `vicuna_language` ("en" or "zh"), which the page's switch sets for tabs to come;
else the browser's first wish that is known.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from functools import lru_cache
from pathlib import Path
from typing import Any

LANGUAGES = ("en", "zh")
COOKIE = "vicuna_language"
HEADER = "x-vicuna-language"
_MARK = re.compile(r"@@([A-Za-z0-9_.-]+)@@")
_WISH = re.compile(r"\s*([A-Za-z]+)(?:-[\w-]+)?\s*(?:;\s*q=([\d.]+))?\s*$")


@lru_cache
def catalog() -> dict[str, tuple[str, str]]:
    """Every text by its key: (English, Chinese).

    Raises: ValueError where a key is there twice, or lacks a language.
    """
    import yaml

    found: dict[str, tuple[str, str]] = {}
    for path in sorted((Path(__file__).parent / "texts").glob("*.yaml")):
        loaded = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        if path.stem == "settings":
            loaded = {f"settings.{name}": [help_text(name), text] for name, text in loaded.items()}
        for key, both in loaded.items():
            if key in found or not isinstance(both, list) or len(both) != len(LANGUAGES):
                raise ValueError(f"{path.name}: {key} is there twice or lacks a language")
            found[key] = (str(both[0]), str(both[1]))
    return found


def help_text(setting: str) -> str:
    """What a setting of a training is for, in English: the table of `config/` has it."""
    from vicuna.config import TrainSettings

    return TrainSettings.model_fields[setting].description or ""


def label(key: str) -> str:
    """A mark that becomes the text where the page is sent. Raises: KeyError for an unknown key."""
    catalog()[key]
    return f"@@{key}@@"


def translate(request: Any, key: str, **fields: Any) -> str:
    """A text in the language of the browser that asks.

    Args:
        request: gradio's request, or the name of a language.
        fields: put into the places of that name.
    """
    language = request if isinstance(request, str) else language_of(request)
    text = catalog()[key][LANGUAGES.index(language)]
    return text.format(**fields) if fields else text


def language_of(request: Any) -> str:
    """The language of the browser behind a request; English where it does not tell."""
    if request is None:
        return LANGUAGES[0]
    told = (request.headers.get(HEADER, ""), request.cookies.get(COOKIE, ""))
    return _choose(*told, request.headers.get("accept-language", ""))


def _choose(tab: str, cookie: str, wishes: str) -> str:
    for told in (tab, cookie):
        if told in LANGUAGES:
            return told
    found = filter(None, map(_WISH.match, wishes.split(",")))
    ranked = [(float(w[2] or 1), w[1].lower()) for w in found if w[1].lower() in LANGUAGES]
    return max(ranked, key=lambda r: r[0])[1] if ranked else LANGUAGES[0]


def fill_labels(body: str, language: str) -> str:
    """A page or a JSON text with its marks replaced: inside strings of JSON, as JSON has them."""
    place = LANGUAGES.index(language)

    def text(found: re.Match[str]) -> str:
        both = catalog().get(found[1])
        if both is None:
            return found[0]
        return json.dumps(both[place], ensure_ascii=False)[1:-1].replace("<", "\\u003c")

    return _MARK.sub(text, body)


Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Translation:
    """ASGI middleware: the page and its config leave in the browser's language."""

    _PATHS = ("/", "/config", "/config/")

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; what answers it is translated where it is the page."""
        if scope["type"] != "http" or scope["path"] not in self._PATHS:
            await self._app(scope, receive, send)
            return
        language = language_in(scope)
        start: Message = {}
        parts: list[bytes] = []

        async def take(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            parts.append(message.get("body", b""))
            if message.get("more_body"):
                return
            body = fill_labels(b"".join(parts).decode("utf-8"), language)
            if scope["path"] == "/":
                body = body.replace('lang="en"', f'lang="{language}"', 1)
                body = body.replace("<head>", f"<head>{_language_script(language)}", 1)
            sent = body.encode("utf-8")
            headers = [(k, v) for k, v in start["headers"] if k.lower() != b"content-length"]
            headers += [(b"content-length", str(len(sent)).encode()), (b"vary", b"accept-language")]
            await send({**start, "headers": headers})
            await send({"type": "http.response.body", "body": sent})

        await self._app(scope, receive, take)


def language_in(scope: Mapping[str, Any]) -> str:
    """The language of the browser behind an ASGI request."""
    return _choose(*_language_headers(scope))


def _language_headers(scope: Mapping[str, Any]) -> tuple[str, str, str]:
    """(language of the tab, language cookie, languages that the browser wishes for)."""
    headers = {k.lower(): v.decode("latin-1") for k, v in scope["headers"]}
    asked = re.search(r"(?:^|&)language=(\w+)", scope.get("query_string", b"").decode("latin-1"))
    cookie = re.search(rf"(?:^|;\s*){COOKIE}=(\w+)", headers.get(b"cookie", ""))
    tab = headers.get(HEADER.encode(), "") or (asked[1] if asked else "")
    return tab, (cookie[1] if cookie else ""), headers.get(b"accept-language", "")


def _language_script(language: str) -> str:
    """The script at the beginning of a page in a language."""
    name = {"en": "en", "zh": "zh-CN"}[language]
    script = (Path(__file__).parent / "static/language.js").read_text(encoding="utf-8")
    filled = script.replace("NAME", f"'{name}'").replace("CODE", language)
    return f"<script>{filled.replace('HEADER', HEADER)}</script>"
