"""What people and models wrote, as HTML that can do nothing: no tags of theirs, no script, no
image, nothing that is fetched."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from functools import lru_cache
from html import escape
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererProtocol
from markdown_it.token import Token
from markdown_it.utils import OptionsDict


@lru_cache
def _reader() -> MarkdownIt:
    # html=False: tags are text. Images would be fetched from wherever an answer says.
    reader = MarkdownIt("commonmark", {"html": False, "linkify": False, "breaks": True})
    reader.enable(["table", "strikethrough"]).disable(["image"])
    reader.add_render_rule("link_open", _link)
    return reader


def _link(
    renderer: RendererProtocol,
    tokens: Sequence[Token],
    place: int,
    options: OptionsDict,
    env: MutableMapping[str, Any],
) -> str:
    """A link opens elsewhere, and does not say where it was."""
    tokens[place].attrSet("target", "_blank")
    tokens[place].attrSet("rel", "noopener noreferrer nofollow")
    made: str = renderer.renderToken(tokens, place, options, env)  # type: ignore[attr-defined]
    return made


def html(text: str) -> str:
    """Markdown as HTML."""
    return str(_reader().render(text))


def plain(text: str) -> str:
    """Text as HTML, letter by letter."""
    return escape(text)
