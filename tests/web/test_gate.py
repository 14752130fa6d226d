"""Who may ask: names, origins, cookies, uploads, passwords, over HTTP as a hostile page would."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client
from page_kit import make_place, open_page

from vicuna.config import WebSettings
from vicuna.errors import UserError
from vicuna.web import login
from vicuna.web.gate import BODY, Gate, Names
from vicuna.web.login import Brake
from vicuna.web.state import App

WORD = "松树下的石头"
# What a browser asks of a page: (method, path, what is sent).
ASKED: list[tuple[str, str, dict[str, Any]]] = [
    ("GET", "/", {}),
    ("GET", "/config", {}),
    ("GET", "/gradio_api/info", {}),
    ("GET", "/gradio_api/app_id", {}),
    ("GET", "/gradio_api/token", {}),
    ("GET", "/gradio_api/heartbeat/x", {}),
    ("GET", "/gradio_api/queue/data?session_hash=x", {}),
    ("GET", "/gradio_api/file=/etc/passwd", {}),
    ("GET", "/theme.css", {}),
    ("GET", "/logout", {}),
    ("POST", "/login", {"data": {"username": "vicuna", "password": WORD}}),
    ("POST", "/gradio_api/upload", {"files": {"files": ("a.jsonl", b"{}")}}),
    ("POST", "/gradio_api/queue/join", {"json": {"data": [], "fn_index": 0, "session_hash": "x"}}),
    ("POST", "/gradio_api/call/chat", {"json": {"data": []}}),
    ("POST", "/gradio_api/run/predict", {"json": {"data": []}}),
    ("POST", "/gradio_api/cancel", {"json": {"session_hash": "x", "fn_index": 0, "event_id": "x"}}),
    ("POST", "/gradio_api/reset", {"json": {"event_id": "x"}}),
    ("OPTIONS", "/gradio_api/queue/join", {"headers": {"access-control-request-method": "POST"}}),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("gate"))


@pytest.fixture(scope="module")
def page(place: Path) -> Iterator[tuple[App, str]]:
    with open_page(place, allowed_hosts=["vicuna.example.org"]) as opened:
        yield opened


@pytest.fixture(scope="module")
def locked(place: Path) -> Iterator[tuple[App, str]]:
    with open_page(place, password=WORD, read_only=True) as opened:
        yield opened


def ask(url: str, method: str, path: str, sent: dict[str, Any], **headers: str) -> httpx.Response:
    given = {**sent.get("headers", {}), **{k.replace("_", "-"): v for k, v in headers.items()}}
    with httpx.Client(timeout=20, verify=False) as client:
        request = {**{k: v for k, v in sent.items() if k != "headers"}, "headers": given}
        with client.stream(method, url.rstrip("/") + path, **request) as answer:
            if answer.status_code >= 400:
                answer.read()
            return answer


@pytest.mark.parametrize(("method", "path", "sent"), ASKED, ids=[f"{m} {p}" for m, p, _ in ASKED])
def test_no_other_page_and_no_other_name_may_ask_for_anything(
    page: tuple[App, str], method: str, path: str, sent: dict[str, Any]
) -> None:
    _, url = page
    port = url.rsplit(":", 1)[1].strip("/")
    for headers in (
        {"host": f"evil.example:{port}", "origin": f"http://evil.example:{port}"},
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example"},
        {"host": f"127.0.0.1:{port}@evil.example"},
        {"host": "93.184.215.14"},
        {"host": ""},
        {"origin": "http://evil.example"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:1"},
        {"origin": "file://"},
        {"origin": "http://["},
        {"origin": "https://evil.example", "host": "vicuna.example.org"},
        {"origin": "https://vicuna.example.org.evil.example", "host": "vicuna.example.org"},
    ):
        found = ask(url, method, path, sent, **headers)
        assert found.status_code == 403, (headers, found.status_code)
        assert not [n for n in found.headers if n.startswith("access-control")]
        assert "set-cookie" not in found.headers
    if path != "/":
        for site in ("cross-site", "same-site"):
            assert ask(url, method, path, sent, sec_fetch_site=site).status_code == 403


def test_the_page_s_own_names_and_origins_may(page: tuple[App, str]) -> None:
    _, url = page
    port = url.rsplit(":", 1)[1].strip("/")
    for headers in (
        {},
        {"host": f"localhost:{port}", "origin": f"http://localhost:{port}"},
        {"host": f"[::1]:{port}", "origin": f"http://[::1]:{port}"},
        {"host": "vicuna.example.org", "origin": "https://vicuna.example.org"},
        {"host": "VICUNA.example.org.:443", "origin": "https://vicuna.example.org"},
        # A proxy that does not hand on the name.
        {"origin": "https://vicuna.example.org"},
        {"sec_fetch_site": "same-origin"},
        {"sec_fetch_site": "none", "sec_fetch_mode": "navigate"},
    ):
        found = ask(url, "GET", "/config", {}, **headers)
        assert found.status_code == 200, headers
        assert not [n for n in found.headers if n.startswith("access-control")]
    link = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}
    assert ask(url, "GET", "/", {}, **link).status_code == 200


def test_a_refusal_says_what_helps_in_the_browser_s_language(page: tuple[App, str]) -> None:
    _, url = page
    found = httpx.get(url, headers={"host": "box.lan"})
    assert "--allowed_hosts box.lan" in found.text
    assert "主机名" in httpx.get(url, headers={"host": "box.lan", "accept-language": "zh"}).text
    assert found.headers["content-type"].startswith("text/plain")
    assert found.headers["x-content-type-options"] == "nosniff"


def test_all_names_are_known_where_all_addresses_are_listened_to() -> None:
    here = Names("0.0.0.0")
    assert here.host("192.168.1.5:7860")
    assert here.host("[fe80::1]:7860")
    assert not here.host("evil.example")
    assert Names("192.168.1.5").host("192.168.1.5")
    assert not Names("192.168.1.5").host("192.168.1.6")
    shared = Names("127.0.0.1")
    shared.add("https://abc.gradio.live")
    assert shared.host("abc.gradio.live")
    assert shared.origin("https://abc.gradio.live", "abc.gradio.live")
    assert not shared.host("other.gradio.live")


def test_a_login_cookie_stays_with_the_page(locked: tuple[App, str]) -> None:
    _, url = locked
    found = httpx.post(f"{url}login", data={"username": "vicuna", "password": WORD})
    cookies = found.headers.get_list("set-cookie")
    assert len(cookies) == 2
    assert all("samesite=lax" in c.lower() and "httponly" in c.lower() for c in cookies)


def test_nothing_inside_answers_before_the_password(locked: tuple[App, str]) -> None:
    _, url = locked
    for method, path, sent in ASKED:
        if path.startswith("/gradio_api") and path != "/gradio_api/token" and method != "OPTIONS":
            found = ask(url, method, path, sent)
            assert found.status_code in (401, 403), (path, found.status_code)
    for path in ("openapi.json", "gradio_api/openapi.json", "docs", "monitoring"):
        assert httpx.get(url + path).status_code in (401, 404)
    assert httpx.get(url).status_code == 200


def test_nothing_is_fetched_for_a_visitor(page: tuple[App, str]) -> None:
    _, url = page
    for path in (
        "file=http://example.org/x",
        "file=HTTPS://example.org",
        "proxy=http://a.hf.space/",
    ):
        assert httpx.get(f"{url}gradio_api/{path}").status_code == 403
        assert httpx.get(f"{url}gradio_api/{path.replace(':', '%3A')}").status_code == 403


def test_uploads_are_bounded_and_refused_where_nothing_is_written(
    place: Path, locked: tuple[App, str]
) -> None:
    with httpx.Client() as client:
        client.post(f"{locked[1]}login", data={"username": "vicuna", "password": WORD})
        files = {"files": ("a.jsonl", b"{}")}
        assert client.post(f"{locked[1]}gradio_api/upload", files=files).status_code == 403
    with open_page(place, max_upload=1 / 1024) as (app, url):
        assert app.gate is not None

        def upload(size: int) -> int:
            # The same content is kept once.
            sent = {"files": ("a.jsonl", os.urandom(8) + b"x" * size)}
            return httpx.post(f"{url}gradio_api/upload", files=sent, timeout=30).status_code

        assert [upload(900 << 10) for _ in range(3)] == [200, 200, 200]
        assert upload(900 << 10) == 429
        assert upload((1 << 20) + BODY) == 413

        def much() -> Iterator[bytes]:
            for _ in range(40):
                yield b"x" * (1 << 20)

        kind = {"content-type": "multipart/form-data; boundary=b", "transfer-encoding": "chunked"}
        try:
            found = httpx.post(f"{url}gradio_api/upload", content=much(), headers=kind, timeout=30)
            assert found.status_code >= 400
        except httpx.HTTPError:  # cut off while it was sent
            pass
        large = json.dumps({"data": ["x" * BODY], "fn_index": 0, "session_hash": "x"})
        kind = {"content-type": "application/json"}
        found = httpx.post(f"{url}gradio_api/queue/join", content=large, headers=kind)
        assert found.status_code == 413
        assert httpx.get(url).status_code == 200


@pytest.mark.parametrize("session", ["x", None])
@pytest.mark.parametrize("number", [9999, -1])
@pytest.mark.parametrize(
    "path", ["queue/join", "run/predict", "run/nothing", "api/predict", "call/nothing"]
)
def test_an_event_that_the_page_lacks(
    page: tuple[App, str],
    path: str,
    number: int,
    session: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sent = {"data": [], "fn_index": number, "session_hash": session}
    found = httpx.post(f"{page[1]}gradio_api/{path}", json=sent, timeout=20)
    assert 400 <= found.status_code < 500, found.text
    assert not [r for r in caplog.records if r.exc_info]


def test_what_was_uploaded_is_not_kept_for_ever(page: tuple[App, str]) -> None:
    app, _ = page
    assert app.gate is not None
    assert app.gate.server.get_blocks().delete_cache == (3600, 3600)
    assert "vicuna-web-" in app.gate.server.uploaded_file_dir


# Passwords.


def test_a_password_comes_by_option_file_or_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "word.txt"
    file.write_text("from a file \r\n", encoding="utf-8-sig")
    assert login.password(WebSettings(password_file=str(file))) == "from a file "
    monkeypatch.setenv(login.VARIABLE, WORD)
    assert login.password(WebSettings()) == WORD
    assert login.password(WebSettings(host="0.0.0.0")) == WORD
    assert login.password(WebSettings(password="other 123")) == "other 123"
    assert login.password(WebSettings(auth=False)) == ""
    with pytest.raises(UserError, match="no-auth"):
        login.password(WebSettings(auth=False, password="other 123"))
    for bad in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            login.password(WebSettings(password_file=str(bad)))
    file.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="cannot be read"):
        login.password(WebSettings(password_file=str(file)))


@pytest.mark.parametrize(
    "word",
    ["", " ", "\t\n", "1", "x", "1234567", "12345678", "aaaaaaaa", "password", "Password1", "vicuna",
     "abababab", "松树", "        a"],
)  # fmt: skip
def test_a_weak_password_is_refused_before_anything_is_opened(word: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the password is"):
        login.password(WebSettings(password=word))
    file = tmp_path / "word"
    file.write_text(word, encoding="utf-8")
    with pytest.raises(UserError, match="the password is"):
        login.password(WebSettings(password_file=str(file)))


def test_only_a_made_up_password_is_told(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_page(place, password=WORD):
        assert WORD not in capsys.readouterr().out
    monkeypatch.setenv(login.VARIABLE, WORD)
    with open_page(place):
        told = capsys.readouterr().out
    assert WORD not in told
    assert "user: vicuna" in told
    monkeypatch.delenv(login.VARIABLE)
    with open_page(place, host="127.0.0.2"):
        assert "password: " in capsys.readouterr().out


def test_wrong_passwords_take_longer_and_longer_for_one_address_only() -> None:
    now = [0.0]
    brake = Brake(lambda: now[0])

    async def wrong(address: str) -> None:
        brake_turn = brake.turn(address)
        async with brake_turn as turn:
            assert turn is not None
            turn.told(False)

    async def play() -> None:
        for _ in range(login.FREE):
            await wrong("10.0.0.1")
        assert brake.pause("10.0.0.1") == login.PAUSE
        assert brake.pause("10.0.0.2") == 0
        now[0] += 100
        await wrong("10.0.0.1")
        assert brake.pause("10.0.0.1") == 2 * login.PAUSE
        for _ in range(30):
            now[0] += 100
            await wrong("10.0.0.1")
        assert brake.pause("10.0.0.1") == login.LONGEST
        now[0] += 100
        async with brake.turn("10.0.0.1") as turn:
            async with brake.turn("10.0.0.1") as second:
                assert second is None
            assert turn is not None
            turn.told(True)
        assert brake.pause("10.0.0.1") == 0
        # One household has 2 ** 64 addresses of the new kind.
        for n in range(login.FREE):
            await wrong(f"2001:db8::{n:x}")
        assert brake.pause("2001:db8::ffff") == login.PAUSE
        assert brake.pause("2001:db8:0:1::1") == 0

    asyncio.run(play())


def test_the_memory_of_wrong_passwords_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(login, "ADDRESSES", 50)
    brake = Brake()

    async def play() -> None:
        for n in range(500):
            async with brake.turn(f"10.0.{n // 250}.{n % 250}") as turn:
                assert turn is not None
                turn.told(False)

    asyncio.run(play())
    assert len(brake) <= 50


def test_a_hundred_guesses_at_once_are_not_checked_at_once(
    locked: tuple[App, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    app, url = locked
    assert app.gate is not None
    monkeypatch.setattr(app.gate, "brake", Brake())
    monkeypatch.setattr(login, "PAUSE", 0.3)
    monkeypatch.setattr(login, "LONGEST", 0.3)
    found: list[int] = []

    def guess() -> None:
        for _ in range(5):
            sent = {"username": "vicuna", "password": "x"}
            found.append(httpx.post(f"{url}login", data=sent, timeout=60).status_code)

    threads = [threading.Thread(target=guess) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {400, 429}
    assert found.count(429) > 20
    monkeypatch.setattr(app.gate, "brake", Brake())
    right = httpx.post(f"{url}login", data={"username": "vicuna", "password": WORD})
    assert right.status_code == 200


def test_the_client_of_gradio_still_comes_in(locked: tuple[App, str]) -> None:
    client = Client(locked[1], verbose=False, auth=("vicuna", WORD))
    client.close()


def test_a_connection_that_listens_is_known() -> None:
    gate = Gate(Names("127.0.0.1"))
    seen: list[bool] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        seen.append(gate.listened("abc"))

    gate.inner = inner

    async def play() -> None:
        for path, query in (("/gradio_api/queue/data", b"session_hash=abc"),
                            ("/gradio_api/call/chat/abc", b"")):  # fmt: skip
            scope = {"type": "http", "method": "GET", "path": path, "query_string": query,
                     "headers": [(b"host", b"localhost")]}  # fmt: skip
            await gate(scope, None, None)  # type: ignore[arg-type]

    asyncio.run(play())
    assert seen == [True, True]
    assert not gate.listened("abc")
    assert gate.listened(None)
    assert not gate.streams
