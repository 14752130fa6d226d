"""The page over HTTP, without a browser: many people at once, passwords, ports, what may be read."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client
from page_kit import make_place, open_page

import vicuna
from vicuna.config import WebSettings
from vicuna.errors import UserError
from vicuna.web import server
from vicuna.web.state import App

PEOPLE = 20


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def page(place: Path) -> Iterator[tuple[App, str]]:
    with open_page(place) as opened:
        yield opened


def asked(app: App, tab: str, *adapters: str, tokens: int = 12) -> list[Any]:
    """What the tab Chat sends behind a question: greedy, so that the answer is known."""
    from vicuna.web.controls import DEFAULTS

    controls = {
        **DEFAULTS,
        "max_new_tokens": tokens,
        "min_new_tokens": tokens if tokens > 99 else 0,
    }
    order = ["max_new_tokens", "temperature", "top_p", "top_k", "min_p", "typical_p", "seed"]
    order += ["num_beams", "length_penalty", "early_stopping", "repetition_penalty"]
    order += ["frequency_penalty", "presence_penalty", "no_repeat_ngram_size", "min_new_tokens"]
    order += ["banned_words", "logit_bias", "stop", "stop_tokens", "logprobs"]
    values = [controls[key] for key in order]
    return [tab, list(adapters), 1.0, "", "", app.worker.context, "columns", "greedy", *values]


def test_every_event_that_asks_for_its_request_is_given_it(page: tuple[App, str]) -> None:
    """gradio passes a request where it can resolve the annotations of a function, all of them."""
    import inspect

    from gradio.utils import get_type_hints

    from vicuna.web.page import build

    lost, found = [], 0
    for event in build(page[0]).fns.values():
        if event.fn is None:
            continue
        for name, parameter in inspect.signature(event.fn).parameters.items():
            if "Request" in str(parameter.annotation):
                found += 1
                if name not in get_type_hints(event.fn):
                    lost.append(f"{event.fn}: {name}")
    assert not lost
    assert found > 30


def test_twenty_people_at_once_get_their_own_answers(place: Path, page: tuple[App, str]) -> None:
    app, url = page
    law = str((place / "runs" / "law").resolve())
    with vicuna.load(str(place / "base"), template="chatml", precision="fp32") as model:
        model.load_adapter("law", law)
        wanted = {}
        for i in range(PEOPLE):
            model.set_adapter("law" if i % 2 else {})
            wanted[i] = model.generate(f"question {i}?", max_new_tokens=12).text
    assert len(set(wanted.values())) > PEOPLE // 2
    found: dict[int, list[str]] = {}

    def person(i: int) -> None:
        client = Client(url, verbose=False)
        tab = f"{i:032x}"
        values = asked(app, tab, *([law] if i % 2 else []))
        client.submit(f"question {i}?", *values, api_name="/chat").result(timeout=60)
        found[i] = [turn.text for turn in app.sessions.get(tab).chat.turns]
        client.close()

    threads = [threading.Thread(target=person, args=(i,)) for i in range(PEOPLE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert found == {i: [f"question {i}?", wanted[i]] for i in range(PEOPLE)}
    assert app.worker.queue.length() == 0


def test_a_stop_ends_one_s_own_answer_only(page: tuple[App, str]) -> None:
    app, url = page
    client = Client(url, verbose=False)
    mine, other = (f"{n:032x}" for n in (101, 102))
    long = [
        client.submit("go on", *asked(app, tab, tokens=400), api_name="/chat")
        for tab in (mine, other)
    ]
    while not app.sessions.get(mine).busy or not app.sessions.get(other).busy:
        time.sleep(0.02)
    app.sessions.get(mine).stop()
    for job in long:
        job.result(timeout=60)
    why = {tab: app.sessions.get(tab).notes for tab in (mine, other)}
    assert all(note.stats["why"] != "cancelled" for note in why[other])
    assert why[other]
    assert not why[mine] or why[mine][0].stats["why"] == "cancelled"
    client.close()


def test_an_adapter_of_another_base_is_refused_and_the_page_lives(
    place: Path, page: tuple[App, str]
) -> None:
    app, url = page
    client = Client(url, verbose=False)
    tab = f"{201:032x}"
    stranger = str((place / "runs" / "stranger").resolve())
    *_, note = client.predict("hello?", *asked(app, tab, stranger), api_name="/chat")
    assert "belongs to a base of another shape (another base" in str(note)
    assert app.sessions.get(tab).chat.turns == []
    client.predict("hello?", *asked(app, tab), api_name="/chat")
    assert len(app.sessions.get(tab).chat.turns) == 2
    client.close()


def test_what_goes_wrong_inside_is_told_and_the_page_lives(
    page: tuple[App, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vicuna.generate.engines.base import OutOfMemory

    app, url = page
    engine: Any = app.worker.loaded.engine
    step, client, tab = engine.step, Client(url, verbose=False), f"{301:032x}"

    def short(tokens: Any, parents: Any) -> Any:
        if engine.tree.used > 40:
            engine.reset()
            raise OutOfMemory("none left")
        return step(tokens, parents)

    monkeypatch.setattr(engine, "step", short)
    client.predict("hello?", *asked(app, tab, tokens=60), api_name="/chat")
    assert app.sessions.get(tab).notes[-1].stats["why"] == "memory"
    monkeypatch.setattr(engine, "step", lambda *_: 1 / 0)
    *_, note = client.predict("again?", *asked(app, tab), api_name="/chat")
    assert "Internal error: ZeroDivisionError" in str(note)
    monkeypatch.undo()
    client.predict("and now?", *asked(app, tab), api_name="/chat")
    assert app.sessions.get(tab).notes[-1].stats["why"] in ("stop", "length")
    client.close()


def test_the_page_speaks_the_browser_s_language_and_fetches_nothing(page: tuple[App, str]) -> None:
    _, url = page
    for wish, word in (("zh-CN,zh;q=0.9", "对话"), ("de,en;q=0.5", "Chat")):
        found = httpx.get(url, headers={"accept-language": wish})
        assert word in found.text
        assert re.findall(r"@@[\w.-]+@@", found.text) == []
        assert "connect-src 'self'" in found.headers["content-security-policy"]
    chosen = httpx.get(url, headers={"accept-language": "zh"}, cookies={"vicuna_language": "en"})
    assert "对话" not in chosen.text


def test_files_outside_of_the_folders_are_not_served(place: Path, page: tuple[App, str]) -> None:
    _, url = page
    for path in ("/etc/passwd", str(place / "base" / "config.json"), "../../etc/passwd"):
        found = httpx.get(f"{url}gradio_api/file={path}")
        assert found.status_code in (403, 404), path


def test_a_password_keeps_everybody_else_out(place: Path) -> None:
    with open_page(place, password="松树下的石头") as (_, url):
        assert httpx.get(f"{url}config").status_code == 401
        assert httpx.post(f"{url}gradio_api/call/chat", json={"data": []}).status_code == 401
        wrong = httpx.post(f"{url}login", data={"username": "vicuna", "password": "x"})
        assert wrong.status_code == 400
        with httpx.Client() as client:
            right = client.post(
                f"{url}login", data={"username": "vicuna", "password": "松树下的石头"}
            )
            assert right.status_code == 200
            assert client.get(f"{url}config").status_code == 200


def test_a_page_that_others_reach_has_a_password_unless_told_otherwise() -> None:
    def word(**options: Any) -> str:
        return server.password(WebSettings(**options))

    assert word() == ""
    assert word(password="pine and stone") == "pine and stone"
    made = [word(host="0.0.0.0"), word(host="0.0.0.0"), word(share=True)]
    assert all(len(w) >= 10 for w in made)
    assert len(set(made)) == 3
    assert word(host="0.0.0.0", auth=False) == ""


def test_a_busy_port_is_said_or_passed_over() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError) as told:
            server.free_port(WebSettings(port=port))
        assert told.value.what == f"port {port} of 127.0.0.1 is in use"
        assert told.value.fix == "Close the program that uses it, or choose another --port."
        with pytest.raises(UserError, match=f"port {port} of 192.0.2.1 cannot be used: Cannot"):
            server.free_port(WebSettings(port=port, host="192.0.2.1", auth=False))
    assert server.free_port(WebSettings()) >= server.FIRST_PORT


def test_nothing_is_written_where_the_page_is_read_only(place: Path) -> None:
    app = App(WebSettings(adapters=[str(place / "runs")], read_only=True))
    with pytest.raises(UserError, match="read-only"):
        app.may_write()
    with pytest.raises(UserError, match="outside of the folders"):
        app.inside("/etc/passwd")
    (place / "runs" / "link").symlink_to("/etc")
    with pytest.raises(UserError, match="outside of the folders"):
        app.inside(place / "runs" / "link" / "passwd")
    (place / "runs" / "link").unlink()
    assert app.inside(place / "runs" / "law").name == "law"
