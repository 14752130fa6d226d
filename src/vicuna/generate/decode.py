"""Decode strategies over any engine: greedy and sampling. Beams have their place beside them.

for event in decode(engine, renderer.prompt(turns), Settings(), renderer):
    if isinstance(event, Piece):
        print(event.text, end="", flush=True)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from vicuna.data.template import Renderer
from vicuna.errors import UserError
from vicuna.generate.engines.base import Cancelled, Engine, OutOfMemory, never
from vicuna.generate.events import Event, Finished, FinishReason, Piece
from vicuna.generate.sampling import Chooser
from vicuna.generate.settings import Settings
from vicuna.generate.stream import StopStrings, TextStream

__all__ = ["Event", "Finished", "Piece", "Settings", "complete", "decode"]


def decode(
    engine: Engine,
    prompt_ids: Sequence[int],
    settings: Settings,
    renderer: Renderer,
    cancel: Callable[[], bool] = never,
) -> Iterator[Event]:
    """Answer a prompt.

    Args:
        prompt_ids: from `renderer.prompt`.
        renderer: gives the tokens that end an answer and the text of the others.
        cancel: asked before anything is computed; once true, the answer ends with what was said.
            Closing the iterator ends the computation as well.

    Yields: a `Piece` for each token and `Finished` at the end.

    Raises: UserError where the prompt leaves no room for an answer.
    """
    if len(prompt_ids) >= engine.context_length:
        raise UserError(
            f"the prompt has {len(prompt_ids)} tokens, but the model's context only "
            f"{engine.context_length}, for prompt and answer together",
            fix="Shorten the question or the system prompt, or in a chat /reset; "
            "or use a model with a longer context.",
        )
    return _events(engine, prompt_ids, settings, renderer, cancel)


def complete(
    engine: Engine, prompt_ids: Sequence[int], settings: Settings, renderer: Renderer
) -> Finished:
    """The whole answer at once; arguments and errors are those of `decode`."""
    for event in decode(engine, prompt_ids, settings, renderer):
        if isinstance(event, Finished):
            return event
    raise AssertionError("an answer always ends with Finished")


def _events(
    engine: Engine,
    prompt_ids: Sequence[int],
    settings: Settings,
    renderer: Renderer,
    cancel: Callable[[], bool],
) -> Iterator[Event]:
    answer = _Answer(settings, renderer, len(prompt_ids), engine.context_length)
    choose = Chooser(settings, prompt_ids, renderer.stop_ids)
    try:
        scores = engine.prefill(prompt_ids, cancel)
        while True:
            token, logprob = choose(scores)
            yield answer.add(token, logprob)
            if answer.reason:
                break
            if cancel():
                raise Cancelled
            scores = engine.step(token)
    except Cancelled:
        answer.reason = "cancelled"
    except OutOfMemory:
        answer.reason = "memory"
    if rest := answer.rest():
        yield Piece(rest, None)
    yield answer.finished()


class _Answer:
    """An answer while it grows: its tokens, its text, and why it ended."""

    def __init__(
        self, settings: Settings, renderer: Renderer, prompt_tokens: int, context: int
    ) -> None:
        self._began = time.perf_counter()
        self._first: float | None = None
        self._prompt_tokens = prompt_tokens
        self._ends = renderer.stop_ids
        self._longest = settings.max_new_tokens
        self._room = context - prompt_tokens
        self._stream = TextStream(renderer.encoder)
        self._stops = StopStrings(settings.stop)
        self._tokens: list[int] = []
        self._texts: list[str] = []
        self._score = 0.0
        self.reason: FinishReason | None = None

    def add(self, token: int, logprob: float) -> Piece:
        """Take a chosen token; `reason` says afterwards whether it was the last."""
        if self._first is None:
            self._first = time.perf_counter() - self._began
        self._tokens.append(token)
        self._score += logprob
        # An end token's spelling is no text, even where the vocabulary does not mark it special.
        ended = token in self._ends
        text = "" if ended else self._stops.push(self._stream.push(token))
        self._texts.append(text)
        if ended:
            self.reason = "stop"
        elif self._stops.found:
            self.reason = "stop_string"
        elif len(self._tokens) >= self._longest:
            self.reason = "length"
        elif len(self._tokens) >= self._room:
            self.reason = "context"
        return Piece(text, token)

    def rest(self) -> str:
        """Text that was held back and can be shown now that nothing follows."""
        text = self._stops.push(self._stream.finish()) + self._stops.finish()
        self._texts.append(text)
        return text

    def finished(self) -> Finished:
        total = time.perf_counter() - self._began
        assert self.reason is not None
        return Finished(
            text="".join(self._texts),
            token_ids=tuple(self._tokens),
            finish_reason=self.reason,
            score=self._score,
            prompt_tokens=self._prompt_tokens,
            first_token_seconds=total if self._first is None else self._first,
            total_seconds=total,
        )
