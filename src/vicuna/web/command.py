"""`vicuna web`: from the words behind the command to the open page."""

from __future__ import annotations

from collections.abc import Sequence

from vicuna import config
from vicuna.errors import UserError
from vicuna.system_errors import install_extra
from vicuna.terminal import say


def run(words: Sequence[str]) -> int:
    """Load the model and open the page until Ctrl-C."""
    settings, _ = config.parse(config.WebSettings, words)
    try:
        import gradio  # noqa: F401
    except ImportError as e:
        raise UserError("the page needs gradio", fix=install_extra("web")) from e
    from vicuna.web.server import serve
    from vicuna.web.state import App

    app = App(settings)
    try:
        serve(app)
    except KeyboardInterrupt:
        say()
    finally:
        app.close()
    return 0
