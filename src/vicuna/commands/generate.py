"""`vicuna generate` and `vicuna chat`: from the words behind the command to answers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vicuna import config
from vicuna.data.conversation import Turn
from vicuna.errors import SettingsError, UserError
from vicuna.messages import Message
from vicuna.terminal import say, say_json

if TYPE_CHECKING:
    from vicuna.generate.load import ChatModel
    from vicuna.generate.settings import Settings


def generate(words: Sequence[str]) -> int:
    """Answer one instruction, or every record of a file."""
    said: list[str] = []
    settings, _ = config.parse(config.GenerateSettings, words, free=said)
    mistakes = _generate_mistakes(settings, said)
    choice = _choice(settings, mistakes)
    loaded = _open(settings)
    if settings.input:
        return _answer_file(loaded, settings, choice)
    turns = [Turn("system", settings.system)] if settings.system else []
    turns.append(Turn("user", " ".join(said), settings.input_text))
    _answer(loaded, settings, choice, turns)
    return 0


def chat(words: Sequence[str]) -> int:
    """Talk in the terminal until the user leaves."""
    settings, _ = config.parse(config.AnswerSettings, words)
    return _converse(settings, [])


def run_file(words: Sequence[str]) -> int:
    """Talk with a GGUF file: `chat`, computed by llama.cpp from the file as it is."""
    named: list[str] = []
    settings, _ = config.parse(config.RunSettings, words, free=named)
    mistakes = []
    if len(named) + bool(settings.model) != 1:
        mistakes.append("which file? vicuna run FILE.gguf")
    elif named:
        settings.model = named[0]
    if settings.model and not settings.model.lower().endswith(".gguf"):
        mistakes.append(
            Message(
                "{model} is no .gguf file; vicuna export gguf makes one, vicuna chat "
                "talks with any model",
                model=settings.model,
            )
        )
    return _converse(settings, mistakes)


def _converse(settings: config.AnswerSettings, mistakes: list[str]) -> int:
    if settings.num_return_sequences > 1:
        mistakes.append("num_return_sequences: a conversation goes on with one answer")
    if settings.logprobs:
        mistakes.append("logprobs are not shown in a conversation: vicuna generate --json")
    choice = _choice(settings, mistakes)
    loaded = _open(settings)
    from vicuna.commands.beam_view import view_of
    from vicuna.commands.chat import converse

    say("Type /help for what you can do here.")
    view = partial(view_of, show_beams=settings.show_beams)
    switch = loaded.set_adapter
    converse(loaded.engine, loaded.renderer, choice, settings.system, view=view, switch=switch)
    return 0


def _generate_mistakes(settings: config.GenerateSettings, said: Sequence[str]) -> list[str]:
    mistakes = []
    if bool(settings.input) == bool(said):
        mistakes.append('what to answer? Give one "instruction", or --input FILE --output FILE')
    elif said and not " ".join(said).strip():
        mistakes.append("the instruction is empty: there is nothing to answer")
    if settings.input and not settings.output:
        mistakes.append("output is missing: where the answers go (--output answers.jsonl)")
    if settings.show_beams and (settings.input or settings.json_output):
        mistakes.append("show_beams draws one answer in the terminal: not with --input or --json")
    if settings.logprobs and not (settings.input or settings.json_output):
        mistakes.append("logprobs are shown with --json, and in the lines of --output")
    return mistakes


def _choice(settings: config.AnswerSettings, mistakes: Sequence[str]) -> Settings:
    """The decoder's settings. Raises: SettingsError with `mistakes` and those found here."""
    from vicuna.generate.load import decoding

    try:
        choice = decoding(settings)
    except SettingsError as e:
        raise SettingsError([*mistakes, *e.mistakes]) from e
    if mistakes:
        raise SettingsError(list(mistakes))
    return choice


def _open(settings: config.AnswerSettings) -> ChatModel:
    from vicuna.generate.load import open_model

    loaded = open_model(settings)
    for note in filter(None, [*loaded.notes, loaded.about]):
        say(f"note: {note}", error=True)
    return loaded


def _answer_file(loaded: ChatModel, settings: config.GenerateSettings, choice: Settings) -> int:
    from vicuna.generate.batch import answer_file

    tally = answer_file(
        loaded.engine, loaded.renderer, choice, Path(settings.input), Path(settings.output),
        settings.system, say=partial(say, error=True),
    )  # fmt: skip
    if not tally.answered and not tally.before:
        raise UserError(
            "no record of this file could be answered",
            where=settings.input,
            fix="See the reasons above, or vicuna data check.",
        )
    return 0


def _answer(
    loaded: ChatModel, settings: config.GenerateSettings, choice: Settings, turns: Sequence[Turn]
) -> None:
    """Print the answer, typed as it comes, or all answers as JSON."""
    from vicuna.commands.beam_view import view_of
    from vicuna.commands.chat import write, write_dim
    from vicuna.generate.chat import check_length
    from vicuna.generate.decode import Finished, complete, decode
    from vicuna.generate.events import one_shot_json
    from vicuna.generate.thoughts import Typed

    check_length(turns, loaded.engine.context_length)
    prompt = loaded.renderer.prompt(turns)
    marks = loaded.renderer.template.thought_marks()
    if settings.json_output:
        finished = complete(loaded.engine, prompt, choice, loaded.renderer)
        say_json(one_shot_json(finished, marks))
        return
    typed = Typed(write, marks, write_dim)
    with view_of(typed, settings.show_beams) as show:
        for event in decode(loaded.engine, prompt, choice, loaded.renderer):
            if isinstance(event, Finished):
                finished = event
            else:
                show(event)
    typed.finish()
    say()
    for place, answer in enumerate(finished.answers[1:], 2):
        say(f"--- {place}: {answer.score:.3f}\n{answer.text}")
