"""An example as the model sees it: what is learned, what is not, and the control tokens.

The terminal (`vicuna data preview`) and the web page colour what is cut up here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vicuna.data.loss_mask import END_TOKEN, NO_TARGET, Example
from vicuna.data.templates.renderer import Renderer
from vicuna.data.tokenizer import Tokenizer

BROKEN = "\ufffd"  # what a decoder writes for half a character


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens in a row of which the same is to be said.

    ids: of one control token; of as many others as there are; of none for an end that is learned
    but does not stand in the sequence (`silent`).
    """

    ids: list[int]
    text: str
    in_loss: bool
    control: bool = False
    silent: bool = False


def spans(example: Example, renderer: Renderer) -> Iterator[Span]:
    """An example cut up; the texts of its spans, one after another, are the text of the example."""
    tokenizer, labels = renderer.tokenizer, example.labels
    held: list[int] = []
    held_in_loss = False
    for position, token in enumerate(example.ids.tolist()):
        in_loss = position > 0 and labels[position - 1] not in (NO_TARGET, END_TOKEN)
        control = token in tokenizer.control_ids
        if held and (control or in_loss != held_in_loss):
            yield Span(held, tokenizer.decode(held), held_in_loss)
            held = []
        if control:
            yield Span([token], tokenizer.token(token), in_loss, control=True)
        else:
            held.append(token)
        held_in_loss = in_loss
        if labels[position] == END_TOKEN:
            if held:
                yield Span(held, tokenizer.decode(held), held_in_loss)
                held = []
            end = tokenizer.token(renderer.end_id)
            yield Span([], end, in_loss=True, control=True, silent=True)
    if held:
        yield Span(held, tokenizer.decode(held), held_in_loss)


def tokens(span: Span, tokenizer: Tokenizer) -> Iterator[tuple[str, list[int]]]:
    """A span token by token, as (text, ids); tokens that share a character come together."""
    if span.control:
        yield span.text, span.ids
        return
    before: list[int] = []
    held: list[int] = []
    for token in span.ids:
        held.append(token)
        # With the token before it: alone, a word would lose the space that it begins with.
        known = tokenizer.decode(before)
        text = tokenizer.decode(before + held)[len(known) :]
        if text.endswith(BROKEN) and len(held) < 8:
            continue
        yield text, held
        before, held = held, []
    if held:
        yield tokenizer.decode(before + held)[len(tokenizer.decode(before)) :], held
