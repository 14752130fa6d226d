"""Decode strategies over any engine: greedy, sample, beam search and beam-sample, all streaming.

    for event in decode(engine, renderer.prompt(turns), Settings(num_beams=4), renderer):
        if isinstance(event, Step):
            print(event.text, end="", flush=True)

One loop serves all strategies: it asks a strategy which branches grow by which tokens, an engine
for the logits behind them, and the tree of tokens for the text that is final.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from vicuna.data.templates.renderer import Renderer
from vicuna.errors import UserError
from vicuna.generate.engines.base import Cancelled, Engine, OutOfMemory, never
from vicuna.generate.events import Answer, Beam, Event, Finished, FinishReason, Step
from vicuna.generate.processors import Processors, tokens_of
from vicuna.generate.settings import Settings
from vicuna.generate.strategies import BranchBuilder, strategy_for
from vicuna.generate.stream import TextStream
from vicuna.generate.tree import Node, StablePrefix

__all__ = ["Answer", "Beam", "Event", "Finished", "Settings", "Step", "complete", "decode"]


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

    Yields: a `Step` for each token, one more with the rest of the text, and `Finished` at the end.
        The texts of all steps together are the best answer's.

    Raises: UserError where the prompt leaves no room for an answer, the engine takes fewer rows
        than the settings need, or the vocabulary does not have a token that they name.
    """
    if len(prompt_ids) >= engine.context_length:
        raise UserError(
            "the prompt has {count} tokens, but the model's context only {context_length}, for "
            "prompt and answer together",
            count=len(prompt_ids),
            context_length=engine.context_length,
            fix="Shorten the question or the system prompt, or in a chat /reset; "
            "or use a model with a longer context.",
        )
    if settings.rows > engine.max_rows:
        raise UserError(
            "this engine computes at most {max_rows} beams or answers at a time, not {rows}",
            max_rows=engine.max_rows,
            rows=settings.rows,
            where="num_beams, num_return_sequences",
            fix="Ask for at most {max_rows}, or use another --engine.",
        )
    return _Search(engine, prompt_ids, settings, renderer).events(cancel)


def complete(
    engine: Engine, prompt_ids: Sequence[int], settings: Settings, renderer: Renderer
) -> Finished:
    """The whole answer at once; arguments and errors are those of `decode`."""
    *_, last = decode(engine, prompt_ids, settings, renderer)
    assert isinstance(last, Finished)
    return last


class _Search:
    """One request: its branches, its clock, and the events it gives."""

    def __init__(
        self, engine: Engine, prompt_ids: Sequence[int], settings: Settings, renderer: Renderer
    ) -> None:
        self._began = time.perf_counter()
        self._first: float | None = None
        self._engine, self._prompt, self._settings = engine, list(prompt_ids), settings
        tokenizer = renderer.tokenizer
        ends = {*renderer.stop_ids, *tokens_of(settings.stop_tokens, tokenizer, "stop_tokens")}
        self._builder = BranchBuilder(
            TextStream(tokenizer, settings.stop),
            ends,
            settings.max_new_tokens,
            engine.context_length - len(self._prompt),
        )
        self._processors = Processors(settings, self._prompt, ends, tokenizer)
        self._strategy = strategy_for(settings, self._builder, self._processors, len(ends))
        self._live = [Node()]
        self._stable_prefix = StablePrefix(self._live[0])

    def events(self, cancel: Callable[[], bool]) -> Iterator[Event]:
        """See `decode`."""
        broken: FinishReason | None = None
        try:
            logits = self._engine.prefill(self._prompt, cancel)[None]
            while True:
                yield self._step(logits)
                if self._strategy.done(self._live):
                    break
                if cancel():
                    raise Cancelled
                logits = self._grow()
        except Cancelled:
            broken = "cancelled"
        except OutOfMemory:
            broken = "memory"
        yield from self._end(broken)

    def _grow(self) -> Tensor:
        """The engine's logits behind the open branches."""
        tokens = [node.token_id for node in self._live]
        parents = [node.row for node in self._live]
        self._processors.advance(parents, tokens)
        return self._engine.step(tokens, parents)

    def _step(self, logits: Tensor) -> Step:
        self._live = self._strategy.choose(logits, self._live)
        if self._first is None:
            self._first = time.perf_counter() - self._began
        ranked = self._strategy.pool.ranked
        text = self._stable_prefix.update([*self._live, *(r.node for r in ranked[:1])])
        agreed = self._stable_prefix.length
        return Step(
            text,
            tuple(Beam(node, self._strategy.final(node), agreed) for node in self._live),
            tuple(Beam(r.node, r.score, agreed) for r in ranked),
        )

    def _end(self, broken: FinishReason | None) -> Iterator[Event]:
        """The rest of the text, and the answers."""
        pool = self._strategy.pool
        if broken:
            pool.add(self._live)
        answers = tuple(
            node.answer(score, node.reason)
            if node.reason
            else node.answer(score, broken or "cancelled", self._builder.rest(node))
            for score, node in pool.ranked[: self._settings.num_return_sequences]
        )
        if rest := answers[0].text[self._stable_prefix.length :]:
            yield Step(rest, (), ())
        total = time.perf_counter() - self._began
        yield Finished(
            answers=answers,
            finish_reason=broken or answers[0].finish_reason,
            prompt_tokens=len(self._prompt),
            first_token_seconds=total if self._first is None else self._first,
            total_seconds=total,
        )
