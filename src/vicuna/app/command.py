"""`vicuna web`: from the words behind the command to the open page."""

from __future__ import annotations

from collections.abc import Sequence

from vicuna import config


def run(words: Sequence[str]) -> int:
    """Load the model and open the page until Ctrl-C."""
    settings, _ = config.parse(config.WebSettings, words)
    from vicuna.app.server import serve
    from vicuna.app.state import App

    serve(App(settings))
    return 0
