"""Chat templates are programs of strangers: they are rendered in a process that can be abandoned.

A base or an adapter brings its template along, and a template may loop for ever or build a text
that no memory holds, in one operation or in many. No list of forbidden things is ever complete, so
nothing is forbidden: the program runs in a small process of its own (`sandbox_worker.py`), with
so much computing, memory and output for one rendering. What exceeds them ends, and only that.

A worker is kept for the next rendering (about 0.2 ms each); it ends with the process that uses it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import IO, Any

from vicuna.data.templates.placeholders import watched_in
from vicuna.errors import UserError
from vicuna.messages import Message, message, restored

COMPUTING = 2.0  # seconds of a processor that one rendering may take: a usual one takes 1 ms
WAITING = 90.0  # seconds by the clock; only where a system cannot count a process's computing
MEMORY = 512 << 20  # bytes of a worker, the interpreter included
OUTPUT = 16 << 20  # characters of a rendering
SOURCE = 4 << 20  # characters of a template
WORKERS = 4  # renderings at once
# What the worker is started with: the paths of this process and nothing from the environment.
_BOOT = (
    "import sys; sys.path[:] = sys.argv[1:]; "
    "from vicuna.data.templates.sandbox_worker import main; main()"
)
OTHER = Message("Choose another one with --template (alpaca, chatml, llama3 ...).")


class RenderError(Exception):
    """A template that did not render a conversation, in words: it refused, or it is wrong."""


class LimitError(RenderError):
    """A template that wanted more than a rendering may have."""


@dataclass(frozen=True)
class Compiled:
    """A chat template that parses."""

    source: str


@lru_cache(maxsize=64)
def compile_template(source: str) -> Compiled:
    """Parse a Jinja chat template.

    Raises: UserError where it does not parse, or parsing it takes more than it may.
    """
    try:
        if len(source) > SOURCE:
            raise LimitError(
                Message(
                    "it has {count:,} characters, and may have {limit:,}",
                    count=len(source),
                    limit=SOURCE,
                )
            )
        _ask({"source": source, "values": None})
    except RenderError as e:
        raise UserError(
            "the tokenizer's chat template does not parse: {error}",
            error=e.args[0],
            where="template auto",
            fix=OTHER,
        ) from e
    return Compiled(source)


def render(compiled: Compiled, *, now: datetime | None = None, **values: Any) -> str:
    """Render a chat template with these values, as transformers would.

    Args:
        now: what `strftime_now` tells; the present if not given.
        values: of JSON's kinds; what a template looks up by name (`messages` ...).

    Raises: RenderError where the template refuses or fails; LimitError where it exceeds a limit.
    """
    given = {"source": compiled.source, "values": values, "output": OUTPUT}
    return _ask({**given, "now": now.isoformat() if now else None})


def _ask(request: dict[str, Any]) -> str:
    """What a worker answers; one that breaks off is replaced."""
    with _places:
        worker = _idle.pop() if _idle else _Worker()
        try:
            reply = worker.ask({**request, "computing": COMPUTING})
        except BaseException:
            worker.end()
            raise
        _idle.append(worker)
    if "text" in reply:
        return str(reply["text"])
    raise (LimitError if reply.get("limit") else RenderError)(message(restored(reply)["error"]))


class _Worker:
    """A process that renders, and its two pipes. Used by one thread at a time."""

    def __init__(self) -> None:
        paths = [path or os.getcwd() for path in sys.path]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", _BOOT, *paths],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is not meant for it
            )
        except OSError as e:
            raise UserError(
                "a chat template is rendered in a process of its own, and none can start: {error}",
                error=e,
                where="template auto",
                fix="Allow one more process, or choose a template with --template.",
            ) from e
        try:
            self._send({"memory": MEMORY})
            ready = self._receive(1 << 10)
        except (OSError, ValueError) as e:
            ready = {"error": str(e)}
        except BaseException:
            self.end()
            raise
        if "ready" not in ready:
            self.end()
            raise UserError(
                "the process that renders chat templates did not start: {error}",
                error=ready.get("error"),
                where="template auto",
                fix="`vicuna doctor` says what is missing; or choose a template with --template.",
            )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request and its reply. Raises: LimitError where the process did not survive it."""
        late = threading.Timer(WAITING, self._process.kill)
        late.daemon = True
        late.start()
        try:
            self._send(request)
            # A character takes at most twelve bytes of JSON.
            return self._receive(12 * OUTPUT + 4096)
        except (OSError, ValueError):
            raise LimitError(
                Message(
                    "its program needs more than {seconds:g} s of computing or {memory} "
                    "MiB of memory",
                    seconds=COMPUTING,
                    memory=MEMORY >> 20,
                )
            ) from None
        finally:
            late.cancel()

    def end(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        self.close()

    def close(self) -> None:
        """Close this side of the pipes: an idle process ends by that."""
        for pipe in self._pipes:
            with suppress(OSError):  # of what was not sent yet
                pipe.close()

    @property
    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        to, source = self._process.stdin, self._process.stdout
        assert to is not None
        assert source is not None
        return to, source

    def _send(self, value: dict[str, Any]) -> None:
        to, _ = self._pipes
        data = json.dumps(value).encode()
        to.write(len(data).to_bytes(8, "little") + data)
        to.flush()

    def _receive(self, most: int) -> dict[str, Any]:
        """Raises: ValueError where nothing, or no reply, comes."""
        _, source = self._pipes
        head = source.read(8)
        size = int.from_bytes(head, "little")
        if len(head) < 8 or size > most:
            raise ValueError("no reply")
        reply = json.loads(source.read(size))
        if not isinstance(reply, dict):
            raise ValueError("no reply")
        return reply


_idle: list[_Worker] = []
_places = threading.BoundedSemaphore(WORKERS)


def _begin_anew() -> None:
    """In a process that was forked off: the workers are the parent's."""
    global _places
    for worker in _idle:
        worker.close()
    _idle.clear()
    _places = threading.BoundedSemaphore(WORKERS)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


class Program:
    """A template that parses.

    date: the day that `strftime_now` tells (ISO), "" if the template does not ask.
    watched: a pattern of the texts that the template looks for in what is said (`</think>`), None
        if there are none; the same words in another place are rendered another way.
    """

    def __init__(self, source: str, words: dict[str, str], date: str = "") -> None:
        self.date = (date or datetime.now().date().isoformat()) if asks_date(source) else ""
        self._compiled = compile_template(source)
        self.watched = watched_in(source)
        self._words = words

    def render(
        self, messages: list[dict[str, Any]], generate: bool, thinking: bool | None = None
    ) -> str:
        """The conversation as text.

        Args:
            generate: whether the beginning of an answer follows (`add_generation_prompt`).
            thinking: `enable_thinking`, None to leave it to the template.

        Raises: RenderError if the template refuses or fails, LimitError if it takes too much.
        """
        given: dict[str, Any] = {}
        if thinking is not None:
            given = {"enable_thinking": thinking, "thinking": thinking}
        return render(
            self._compiled,
            now=datetime.fromisoformat(self.date) if self.date else None,
            messages=messages,
            add_generation_prompt=generate,
            tools=None,
            documents=None,
            **self._words,
            **given,
        )


def asks_date(source: str) -> bool:
    """Whether a template asks what day it is."""
    return "strftime_now" in source
