"""Who may ask: the outermost layer before the page. Nothing behind it sees what it refuses.

A browser asks for whoever told it to: any page that somebody visits can make it send requests to
this server, under this server's address or under a name of its own that it lets point here. So only
requests under a name of the page (`Names`), and from the page itself or from no page at all, pass.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from vicuna.web.i18n import Message, Receive, Scope, Send, language_in, translate
from vicuna.web.login import Brake

Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]
BODY = 16 << 20  # bytes of a request that is no upload
UPLOADS = 4  # at once
FILES = 3  # uploads of the largest size that may lie here at once
# Fetching from elsewhere for a visitor: the page needs none of it.
_FETCHES = re.compile(r"/(file=|file/|proxy=)\s*[a-z][a-z+.-]*:", re.IGNORECASE)
_UPLOAD = re.compile(r"/(upload|process_recording)/?$")
_LISTENS = re.compile(r"/gradio_api/call/(?:v2/)?[^/]+/([^/]+)/?$")
# What of gradio's interface a browser needs before it is logged in.
_OPEN = re.compile(r"/gradio_api/(login_check|user|token|startup-events|theme\.css)/?$")
_INSIDE = re.compile(r"/(gradio_api/|openapi\.json|docs|redoc|monitoring|runs)")


class Names:
    """The names under which the page may be asked.

    Args:
        host: what the server listens on.
        others: names that somebody else gave it: a proxy's, a tunnel's.
    """

    def __init__(self, host: str, others: Iterable[str] = ()) -> None:
        self._any = host in ("0.0.0.0", "::", "")
        self._names = {"localhost", _bare(host), *map(_bare, others)} - {""}
        self._given = set(map(_bare, others))
        if self._any:
            # What no stranger can let point here: this machine's own names.
            self._names |= {_bare(socket.gethostname()), _bare(socket.getfqdn())}

    def add(self, name: str) -> None:
        """One more name that was given to the page."""
        self._names.add(_bare(name))
        self._given.add(_bare(name))

    def host(self, header: str) -> bool:
        """Whether a request under this name is meant for the page."""
        name = _bare(header)
        if name in self._names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        # An address cannot be made to point elsewhere, as a name can.
        return self._any or address.is_loopback

    def origin(self, origin: str, host: str) -> bool:
        """Whether a page of this origin is the one at `host`."""
        try:
            parts = urlsplit(origin)
            name = parts.hostname or ""
        except ValueError:
            return False
        if parts.scheme not in ("http", "https"):
            return False
        # Behind a proxy the host may be the proxy's name for us, the origin is the visitor's.
        return _place(parts.netloc) == _place(host) or _bare(name) in self._given


def _bare(host: str) -> str:
    """A host's name without port, brackets and the dot of its root, in small letters."""
    host = host.strip().lower()
    if "://" in host:
        host = urlsplit(host).netloc
    found = re.fullmatch(r"\[([^\]]*)\](?::\d+)?", host) or re.fullmatch(r"([^:]*)(?::\d+)?", host)
    return (found[1] if found else host).rstrip(".")


def _place(host: str) -> str:
    return re.sub(r":(80|443)$", "", host.strip().lower())


