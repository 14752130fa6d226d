"""How likely each token of an answer was, and what else could have stood in its place.

Tokens are shown as they are, not as markdown, whose marks they would cut. What else there was is
in `data-top` of each; `static/page.js` shows it for the token that is pointed at, tapped, or
reached with the arrow keys.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from vicuna.data.tokenizer import Tokenizer
from vicuna.generate.events import Answer
from vicuna.generate.stream import StreamState, TextStream, token_bytes
from vicuna.generate.thoughts import Parts
from vicuna.web.render import Translate, render

# From which probability on a token is tinted less: five tints, none for the likeliest.
TINTS = (0.1, 0.3, 0.6, 0.9)
_MARKS = {"\n": "↵", "\t": "⇥", "": "▫"}


class ShownToken(NamedTuple):
    """A token of an answer. text: what it added, "" for a part of a character or a mark of the
    end. top: (text, probability) of the likeliest in its place, itself first."""

    text: str
    probability: float
    top: tuple[tuple[str, float], ...]


def shown_tokens(
    answer: Answer, tokenizer: Tokenizer, stops: Sequence[str] = ()
) -> list[ShownToken]:
    """The tokens of an answer that was asked for with `logprobs`; else none."""
    stream, state = TextStream(tokenizer, stops), StreamState()
    found = []
    for token in answer.logprobs or ():
        text, state = stream.push(state, token.token_id)
        likely = [(i, p) for i, p in token.top if i != token.token_id]
        top = [(token.token_id, token.logprob), *likely]
        shown = tuple((_spelled(i, tokenizer), round(math.exp(p), 4)) for i, p in top)
        found.append(ShownToken(text, shown[0][1], shown))
    return found


def thought_tokens(tokens: Sequence[ShownToken], parts: Parts) -> int:
    """How many tokens come before the answer's first: those of the thought and its marks."""
    if not tokens or not parts.thought:
        return 0
    left = len("".join(token.text for token in tokens)) - len(parts.answer)
    for place, token in enumerate(tokens):
        if parts.answer and left <= 0:
            return place
        left -= len(token.text)
    return len(tokens)


def _spelled(token_id: int, tokenizer: Tokenizer) -> str:
    if token_id in tokenizer.control_ids:
        return tokenizer.token(token_id)
    return token_bytes(tokenizer)[token_id].decode("utf-8", "replace")


def html(tokens: Sequence[ShownToken], tr: Translate) -> Markup:
    """All tokens of an answer, tinted, with a place below for what else there was."""
    shown = [
        {
            "text": token.text,
            "tint": sum(token.probability >= least for least in TINTS),
            "top": json.dumps(token.top, ensure_ascii=False),
            "shown": "".join(_MARKS.get(c, "") + c for c in token.text) or _MARKS[""],
        }
        for token in tokens
    ]
    scale = [f"<{TINTS[0]:.0%}", *(f"≥{least:.0%}" for least in TINTS)]
    return render("tokens.tokens", tokens=shown, scale=scale, tr=tr)
