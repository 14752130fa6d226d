"""The process in which chat templates are rendered (see `sandbox.py`).

Requests and replies are JSON, each behind its length in eight bytes. Jinja is set up as in
transformers: sandboxed and immutable, with loop controls, the `generation` tag, `tojson`,
`raise_exception` and `strftime_now`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any, BinaryIO

from vicuna.messages import Message, with_messages


def main() -> None:
    """Answer requests until the other side is gone."""
    source, to = sys.stdin.buffer, sys.stdout.buffer
    # What a template might print must not be taken for a reply.
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    first = _receive(source)
    if first is None:
        return
    try:
        import jinja2.sandbox  # noqa: F401
    except ImportError as e:
        _send(to, {"error": str(e)})
        return
    _limit_memory(int(first["memory"]))
    _send(to, {"ready": True})
    while (request := _receive(source)) is not None:
        _limit_computing(float(request["computing"]))
        reply = _answer(request)
        _limit_computing(0.0)
        _send(to, with_messages(reply))


def _limit_memory(most: int) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    for kind, limit in ((resource.RLIMIT_AS, most), (resource.RLIMIT_CORE, 0)):
        try:
            resource.setrlimit(kind, (limit, limit))
        except (ValueError, OSError):  # a system that has no such limit, or a lower one
            continue


def _limit_computing(seconds: float) -> None:
    """The kernel ends this process when it has computed for so long; 0: not."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        template = _compile(request["source"])
        if request["values"] is None:
            return {"text": ""}
        now = datetime.fromisoformat(request["now"]) if request["now"] else datetime.now()
        pieces: list[str] = []
        left = int(request["output"])
        values = {**request["values"], "strftime_now": now.strftime}
        for piece in template.generate(values):
            left -= len(piece)
            if left < 0:
                most = f"{request['output']:,}"
                return {
                    "limit": True,
                    "error": Message("its program writes more than {most} characters", most=most),
                }
            pieces.append(piece)
        return {"text": "".join(pieces)}
    except RecursionError:
        return {"limit": True, "error": Message("its program calls itself too often")}
    except (MemoryError, OverflowError):
        return {"limit": True, "error": Message("its program needs too much memory")}
    except Exception as e:
        return {"error": str(e)[:2000] or type(e).__name__}


@lru_cache(maxsize=8)
def _compile(source: str) -> Any:
    return environment().from_string(source)


def environment() -> Any:
    """Jinja as transformers sets it up. Whoever is not this process may parse with it, no more."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the assistant says; it is rendered like all else."""

        tags = {"generation"}  # noqa: RUF012  jinja wants it here

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = nodes.CallBlock(self.call_method("_said"), [], [], body)
            return call.set_lineno(line)

        def _said(self, caller: Any) -> str:
            return str(caller())

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    env.globals["raise_exception"] = raise_exception
    env.filters["tojson"] = tojson
    return env


def _receive(source: BinaryIO) -> dict[str, Any] | None:
    head = source.read(8)
    if len(head) < 8:
        return None
    found: dict[str, Any] = json.loads(source.read(int.from_bytes(head, "little")))
    return found


def _send(to: BinaryIO, value: dict[str, Any]) -> None:
    data = json.dumps(value).encode()
    to.write(len(data).to_bytes(8, "little") + data)
    to.flush()
