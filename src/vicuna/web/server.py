"""Opens the page: where it listens, who may come in, which files it may read."""

from __future__ import annotations

import atexit
import errno
import os
import shutil
import socket
import tempfile
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from vicuna.config import WebSettings
from vicuna.errors import UserError
from vicuna.terminal import say
from vicuna.web.gate import Gate, Names
from vicuna.web.login import LOOPBACK, made_up, password
from vicuna.web.state import App

USER = "vicuna"
FIRST_PORT, PORTS = 7860, 40
# Events that wait for gradio; those of the model wait in a queue of their own (`worker.py`).
EVENTS = 400


def serve(app: App, wait: bool = True) -> Any:
    """Open the page; the running `gr.Blocks`, whose `local_url` it is at.

    Args:
        wait: until Ctrl-C; else return at once, the server goes on in threads of its own.

    Raises: UserError where the port is busy, or the password is weak.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    _place_uploads()
    from gradio.route_utils import FnIndexInferError
    from starlette.middleware import Middleware

    from vicuna.web.i18n import Translation
    from vicuna.web.page import HEAD, build
    from vicuna.web.theme import STYLE, theme

    settings = app.settings
    word = password(settings)
    gate = app.gate = Gate(
        Names(settings.host, settings.allowed_hosts),
        settings.read_only,
        int(settings.max_upload * (1 << 30)),
    )
    app.worker  # noqa: B018  the model first: what is wrong with it is said before a page opens
    page = build(app)
    # No limit at once: an event that follows an answer only looks (`ModelWorker.follow`).
    page.queue(default_concurrency_limit=None, max_size=EVENTS)
    if settings.share:
        say("warning: --share opens the page to the internet through somebody else's server")
    page.launch(
        server_name=settings.host,
        server_port=free_port(settings),
        auth=(USER, word) if word else None,
        share=settings.share,
        inbrowser=settings.open,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        enable_monitoring=False,
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        allowed_paths=[],
        max_file_size=gate.upload,
        app_kwargs={
            "middleware": [Middleware(Translation)],
            "lifespan": _behind(gate),
            "exception_handlers": dict.fromkeys((KeyError, FnIndexInferError), _no_such_event),
        },
        head=HEAD,
        theme=theme(),
        css_paths=STYLE,
    )
    if settings.share:
        gate.names.add(str(page.share_url))
    _tell(app, page, word)
    if wait:
        page.block_thread()
    return page


def _tell(app: App, page: Any, word: str) -> None:
    settings = app.settings
    say(f"The page is open at {page.local_url} (Ctrl-C ends it)")
    if word and made_up(settings):
        say(f"user: {USER}   password: {word}")
    elif word:
        say(f"user: {USER}   password: the one you gave")
    if settings.share:
        say(f"and at {page.share_url}, for everybody on the internet who knows this address")
    elif not word and settings.host not in LOOPBACK:
        say("warning: everybody who reaches this machine can use the page: there is no password")


def _place_uploads() -> None:
    """A folder for uploads that nobody else reads, gone with this process."""
    if "GRADIO_TEMP_DIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="vicuna-web-")
        os.environ["GRADIO_TEMP_DIR"] = folder
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


def _behind(gate: Gate) -> Callable[[Any], AbstractAsyncContextManager[None]]:
    """What gradio does when its server starts, before the first request: put the gate before all.

    A middleware that gradio is given comes behind its own, which answers other pages itself.
    """

    @asynccontextmanager
    async def start(server: Any) -> AsyncIterator[None]:
        from vicuna.web.headers import Headers

        gate.inner, gate.server = server.middleware_stack, server
        server.middleware_stack = Headers(gate)
        yield

    return start


def _no_such_event(request: Any, error: Exception) -> Any:
    """The answer to who names an event that the page lacks: a program, or a page of yesterday.

    Raises: `error`, if it came from anything else.
    """
    from starlette.responses import JSONResponse

    from vicuna.web.i18n import language_in, translate

    if traceback.extract_tb(error.__traceback__)[-1].name != "get_fn":
        raise error
    return JSONResponse({"detail": translate(language_in(request.scope), "gate.event")}, 404)


def free_port(settings: WebSettings) -> int:
    """The port that was asked for, or the first free one from 7860 on.

    Raises: UserError if it is in use, or cannot be had.
    """
    wanted = settings.port
    for port in [wanted] if wanted else range(FIRST_PORT, FIRST_PORT + PORTS):
        try:
            # Gradio tries a port on this machine's own address, wherever it listens then.
            for host in dict.fromkeys((settings.host, "127.0.0.1")):
                _probe(host, port)
        except OSError as e:
            error = e
            continue
        return port
    if not wanted:
        raise UserError(
            "no port from {first_port} to {last_port} of {host} can be used: {reason}",
            first_port=FIRST_PORT,
            last_port=FIRST_PORT + PORTS - 1,
            host=settings.host,
            reason=error.strerror or error,
            where="port",
            fix="Name another with --port.",
        )
    if error.errno == errno.EADDRINUSE:
        raise UserError(
            "port {value} of {host} is in use",
            value=wanted,
            host=settings.host,
            where="port",
            fix="Close the program that uses it, or choose another --port.",
        )
    raise UserError(
        "port {value} of {host} cannot be used: {reason}",
        value=wanted,
        host=settings.host,
        reason=error.strerror or error,
        where="port",
        fix="Leave out --port for the first free one, or name another.",
    )


def _probe(host: str, port: int) -> None:
    """Raises: OSError where nothing can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
