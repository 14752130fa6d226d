"""What people and models wrote, as HTML that can do nothing: no tags of theirs, no script, no
image, nothing that is fetched."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from functools import lru_cache
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererProtocol
from markdown_it.token import Token
from markdown_it.utils import OptionsDict
from markupsafe import Markup

from vicuna.web import code_html


@lru_cache
def _reader(grows: bool = False) -> MarkdownIt:
    # html=False: tags are text. Images would be fetched from wherever an answer says.
    colour = code_html.growing if grows else code_html.coloured
    options: dict[str, Any] = {
        "html": False, "linkify": False, "breaks": True,
        "highlight": lambda code, language, _: colour(code, language),
    }  # fmt: skip
    reader = MarkdownIt("commonmark", options)
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


@lru_cache(maxsize=256)
def html(text: str) -> Markup:
    """Markdown as HTML."""
    return Markup(_reader().render(text))


class Growing:
    """Markdown that grows: blocks that nothing can change any more are rendered once.

    What two later blocks follow counts as such. A list whose points are far apart may look denser
    until the answer is whole and rendered as one.
    """

    def __init__(self) -> None:
        self._done, self._html = "", ""

    def __call__(self, text: str) -> Markup:
        """All of the text as HTML. Where its beginning is another one, it begins anew."""
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        if not text.startswith(self._done):
            self._done, self._html = "", ""
        reader, rest = _reader(grows=True), text[len(self._done) :]
        env: dict[str, Any] = {}
        tokens = reader.parse(rest, env)
        blocks = [t.map[0] for t in tokens if t.level == 0 and t.map and t.nesting >= 0]
        if len(blocks) < 3:
            return Markup(self._html + str(reader.renderer.render(tokens, reader.options, env)))
        done = "".join(f"{line}\n" for line in rest.split("\n")[: blocks[-2]])
        self._html += str(reader.render(done))
        self._done += done
        return Markup(self._html + str(reader.render(rest[len(done) :])))
