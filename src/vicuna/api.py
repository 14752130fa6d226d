"""The Python interface: load a model once, then ask it.

import vicuna

model = vicuna.load(adapter="runs/demo")
print(model.generate("春天有什么水果？").text)

for event in model.stream([{"role": "user", "content": "写一首诗"}], num_beams=4):
    if isinstance(event, vicuna.Step):
        print(event.text, end="", flush=True)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from vicuna import config
from vicuna.config import AnswerSettings
from vicuna.data.types import Turn
from vicuna.errors import UserError
from vicuna.generate.chat import Fitted, fit
from vicuna.generate.decode import decode
from vicuna.generate.engines.base import never
from vicuna.generate.events import Event, Finished
from vicuna.generate.load import Loaded, open_model
from vicuna.generate.settings import Settings

# A question; or a conversation: turns, or OpenAI's messages.
Messages = str | Sequence[Turn | Mapping[str, str]]


def load(
    model: str = "",
    adapter: str = "",
    *,
    engine: str = "torch",
    precision: str = "auto",
    template: str = "",
    **more: Any,
) -> Model:
    """Open a base, perhaps with an adapter.

    Args:
        model: smollm2-135m, a folder, a .gguf file or a hub id; where not given, the base that the
            adapter names, else smollm2-135m.
        adapter: an adapter's or a run's folder, or a hub id, of any age.
        engine: torch, llama.cpp or vllm.
        precision: auto, fp32, bf16, fp16, int8 or nf4.
        template: where not given the adapter's own, else the tokenizer's.
        more: further settings of `vicuna generate`, such as `context_length`.

    Raises: UserError where something is missing or base and adapter do not belong together.
    """
    given = {"model": model, "adapter": adapter, "engine": engine, "precision": precision}
    settings = config.build(AnswerSettings, {**given, "template": template, **more})
    return Model(open_model(settings))


class Model:
    """A loaded model. One request at a time; what a request has in common with the last one is not
    computed again."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self.notes = loaded.notes
        for note in loaded.notes:
            warnings.warn(note, stacklevel=3)

    @property
    def context_length(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self._loaded.engine.context_length

    def stream(
        self, messages: Messages, *, cancel: Callable[[], bool] = never, **settings: Any
    ) -> Iterator[Event]:
        """Answer, telling how things stand after each token.

        Args:
            messages: a question, or a conversation that ends with one.
            cancel: once it returns true, the answer ends with what was said.
            settings: those of `vicuna.Settings`, such as max_new_tokens, num_beams, do_sample.

        Yields: `Step` for each token, whose `text` is final; `Finished` at the end.

        Raises: UserError (SettingsError) for settings that are wrong or have no effect, and where
            the question alone does not fit the context.
        """
        choice = config.build(Settings, settings)
        fitted = self.fit(messages, choice.max_new_tokens)
        if fitted.dropped:
            count = len(fitted.dropped)
            warnings.warn(f"the {count} oldest turns no longer fit the context", stacklevel=2)
        loaded = self._loaded
        return decode(loaded.engine, fitted.prompt_ids, choice, loaded.renderer, cancel)

    def generate(
        self, messages: Messages, *, cancel: Callable[[], bool] = never, **settings: Any
    ) -> Finished:
        """The same, at once: `text` is the best answer's, `answers` has all that were asked for."""
        for event in self.stream(messages, cancel=cancel, **settings):
            if isinstance(event, Finished):
                return event
        raise AssertionError("an answer always ends with Finished")

    def fit(self, messages: Messages, reserve: int) -> Fitted:
        """What `stream` computes for a conversation: the turns that fit, their prompt (token ids),
        and the oldest turns, which are dropped for it. `reserve` tokens are kept for the answer."""
        engine, renderer = self._loaded.engine, self._loaded.renderer
        return fit(_turns(messages), renderer, engine.context_length, reserve)

    def set_adapter(self, name: str | None, strength: float = 1.0) -> None:
        """Switch the adapter off (None) or on again ("adapter"; "default" with torch), at a
        strength.

        Raises: UserError where nothing was loaded that could be switched.
        """
        switch = getattr(self._loaded.engine, "set_adapter", None)
        if switch is None:
            raise UserError("this engine has no adapters to switch", where="set_adapter")
        switch(name, strength)

    def close(self) -> None:
        """Free what the engine holds; the model is of no use afterwards."""
        engine = self._loaded.engine
        engine.forget()
        close = getattr(engine, "close", None)
        if close is not None:
            close()


def _turns(messages: Messages) -> list[Turn]:
    """Turns of a question or conversation.

    Raises: UserError where it does not end with a question.
    """
    if isinstance(messages, str):
        return [Turn("user", messages)]
    turns = [m if isinstance(m, Turn) else _turn(m) for m in messages]
    if not turns or turns[-1].role != "user":
        raise UserError(
            "a conversation to answer ends with a question", where="messages",
            fix='Let the last message have the role "user".',
        )  # fmt: skip
    return turns


def _turn(message: Mapping[str, str]) -> Turn:
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant") or not isinstance(content, str):
        raise UserError(
            f"not a message: {dict(message)!r}",
            where="messages",
            fix='A message is {"role": "system" | "user" | "assistant", "content": TEXT}.',
        )
    return Turn(role, content)  # type: ignore[arg-type]
