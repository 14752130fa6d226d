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
from types import TracebackType
from typing import Any

from vicuna import config
from vicuna.config import AnswerSettings
from vicuna.data.conversation import Turn
from vicuna.errors import UserError
from vicuna.generate.chat import Fitted, fit
from vicuna.generate.decode import decode
from vicuna.generate.engines.base import never
from vicuna.generate.events import Event, Finished
from vicuna.generate.load import ChatModel, open_model
from vicuna.generate.settings import Settings
from vicuna.messages import Message

# A question; or a conversation: turns, or OpenAI's messages.
Messages = str | Sequence[Turn | Mapping[str, str]]


def load(
    model: str = "",
    adapter: str = "",
    *,
    engine: str = "torch",
    precision: str = "auto",
    template: str = "",
    thinking: str = "auto",
    context_length: int = 0,
    cache_type: str = "auto",
    device_map: str = "auto",
    allow_other_base: bool = False,
    threads: int = 0,
    num_beams: int = 1,
    num_return_sequences: int = 1,
    max_new_tokens: int = 512,
) -> Model:
    """Open a base, perhaps with an adapter.

    Args:
        model: smollm2-135m, a folder, a .gguf file or a hub id; where not given, the base that the
            adapter names, else smollm2-135m.
        adapter: an adapter's or a run's folder, or a hub id, of any age.
        engine: torch, llama.cpp or vllm.
        precision: auto, fp32, bf16, fp16, int8 or nf4.
        template: where not given the adapter's own, else the tokenizer's.
        thinking: on or off, whether answers begin with a thought; auto: as the adapter was trained,
            else as the base's own template has it.
        context_length: tokens of prompt and answer together; 0: the model's own.
        cache_type: what keys and values are kept in: auto, f32, f16 or q8_0.
        device_map: where torch puts the base: auto, cpu, cuda:0, or several (cuda:0,cuda:1).
        allow_other_base: accept an adapter that belongs to other weights.
        threads: that llama.cpp computes with; 0: one for each core it may use.
        num_beams, num_return_sequences, max_new_tokens: the most that requests will ask for, so
            that llama.cpp, whose cache is one block made here, has room for them beside a full
            context. The other engines' caches grow.

    Raises: UserError where something is missing or base and adapter do not belong together.

    Warns: of what is odd about base or adapter; `Model.notes` has it too.
    """
    given = {
        "model": model,
        "adapter": adapter,
        "engine": engine,
        "precision": precision,
        "template": template,
        "thinking": thinking,
        "context_length": context_length,
        "cache_type": cache_type,
        "device_map": device_map,
        "allow_other_base": allow_other_base,
        "threads": threads,
        "num_beams": num_beams,
        "num_return_sequences": num_return_sequences,
        "max_new_tokens": max_new_tokens,
    }
    settings = config.build(AnswerSettings, given)
    with warnings.catch_warnings():
        # Deprecations inside libraries are not the user's business.
        warnings.simplefilter("ignore", FutureWarning)
        loaded = open_model(settings)
    return Model(loaded)


