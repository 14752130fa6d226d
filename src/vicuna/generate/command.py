"""`vicuna generate` and `vicuna chat`: from the words behind the command to answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from vicuna import config
from vicuna.data.types import Turn
from vicuna.errors import SettingsError


def generate(words: Sequence[str]) -> int:
    """Answer one instruction, or every record of a file."""
    said: list[str] = []
    settings, _ = config.parse(config.GenerateSettings, words, free=said)
    mistakes = []
    if bool(settings.input) == bool(said):
        mistakes.append('what to answer? Give one "instruction", or --input FILE --output FILE')
    if settings.input and not settings.output:
        mistakes.append("output is missing: where the answers go (--output answers.jsonl)")
    if mistakes:
        raise SettingsError(mistakes)
    from vicuna.generate.batch import answer_file
    from vicuna.generate.decode import Finished, decode
    from vicuna.generate.events import one_shot_json
    from vicuna.generate.load import decoding, open_model

    choice = decoding(settings)
    loaded = open_model(settings)
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)
    if settings.input:
        tally = answer_file(
            loaded.engine, loaded.renderer, choice, Path(settings.input), Path(settings.output),
            settings.system, say=lambda text: print(text, file=sys.stderr),
        )  # fmt: skip
        return 0 if tally.answered or tally.before else 2
    turns = [Turn("system", settings.system)] if settings.system else []
    turns.append(Turn("user", " ".join(said), settings.input_text))
    for event in decode(loaded.engine, loaded.renderer.prompt(turns), choice, loaded.renderer):
        if isinstance(event, Finished):
            if settings.json_output:
                print(json.dumps(one_shot_json([event]), ensure_ascii=False))
            else:
                print()
        elif not settings.json_output:
            print(event.text, end="", flush=True)
    return 0


def chat(words: Sequence[str]) -> int:
    """Talk in the terminal until the user leaves."""
    settings, _ = config.parse(config.AnswerSettings, words)
    from vicuna.generate.load import decoding, open_model
    from vicuna.generate.terminal import converse

    choice = decoding(settings)
    loaded = open_model(settings)
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)
    print("Type /help for what you can do here.")
    converse(loaded.engine, loaded.renderer, choice, settings.system)
    return 0
