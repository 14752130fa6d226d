"""Answers to the sample prompts during training: what the model says, not only what it loses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vicuna.data.types import Turn
from vicuna.errors import UserError
from vicuna.generate.decode import complete
from vicuna.generate.engines.torch import open_engine
from vicuna.generate.settings import Settings
from vicuna.train.setup import Session


def answer(session: Session, prompts: Sequence[str], tokens: int) -> Iterator[tuple[str, str]]:
    """(prompt, greedy answer) with the weights as they are now. Greedy: no random state is used."""
    learner = session.learner
    learner.plain_attention()
    try:
        engine = open_engine(learner.model, session.context)
        settings = Settings(max_new_tokens=tokens)
        for prompt in prompts:
            ids = session.renderer.prompt([Turn("user", prompt)])
            try:
                text = complete(engine, ids, settings, session.renderer).text
            except UserError as e:
                # A prompt that is too long, or scores that are not finite: training goes on.
                text = f"(no answer: {e.what})"
            yield prompt, text
    finally:
        learner.packed_attention()
