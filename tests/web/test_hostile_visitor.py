"""A page and a client that sends what no browser would: everybody else goes on."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client
from page_kit import make_place, open_page
from test_server import asked

from vicuna.data.templates import sandbox
from vicuna.errors import UserError
from vicuna.serve import queue, worker
from vicuna.serve.queue import FairQueue, Job
from vicuna.web.state import App

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
# Harmless until somebody has asked four times: it loads, and passes every look at the beginning.
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    "{% if messages|length > 6 %}" + LOOPS + "{% endif %}"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = make_place(tmp_path_factory.mktemp("hostile"))
    meta = json.loads((place / "runs" / "poems" / "vicuna.json").read_text())
    meta["template"] = {"kind": "jinja", "name": "auto", "source": TEMPLATE, "bos_token": "",
                        "eos_token": "<|im_end|>", "controls": ["<|im_end|>"]}  # fmt: skip
    (place / "runs" / "poems" / "vicuna.json").write_text(json.dumps(meta))
    return place


@pytest.fixture(scope="module")
def page(place: Path) -> Iterator[tuple[App, str]]:
    with open_page(place, read_only=True, template=None) as opened:
        yield opened


def send(url: str, name: str, data: list[Any], session: str) -> tuple[bool, str]:
    """(success, everything that was told) of an event, through gradio's queue as a browser has it."""
    with httpx.Client(timeout=60, verify=False) as client:
        config = client.get(f"{url}config").json()
        event = next(
            d for d in config["dependencies"]
            if name in (d["api_name"], str(d["id"])) or d.get("api_name") == name
        )  # fmt: skip
        sent = {"data": data, "fn_index": event["id"], "session_hash": session, "event_data": None}
        client.post(f"{url}gradio_api/queue/join", json=sent).raise_for_status()
        told = ""
        heard = f"{url}gradio_api/queue/data?session_hash={session}"
        with client.stream("GET", heard) as stream:
            for line in stream.iter_lines():
                if not line.startswith("data:"):
                    continue
                message = json.loads(line[5:])
                told += json.dumps(message, ensure_ascii=False)
                if message["msg"] == "process_completed":
                    return bool(message["success"]), told
    raise AssertionError("the stream ended")


