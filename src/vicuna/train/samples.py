"""Answers to the sample prompts during training: what the model says, not only what it loses."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from vicuna.data.conversation import Turn
from vicuna.errors import UserError
from vicuna.generate.engines.torch import open_engine
from vicuna.generate.together import answer_together, groups
from vicuna.train.setup import Session

# Seconds that answers may always take at one time, however short the training was so far.
ALWAYS = 5.0
_CUT = ("cancelled", "memory")


class Budget:
    """The time for answers: a share of the time trained, less what answers took before.

    Args:
        share: 0: no limit. trained, spent: seconds so far, of updates and of answers.
    """

    def __init__(self, share: float, trained: float, spent: float) -> None:
        self._began = time.perf_counter()
        self._room = max(ALWAYS, share * trained - spent) if share else math.inf

    @property
    def used(self) -> float:
        """Seconds since it was opened."""
        return time.perf_counter() - self._began

    @property
    def gone(self) -> bool:
        """Whether there is no time left."""
        return self.used > self._room


def out_of_time(step: int, whole: int, asked: int, share: float) -> str:
    """What is said when answers were cut off."""
    return (
        f"step {step}: {whole} of {asked} sample answers are whole, then their time was used up "
        f"({share:.0%} of the time trained; --sample_share changes it)"
    )


@dataclass
class Answered:
    """whole: whether it ended, at its end or its greatest length, before it was cut off."""

    prompt: str
    answer: str
    whole: bool


def answer(
    session: Session, prompts: Sequence[str], enough: Callable[[], bool]
) -> Iterator[Answered]:
    """Greedy answers with the weights as they are now; no random state is used.

    Args:
        enough: asked before each token; once true, answers are cut off, and prompts that were not
            begun are left out.
    """
    trainable, renderer = session.trainable, session.renderer
    longest = session.settings.sample_tokens
    trainable.plain_attention()
    try:
        engine = open_engine(trainable.model, session.context)
        ids = [renderer.prompt([Turn("user", prompt)]) for prompt in prompts]
        fitting = [n for n, i in enumerate(ids) if len(i) < engine.context_length]
        for n in sorted(set(range(len(prompts))) - set(fitting)):
            yield Answered(
                prompts[n],
                f"(no answer: {len(ids[n])} tokens, the context has {engine.context_length})",
                True,
            )
        # Whether the cache of transformers' own forward can be forked is the model's affair.
        rows = engine.max_rows if trainable.llama is not None else 1
        for group in groups([ids[n] for n in fitting], rows, longest) if fitting else ():
            if enough():
                return
            places = [fitting[k] for k in group]
            try:
                told = [
                    Answered(prompts[n], found.text, found.finish_reason not in _CUT)
                    for n, found in zip(
                        places,
                        answer_together(
                            engine, [ids[n] for n in places], longest, renderer, enough
                        ),
                    )
                ]
            except UserError as e:  # scores that are not finite: training goes on
                told = [Answered(prompts[n], f"(no answer: {e.what})", True) for n in places]
            yield from told
    finally:
        trainable.packed_attention()