class Model:
    """A loaded model. What a request has in common with the last one is not computed again.

    It answers one request at a time and belongs to one thread: a request that begins ends the one
    before, whose `Finished` then says `cancelled`.

    notes: what was found when it was loaded.
    """

    def __init__(self, loaded: ChatModel) -> None:
        self._opened: ChatModel | None = loaded
        self._request = object()  # stands for the request that may compute
        self.notes = [n for n in (*loaded.notes, loaded.about) if n]
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
            messages: a question, or a conversation that ends with one. The oldest questions go,
                with their answers and a warning, where it does not fit the context.
            cancel: asked before each token; once it returns true, the answer ends with what was
                said.
            settings: those of `vicuna.Settings`, such as max_new_tokens, num_beams, do_sample.

        Yields: `Step` for each token, whose `text` is final; `Finished` at the end.

        Raises: at once, UserError (SettingsError) for settings that are wrong or have no effect,
            for what is no conversation, and where the question alone does not fit the context.
        """
        return self._answer(messages, cancel, settings)

    def generate(
        self, messages: Messages, *, cancel: Callable[[], bool] = never, **settings: Any
    ) -> Finished:
        """The same, at once: `text` is the best answer's, `answers` has all that were asked for."""
        *_, last = self._answer(messages, cancel, settings)
        assert isinstance(last, Finished)
        return last

    def fit(self, messages: Messages, reserve: int = 256) -> Fitted:
        """What `stream` computes for a conversation: the turns that fit, their prompt (token ids),
        and the oldest turns, which are dropped for it. `reserve` tokens are kept for the answer."""
        engine, renderer = self._loaded.engine, self._loaded.renderer
        return fit(_turns(messages), renderer, engine.context_length, reserve)

    def load_adapter(self, name: str, adapter: str) -> None:
        """Load a further adapter beside the base, under a name. `set_adapter` chooses it.

        Args:
            adapter: an adapter's or a run's folder, or a hub id, of any age.

        Raises: UserError where it does not belong to the base.

        Warns: of what is odd about it; `notes` has it too.
        """
        self._request = object()
        for note in self._loaded.load_adapter(name, adapter):
            self.notes.append(note)
            warnings.warn(note, stacklevel=2)

    def drop_adapter(self, name: str) -> None:
        """Free an adapter.

        Raises: UserError where there is none of this name.
        """
        self._request = object()
        self._loaded.drop_adapter(name)

    def set_adapter(self, which: bool | str | Mapping[str, float], strength: float = 1.0) -> None:
        """Answer with adapters from now on, or with the base alone.

        Args:
            which: true for the one that the model was loaded with (its name is "default"), false
                for the base alone; a name; or several with the strength of each:
                {"law": 0.7, "medicine": 0.3}. The prompt is that of the heaviest one's template.
            strength: multiplies what the adapter adds; vLLM knows only 0 and 1.

        Raises: UserError where no such adapter is loaded, or the engine cannot scale or mix it so.
        """
        self._request = object()
        self._loaded.set_adapter(which, strength)

    def close(self) -> None:
        """Free what the engine holds; the model is of no use afterwards. May be called twice."""
        if self._opened is None:
            return
        engine, self._opened, self._request = self._opened.engine, None, object()
        engine.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _loaded(self) -> ChatModel:
        if self._opened is None:
            raise UserError("this model was closed", fix="Load it again: vicuna.load(...).")
        return self._opened

    def _answer(
        self, messages: Messages, cancel: Callable[[], bool], settings: dict[str, Any]
    ) -> Iterator[Event]:
        """See `stream`. What can be refused is refused here, before anything is asked for."""
        choice = config.build(Settings, settings)
        fitted = self.fit(messages, choice.max_new_tokens)
        if fitted.dropped:
            warnings.warn(
                Message(
                    "the {count} oldest turns no longer fit the context of "
                    "{context_length} tokens and were left out",
                    count=len(fitted.dropped),
                    context_length=self.context_length,
                ),
                stacklevel=3,
            )
        request, loaded = object(), self._loaded

        def over() -> bool:
            return self._request is not request or cancel()

        events = decode(loaded.engine, fitted.prompt_ids, choice, loaded.renderer, over)
        return self._run(events, request)

    def _run(self, events: Iterator[Event], request: object) -> Iterator[Event]:
        self._request = request
        yield from events


def _turns(messages: Messages) -> list[Turn]:
    """Turns of a question or conversation.

    Raises: UserError where it is none, or does not end with a question.
    """
    if isinstance(messages, str):
        return [Turn("user", messages)]
    if isinstance(messages, Mapping):
        raise UserError(
            "one message is no conversation", where="messages", fix="Give a list: [message]."
        )
    turns = [m if isinstance(m, Turn) else _turn(m) for m in messages]
    spoken = turns[1:] if turns and turns[0].role == "system" else turns
    roles = [turn.role for turn in spoken]
    if len(roles) % 2 == 0 or roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise UserError(
            "not a conversation to answer: its roles are {turns}",
            turns=[turn.role for turn in turns],
            where="messages",
            fix="Perhaps a system message, then user and assistant in turn, a user's at the end.",
        )
    return turns


def _turn(message: Mapping[str, str]) -> Turn:
    if isinstance(message, Mapping):
        role, text = message.get("role"), message.get("content")
        if role in ("system", "user", "assistant") and isinstance(text, str):
            return Turn(role, text)  # type: ignore[arg-type]
    raise UserError(
        "not a message: {message!r}",
        message=message,
        where="messages",
        fix='A message is {{"role": "system" | "user" | "assistant", "content": TEXT}}.',
    )
