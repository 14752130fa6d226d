"""`vicuna download` against a small stand-in of the hub that runs here."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from vicuna import hub as hubs
from vicuna.commands import download
from vicuna.errors import SettingsError, UserError

COMMIT = "c" * 40


class StandIn(ThreadingHTTPServer):
    """Repositories as dictionaries of contents; notes what was asked, and cuts off what it is told
    to."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str, str]] = []
        self.cut: dict[str, int] = {}  # file: bytes after which the connection breaks, once
        self.spoiled: set[str] = set()  # files whose bytes are changed on their way


class Handler(BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append((self.command, path, self.headers.get("Range", "")))
        if not path.startswith(("/api/models/me/model", "/me/model/resolve/")):
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif "/tree/" in path:
            self._send(200, json.dumps([self._entry(n) for n in self.server.files]).encode())
        elif path.startswith("/api/"):
            siblings = [{"rfilename": n} for n in self.server.files]
            about = {"id": "me/model", "sha": COMMIT, "siblings": siblings, "private": False}
            self._send(200, json.dumps(about).encode())
        else:
            self._file(unquote(path.split("/", 5)[5]), with_body)

    def _entry(self, name: str) -> dict[str, Any]:
        data = self.server.files[name]
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data)}
        entry["oid"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        if name.endswith(".safetensors"):
            digest = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 134}
        return entry

    def _file(self, name: str, with_body: bool) -> None:
        data = self.server.files[name]
        entry = self._entry(name)
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        if name in self.server.spoiled:
            data = data[:-1] + bytes([data[-1] ^ 1])
        start, code = 0, 200
        if given := self.headers.get("Range"):
            start, code = int(given.removeprefix("bytes=").split("-")[0]), 206
        head = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if code == 206:
            head["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        stop = self.server.cut.pop(name, None) if with_body else None
        self._send(code, body, head, with_body, stop)

    def _send(
        self,
        code: int,
        body: bytes,
        head: dict[str, str] | None = None,
        with_body: bool = True,
        stop: int | None = None,
    ) -> None:
        self.send_response(code)
        for key, value in {**(head or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body if stop is None else body[:stop])
            if stop is not None:
                self.close_connection = True


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    server = StandIn()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    server.files = {
        "config.json": b'{"model_type": "llama"}',
        "model.safetensors": bytes(range(256)) * 4000,
        "pytorch_model.bin": b"the same once more",
        "original/consolidated.00.pth": b"and once more",
        "notes/read me.txt": b"hello",
    }
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    yield server
    server.shutdown()
    server.server_close()


def names(folder: Path) -> set[str]:
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    return {n for n in found if not n.startswith(".cache")}


def test_weights_are_fetched_once_and_checked(hub: StandIn, tmp_path: Path, capsys: Any) -> None:
    target = tmp_path / "model"
    assert download.run(["me/model", "--output_dir", str(target)]) == 0
    assert names(target) == {"config.json", "model.safetensors", "notes/read me.txt"}
    assert (target / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    said = capsys.readouterr()
    assert said.out.strip() == str(target.resolve())
    assert "2 files left out" in said.err


def test_patterns_choose(hub: StandIn, tmp_path: Path) -> None:
    target = tmp_path / "some"
    more = ["--include", "*.json,*.bin", "--exclude", "config.*"]
    download.run(["me/model", "--output_dir", str(target), *more])
    assert names(target) == {"pytorch_model.bin"}
    with pytest.raises(UserError, match=r"no file matches") as e:
        download.run(["me/model", "--include", "*.gguf"])
    assert "config.json" in str(e.value)


def test_what_broke_off_is_gone_on_with(
    hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)  # of files that are small here
    hub.cut["model.safetensors"] = 300_000
    target = tmp_path / "model"
    download.run(["me/model", "--output_dir", str(target)])
    assert (target / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    ranges = [r for _, path, r in hub.asked if path.endswith("model.safetensors") and r]
    assert ranges
    assert ranges[0].startswith("bytes=")
    assert not ranges[0].startswith("bytes=0")


def test_what_is_there_is_not_fetched_again(hub: StandIn, tmp_path: Path) -> None:
    target = tmp_path / "model"
    download.run(["me/model", "--output_dir", str(target)])
    hub.asked.clear()
    download.run(["me/model", "--output_dir", str(target)])
    fetched = [path for method, path, _ in hub.asked if method == "GET" and "resolve" in path]
    assert fetched == []


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_was_damaged_on_its_way_is_removed(
    hub: StandIn, tmp_path: Path, name: str
) -> None:
    hub.spoiled.add(name)
    target = tmp_path / "model"
    with pytest.raises(UserError, match=f"checksum mismatch: {name}"):
        download.run(["me/model", "--output_dir", str(target)])
    assert name not in names(target)
    hub.spoiled.clear()
    download.run(["me/model", "--output_dir", str(target)])
    assert (target / name).read_bytes() == hub.files[name]


def test_a_disk_without_room_is_met_before_anything_is_fetched(
    hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(UserError, match="free"):
        download.run(["me/model", "--output_dir", str(tmp_path / "model")])
    assert not any("resolve" in path for _, path, _ in hub.asked)


def test_a_repository_that_is_not_there_is_told_in_words(hub: StandIn) -> None:
    with pytest.raises(UserError, match="no such repository") as e:
        download.run(["me/nothing"])
    assert "--kind" in str(e.value)


def test_a_hub_that_cannot_be_reached_is_told_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.utils import _http

    monkeypatch.setattr(_http.time, "sleep", lambda _: None)  # between its attempts
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be reached") as e:
        download.run(["me/model", "--output_dir", str(tmp_path)])
    assert "mirror" in str(e.value)


def test_offline_the_cache_is_used(
    hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError):
        download.run(["me/model", "--output_dir", str(tmp_path / "none")])
    assert hub.asked == []


def test_which_one_is_asked(hub: StandIn) -> None:
    with pytest.raises(SettingsError, match="which repository"):
        download.run([])


# -- ModelScope, whose client is not installed here ----


class Client:
    """What of ModelScope's client is used."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def list_repo_files(self, repository: str, kind: str, *, revision: str | None) -> list[Any]:
        from types import SimpleNamespace

        self.calls.append((repository, kind, revision))
        data = b"weights"
        return [
            SimpleNamespace(path="sub", size=0, type="tree"),
            SimpleNamespace(
                path="a.safetensors", size=7, type="blob", sha256=hashlib.sha256(data).hexdigest()
            ),
        ]

    def download_repo(self, repository: str, kind: str, **words: Any) -> Path:
        self.calls.append({"repository": repository, "kind": kind, **words})
        folder: Path = words["local_dir"]
        folder.mkdir(parents=True)
        (folder / "a.safetensors").write_bytes(b"weights")
        return folder


def test_modelscope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client()
    monkeypatch.setattr(hubs, "_modelscope", lambda: client)
    target = tmp_path / "there"
    words = ["me/model", "--source", "modelscope", "--output_dir", str(target)]
    assert download.run([*words, "--revision", "v1"]) == 0
    assert client.calls[0] == ("me/model", "model", "v1")
    assert client.calls[1]["allow_patterns"] == ["a.safetensors"]


def test_modelscopes_client_is_named_where_it_is_missing() -> None:
    import importlib.util

    if importlib.util.find_spec("modelscope_hub"):
        pytest.skip("it is installed")
    with pytest.raises(UserError, match="not installed") as e:
        download.run(["me/model", "--source", "modelscope"])
    assert "pip install -e '.[modelscope]'" in str(e.value)