class Gate:
    """ASGI middleware that refuses what the page is not asked by itself.

    inner: what is asked behind it. names: of the page. read_only: no upload is taken.
    upload: bytes that one file may have. server: gradio's app; knows who is logged in.
    streams: how many connections listen to a session (or an event of the plain interface).
    """

    def __init__(self, names: Names, read_only: bool = False, upload: int = 2 << 30) -> None:
        self.names, self.read_only, self.upload = names, read_only, upload
        self.inner: Asgi | None = None
        self.server: Any = None
        self.brake = Brake()
        self.streams: Counter[str] = Counter()
        self._uploading = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer why not."""
        assert self.inner is not None
        if scope["type"] not in ("http", "websocket"):
            await self.inner(scope, receive, send)
            return
        headers = _headers(scope)
        if (refusal := self._refusal(scope, headers)) is not None:
            status, key, fields = refusal
            await _refuse(scope, send, status, key, **fields)
            return
        path = str(scope["path"])
        if path.rstrip("/") == "/login" and scope.get("method") == "POST":
            await self._log_in(scope, receive, send)
        elif (heard := _listening(scope, path)) is not None:
            self.streams[heard] += 1
            try:
                await self.inner(scope, receive, _own_cookies(send))
            finally:
                self.streams[heard] -= 1
                self.streams += Counter()  # those that nobody listens to are forgotten
        else:
            await self._pass(scope, receive, send, bool(_UPLOAD.search(path)))

    def listened(self, session: str | None) -> bool:
        """Whether a browser takes the answers of a session; who has none cannot be told."""
        return session is None or self.streams[session] > 0

    def _refusal(
        self, scope: Scope, headers: Mapping[str, list[str]]
    ) -> tuple[int, str, dict[str, Any]] | None:
        """(status, words, their fields) where a request is refused."""
        hosts, origins = headers.get("host", []), headers.get("origin", [])
        host = hosts[0] if len(hosts) == 1 else ""
        if not self.names.host(host):
            return 403, "gate.host", {"name": _bare(host)[:100] or "?"}
        if any(not self.names.origin(origin, host) for origin in origins):
            return 403, "gate.origin", {}
        if not origins and headers.get("sec-fetch-site", [""])[0] in ("cross-site", "same-site"):
            # No more than a link that somebody follows.
            looks = headers.get("sec-fetch-mode", [""])[0] == "navigate"
            if not looks or scope.get("method") != "GET" or scope["path"] != "/":
                return 403, "gate.origin", {}
        path = str(scope["path"])
        if _FETCHES.search(path):
            return 403, "gate.fetch", {}
        if _INSIDE.match(path) and not _OPEN.match(path) and not self._logged_in(headers):
            return 401, "gate.login", {}
        if scope.get("method") == "POST" and _UPLOAD.search(path):
            return self._no_upload(headers)
        size = _length(headers)
        return (413, "gate.large", {"most": BODY >> 20}) if size > BODY else None

    def _no_upload(
        self, headers: Mapping[str, list[str]]
    ) -> tuple[int, str, dict[str, Any]] | None:
        if self.read_only:
            return 403, "gate.read_only", {}
        size = _length(headers)
        if size > self.upload + BODY:
            return 413, "gate.large", {"most": self.upload >> 20}
        if self._uploading >= UPLOADS:
            return 429, "gate.uploads", {}
        if self.server is not None:
            here = folder_size(Path(self.server.uploaded_file_dir))
            if here + size > FILES * self.upload:
                return 429, "gate.uploads", {}
        return None

    def _logged_in(self, headers: Mapping[str, list[str]]) -> bool:
        server = self.server
        if server is None or server.auth is None:
            return True
        cookies = "; ".join(headers.get("cookie", []))
        names = "|".join((f"access-token-{server.cookie_id}",
                          f"access-token-unsecure-{server.cookie_id}"))  # fmt: skip
        sent = re.findall(rf"(?:^|;\s*)(?:{names})=([^;]*)", cookies)
        return any(token.strip() in server.tokens for token in sent)

    async def _log_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a password on, later and later when the ones before were wrong."""
        address = str((scope.get("client") or ("",))[0])
        async with self.brake.turn(address) as turn:
            if turn is None:
                await _refuse(scope, send, 429, "gate.slow")
                return

            async def look(message: Message) -> None:
                if message["type"] == "http.response.start":
                    turn.told(message["status"] < 400)
                await send(message)

            await self._pass(scope, receive, look, False)

    async def _pass(self, scope: Scope, receive: Receive, send: Send, upload: bool) -> None:
        """Pass a request on whose body is bounded, whatever its header says of it."""
        assert self.inner is not None
        left, started = (self.upload if upload else 0) + BODY, False

        async def take() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            return message if left >= 0 else {"type": "http.disconnect"}

        async def note(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        self._uploading += upload
        try:
            await self.inner(scope, take, _own_cookies(note))
        except Exception:
            if left >= 0:
                raise
        finally:
            self._uploading -= upload
        if left < 0 and not started:
            await _refuse(scope, send, 413, "gate.large", most=self.upload >> 20)


def _own_cookies(send: Send) -> Send:
    """What leaves: cookies for this page's own requests only, and no leave for other pages."""

    async def own(message: Message) -> None:
        if message["type"] == "http.response.start":
            kept = []
            for name, value in message["headers"]:
                if name.lower().startswith(b"access-control-"):
                    continue
                if name.lower() == b"set-cookie":
                    value = re.sub(rb"(?i)samesite=none", b"SameSite=Lax", value)
                    if b"samesite" not in value.lower():
                        value += b"; SameSite=Lax"
                kept.append((name, value))
            message = {**message, "headers": kept}
        await send(message)

    return own


async def _refuse(scope: Scope, send: Send, status: int, key: str, **fields: Any) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    text = translate(language_in(scope), key, **fields).encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"cache-control", b"no-store")]
    headers += [(b"content-length", str(len(text)).encode()), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text})


def _headers(scope: Scope) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        found.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return found


def _length(headers: Mapping[str, list[str]]) -> int:
    text = headers.get("content-length", ["0"])[0]
    return int(text) if text.isdigit() and len(text) < 18 else 0


def _listening(scope: Scope, path: str) -> str | None:
    """The session, or the event, that a connection listens to."""
    if path.rstrip("/") == "/gradio_api/queue/data":
        return parse_qs(scope.get("query_string", b"").decode("latin-1")).get("session_hash", [""])[
            0
        ]
    found = _LISTENS.match(path) if scope.get("method") == "GET" else None
    return found[1] if found else None


def folder_size(folder: Path) -> int:
    """Bytes of all files below a folder; 0 where there is none."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # just deleted
            continue
    return total
