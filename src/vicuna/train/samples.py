"""Answers to the sample prompts during training: what the model says, not only its loss."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from vicuna.config import TrainSettings
from vicuna.data.conversation import Turn
from vicuna.data.templates.renderer import Renderer
from vicuna.errors import UserError
from vicuna.generate.batched_greedy import answer_together, groups
from vicuna.generate.engines.torch import open_engine
from vicuna.messages import Message
from vicuna.model.trainable import TrainableModel
from vicuna.train.checkpoint import State
from vicuna.train.progress import RunConsole
from vicuna.train.run_folder import RunFolder

# Seconds that answers may always take at one time, however short the training was so far.
ALWAYS = 5.0
_CUT_OFF = ("cancelled", "memory")


class TimeBudget:
    """The time for answers: a share of the time trained, less what answers took before.

    Args:
        share: 0: no limit. trained, spent: seconds so far, of steps and of answers.
    """

    def __init__(self, share: float, trained: float, spent: float) -> None:
        self._began = time.perf_counter()
        self._seconds = max(ALWAYS, share * trained - spent) if share else math.inf

    @property
    def used(self) -> float:
        """Seconds since it was opened."""
        return time.perf_counter() - self._began

    @property
    def exhausted(self) -> bool:
        """Whether there is no time left."""
        return self.used > self._seconds


def out_of_time(step: int, whole: int, asked: int, share: float) -> str:
    """The warning when answers were cut off."""
    return Message(
        "step {step}: {complete} of {asked} sample answers are complete, then their time "
        "was used up ({share:.0%} of the time trained; --sample_share changes it)",
        step=step,
        complete=whole,
        asked=asked,
        share=share,
    )


@dataclass
class Sample:
    """whole: whether the answer ended, at its end or its greatest length, before it was cut off."""

    prompt: str
    answer: str
    whole: bool


class Sampler:
    """Answers a run's sample prompts with the weights as they are now, within a budget of time."""

    def __init__(
        self,
        prompts: Sequence[str],
        settings: TrainSettings,
        trainable: TrainableModel,
        renderer: Renderer,
        context_length: int,
        run: RunFolder,
        console: RunConsole,
    ) -> None:
        self.prompts, self.settings = prompts, settings
        self.trainable, self.renderer, self.context_length = trainable, renderer, context_length
        self.run, self.console = run, console
        self._cut_off: set[str] = set()  # prompts whose last answer is not whole

    def sample(self, state: State, stopped: Callable[[], bool]) -> None:
        """Answer the prompts, print and log the answers.

        Args:
            stopped: asked before each token; once true, answers are cut off.
        """
        step, share = state.step, self.settings.sample_share
        budget = TimeBudget(share, state.seconds, state.sample_seconds)
        # What was cut off last time is asked first.
        prompts = sorted(self.prompts, key=lambda p: p not in self._cut_off)
        self.console.say(f"step {step}: answering {len(prompts)} sample prompts ...")
        whole = []
        try:
            for sample in self._answer(prompts, lambda: budget.exhausted or stopped()):
                self.run.log("sample", step=step, **asdict(sample))
                cut = "" if sample.whole else " (cut off)"
                self.console.say(f"step {step}: {sample.prompt!r} -> {sample.answer!r}{cut}")
                whole += [sample.prompt] * sample.whole
        finally:
            state.sample_seconds += budget.used
        self._cut_off = {p for p in prompts if p not in whole}
        if self._cut_off and budget.exhausted:
            message = out_of_time(step, len(whole), len(prompts), share)
            self.run.log("warning", step=step, message=message)
            self.console.say(message)

    def _answer(self, prompts: Sequence[str], stopped: Callable[[], bool]) -> Iterator[Sample]:
        """Greedy answers; no random state is used. Prompts not begun when stopped are left out."""
        max_new_tokens = self.settings.sample_tokens
        self.trainable.plain_attention()
        try:
            engine = open_engine(self.trainable.model, self.context_length)
            ids = [self.renderer.prompt([Turn("user", prompt)]) for prompt in prompts]
            fitting = [n for n, i in enumerate(ids) if len(i) < engine.context_length]
            for n in sorted(set(range(len(prompts))) - set(fitting)):
                yield Sample(
                    prompts[n],
                    f"(no answer: {len(ids[n])} tokens, the context has {engine.context_length})",
                    True,
                )
            # Whether the cache of transformers' own forward can be forked depends on the model.
            rows = engine.max_rows if self.trainable.llama is not None else 1
            batches = groups([ids[n] for n in fitting], rows, max_new_tokens) if fitting else ()
            for batch in batches:
                if stopped():
                    return
                places = [fitting[k] for k in batch]
                asked = [ids[n] for n in places]
                try:
                    answers = answer_together(engine, asked, max_new_tokens, self.renderer, stopped)
                    samples = [
                        Sample(prompts[n], answer.text, answer.finish_reason not in _CUT_OFF)
                        for n, answer in zip(places, answers)
                    ]
                except UserError as e:  # logits that are not finite: training goes on
                    samples = [Sample(prompts[n], f"(no answer: {e.what})", True) for n in places]
                yield from samples
        finally:
            self.trainable.packed_attention()