def test_an_adapter_s_template_that_never_ends_stops_nobody_else(
    place: Path, page: tuple[App, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "COMPUTING", 0.5)
    app, url = page
    evil = str((place / "runs" / "poems").resolve())
    client = Client(url, verbose=False)
    tab = f"{1:032x}"
    for n in (1, 2, 3):
        found = client.predict(f"question {n}?", *asked(app, tab, evil), api_name="/chat")
        assert len(app.sessions.get(tab).chat.turns) == 2 * n, found
    pings: list[int] = []
    done = threading.Event()

    def ping() -> None:
        while not done.is_set():
            pings.append(httpx.get(url, timeout=30).status_code)

    thread = threading.Thread(target=ping)
    thread.start()
    *_, note = client.predict("fourth?", *asked(app, tab, evil), api_name="/chat")
    done.set()
    thread.join()
    assert "computing" in str(note)
    assert set(pings) == {200}
    other = f"{2:032x}"
    client.predict("hello?", *asked(app, other), api_name="/chat")
    assert len(app.sessions.get(other).chat.turns) == 2
    client.close()


def test_a_name_of_a_tab_that_no_page_makes_up_is_told_in_words(
    page: tuple[App, str], capfd: pytest.CaptureFixture[str]
) -> None:
    app, url = page
    for i, tab in enumerate(["x", "", None, 5, ["a"], {"a": 1}, "\0" * 32, "a" * 99]):
        good, told = send(url, "chat", ["hello?", *asked(app, tab)], f"tab{i}")  # type: ignore[arg-type]
        assert good or "no session" in told or "did not work" in told
        assert "no session" in told or "did not work" in told
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("odd", [None, "x", "1e999", [], {"a": 1}, -1e308, True, "9" * 5000])
def test_a_value_that_no_page_sends_harms_nobody_else(page: tuple[App, str], odd: Any) -> None:
    app, url = page
    values = asked(app, f"{4:032x}")
    for place in (1, 2, 3, 5, 6, 7, 8, 15):
        sent = [*values[:place], odd, *values[place + 1 :]]
        send(url, "chat", ["hello?", *sent], f"odd{place}{len(str(odd))}")
    client = Client(url, verbose=False)
    tab = f"{5:032x}"
    client.predict("hello?", *asked(app, tab), api_name="/chat")
    assert len(app.sessions.get(tab).chat.turns) >= 2
    client.close()


def test_a_question_beyond_all_measure_is_not_read(page: tuple[App, str]) -> None:
    app, url = page
    tab = f"{6:032x}"
    huge = "字" * 3_000_000
    _, told = send(url, "chat", [huge, *asked(app, tab)], "huge")
    assert "too long: 3000000 characters" in told, told[-3000:]
    values = asked(app, tab)
    values[3] = huge
    _, told = send(url, "chat", ["hello?", *values], "system")
    assert "too long" in told
    assert app.sessions.get(tab).chat.turns == []


def test_what_nobody_listens_to_is_given_up(
    page: tuple[App, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "DISCONNECT_GRACE", 0.5)
    app, url = page
    config = httpx.get(f"{url}config").json()
    event = next(d["id"] for d in config["dependencies"] if d["api_name"] == "chat")
    for n in range(60):
        sent = {"data": ["go on", *asked(app, f"{1000 + n:032x}", tokens=400)], "fn_index": event,
                "session_hash": f"deaf{n}"}  # fmt: skip
        httpx.post(f"{url}gradio_api/queue/join", json=sent)
    assert app.worker.queue.length() <= queue.PER_ADDRESS + 1
    client = Client(url, verbose=False)
    tab = f"{7:032x}"
    for _ in range(100):
        *_, note = client.predict("hello?", *asked(app, tab), api_name="/chat")
        if "too many" not in str(note):
            break
    assert len(app.sessions.get(tab).chat.turns) == 2
    while app.worker.queue.length():
        threading.Event().wait(0.05)
    client.close()


def test_the_queue_takes_so_many_of_a_person_an_address_and_of_all() -> None:
    def job(person: str, address: str = "") -> Job:
        return Job(person, lambda _: None, address=address)

    waiting = FairQueue()
    for _ in range(queue.PER_CLIENT):
        waiting.submit(job("a"))
    with pytest.raises(UserError, match="too many"):
        waiting.submit(job("a"))
    waiting.submit(job("b"))
    for n in range(queue.PER_ADDRESS):
        waiting.submit(job(f"n{n}", "10.0.0.1"))
    with pytest.raises(UserError, match="too many"):
        waiting.submit(job("c", "10.0.0.1"))
    while waiting.length() < queue.IN_ALL:
        waiting.submit(job(f"x{waiting.length()}"))
    with pytest.raises(UserError, match="too many"):
        waiting.submit(job("d"))


def test_read_only_fetches_nothing(page: tuple[App, str], monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    app, url = page
    fetched: list[Any] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **_: fetched.append(a))
    config = httpx.get(f"{url}config").json()
    events = config["dependencies"]
    components = {c["id"]: c["props"].get("elem_id") for c in config["components"]}
    (put,) = [
        d["id"] for d in events
        if "adapters-where" in [components.get(i) for i in d["inputs"]]
    ]  # fmt: skip
    _, told = send(url, str(put), [f"{8:032x}", "evil-owner/huge-model"], "put")
    assert "read-only" in told
    look = [
        d["id"] for d in events if "data-source" in [components.get(i) for i in d["inputs"]]
    ]  # fmt: skip
    sent = [f"{8:032x}", str(Path("a.jsonl")), "evil-owner/base2", "auto", None, False]
    _, told = send(url, str(look[0]), sent, "look")
    assert not fetched
    assert app.registry.adapters()


def test_what_was_told_once_is_not_sent_a_second_time(page: tuple[App, str]) -> None:
    """Gradio sends a generator's last update twice: somebody may have typed in between."""
    app, url = page
    config = httpx.get(f"{url}config").json()
    system = next(
        c["id"] for c in config["components"] if c["props"].get("elem_id") == "chat-system"
    )
    tab = f"{8:032x}"
    app.sessions.get(tab).chat.system = "be brief"
    event = next(
        d for d in config["dependencies"] if {system, app.tab._id} <= set(d["outputs"])
    )  # fmt: skip
    good, told = send(url, str(event["id"]), asked(app, tab), "come back")
    assert good
    assert told.count("be brief") == 1
    assert app.sessions.get(tab).chat.system == "be brief"
