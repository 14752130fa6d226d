"""Opens the page: where it listens, who may come in, which files it may read."""

from __future__ import annotations

import os
import secrets
import socket
from typing import Any

from vicuna.app.state import App
from vicuna.config import WebSettings
from vicuna.errors import UserError

USER = "vicuna"
FIRST_PORT, PORTS = 7860, 40
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(app: App, wait: bool = True) -> Any:
    """Open the page; the running `gr.Blocks`, whose `local_url` it is at.

    Args:
        wait: until Ctrl-C; else return at once, the server goes on in threads of its own.

    Raises: UserError where the port is busy.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from starlette.middleware import Middleware

    from vicuna.app.headers import Headers
    from vicuna.app.page import HEAD, build
    from vicuna.app.theme import STYLE, theme
    from vicuna.app.words import Translation

    settings = app.settings
    app.room  # noqa: B018  the model first: what is wrong with it is said before a page opens
    page = build(app)
    page.queue(default_concurrency_limit=64)
    if settings.share:
        print("warning: --share opens the page to the internet through somebody else's server")
    page.launch(
        server_name=settings.host,
        server_port=free_port(settings),
        auth=(USER, word) if (word := password(settings)) else None,
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
        max_file_size="2gb",
        app_kwargs={"middleware": [Middleware(Translation), Middleware(Headers)]},
        head=HEAD,
        theme=theme(),
        css_paths=STYLE,
    )
    _tell(app, page, word)
    if wait:
        page.block_thread()
    return page


def _tell(app: App, page: Any, word: str) -> None:
    settings = app.settings
    print(f"The page is open at {page.local_url} (Ctrl-C ends it)")
    if word:
        print(f"user: {USER}   password: {word}")
    if settings.share:
        print(f"and at {page.share_url}, for everybody on the internet who knows this address")
    elif not word and settings.host not in _LOOPBACK:
        print("warning: everybody who reaches this machine can use the page: there is no password")


def password(settings: WebSettings) -> str:
    """What has to be typed before the page opens: what was given; one that is made up where others
    can reach the page; "" for nothing."""
    if not settings.auth:
        return ""
    reachable = settings.share or settings.host not in _LOOPBACK
    return settings.password or (secrets.token_urlsafe(9) if reachable else "")


def free_port(settings: WebSettings) -> int:
    """The port that was asked for, or the first free one from 7860 on.

    Raises: UserError where it is busy.
    """
    wanted = settings.port
    for port in [wanted] if wanted else range(FIRST_PORT, FIRST_PORT + PORTS):
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((settings.host, port))
            except OSError as e:
                reason = e.strerror or str(e)
                continue
        return port
    which = f"port {wanted}" if wanted else f"no port from {FIRST_PORT} to {FIRST_PORT + PORTS - 1}"
    raise UserError(
        f"{which} of {settings.host} can be used: {reason}",
        where="port",
        fix="Leave out --port for the first free one, or name another.",
    )
