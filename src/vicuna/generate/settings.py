"""The settings of an answer. Needs no torch, so that `vicuna --help` may show them at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from vicuna.errors import SettingsError

# What acts in one mode only: a value other than the one that does nothing is refused elsewhere.
OF_SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
OF_BEAMS = {"length_penalty": 1.0, "early_stopping": False}


class Settings(BaseModel):
    """How an answer is chosen. The defaults take the likeliest token until the model ends.

    `num_beams` and `do_sample` make four strategies: greedy, sample, beam search and beam-sample.
    Names and meanings are those of transformers' `generate`; `frequency_penalty`,
    `presence_penalty` and `logit_bias` are those of OpenAI's API.

    Raises: SettingsError naming every setting that contradicts another, or that was given and has
        no effect with the others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_new_tokens: int = Field(256, ge=1, description="longest answer in tokens")
    min_new_tokens: int = Field(0, ge=0, description="no end token before so many tokens")

    do_sample: bool = Field(False, description="draw tokens instead of taking the likeliest")
    temperature: float = Field(
        1.0, ge=0, le=100, description="of sampling: below 1 surer, 0 takes the likeliest"
    )
    top_k: int = Field(0, ge=0, description="sample from the k likeliest; 0: from all")
    top_p: float = Field(
        1.0, gt=0, le=1, description="sample from the likeliest that add up to p; 1: from all"
    )
    min_p: float = Field(
        0.0, ge=0, le=1, description="drop tokens below this share of the likeliest; 0: none"
    )
    typical_p: float = Field(
        1.0, gt=0, le=1, description="sample from the most typical that add up to p; 1: from all"
    )
    seed: int | None = Field(None, description="the same seed draws the same answer")

    num_beams: int = Field(1, ge=1, le=16, description="beams of a beam search; 1: none")
    num_return_sequences: int = Field(1, ge=1, le=16, description="how many answers")
    length_penalty: float = Field(
        1.0, ge=-10, le=10, description="scores of beams are divided by length to this power"
    )
    early_stopping: bool | Literal["never"] = Field(
        False,
        description="beams end: true: when enough are finished; false: when a better one is "
        'unlikely; "never": when it is impossible',
    )

    repetition_penalty: float = Field(1.0, gt=0, le=10, description="above 1: repeat less; 1: off")
    frequency_penalty: float = Field(
        0.0, ge=-2, le=2, description="off the score for each time the answer has the token"
    )
    presence_penalty: float = Field(
        0.0, ge=-2, le=2, description="off the score once where the answer has the token"
    )
    no_repeat_ngram_size: int = Field(0, ge=0, description="no n tokens in a row twice; 0: off")
    banned_words: tuple[str, ...] = Field((), description="texts that no answer contains")
    logit_bias: Mapping[int | str, Annotated[float, Field(allow_inf_nan=True)]] = Field(
        {}, description="added to the scores of tokens, which are ids or spelled"
    )

    stop: tuple[str, ...] = Field((), description="texts that end an answer and are not shown")
    stop_tokens: tuple[int | str, ...] = Field(
        (), description="tokens that end an answer besides the model's own, ids or spelled"
    )
    logprobs: int = Field(
        0, ge=0, le=20, description="report each token's log-probability and the k likeliest"
    )

    @field_validator("stop", "stop_tokens", "banned_words", mode="before")
    @classmethod
    def _one(cls, value: object) -> object:
        """One text or token is a list of one."""
        return (value,) if isinstance(value, str | int) else value

    @field_validator("early_stopping", mode="before")
    @classmethod
    def _never(cls, value: object) -> object:
        return "never" if isinstance(value, str) and value.lower() == "never" else value

    @model_validator(mode="after")
    def _together(self) -> Settings:
        if mistakes := [*self._contradictions(), *self._without_effect()]:
            raise SettingsError(mistakes)
        return self

    def _contradictions(self) -> list[str]:
        mistakes = []
        if self.min_new_tokens > self.max_new_tokens:
            mistakes.append(
                f"min_new_tokens {self.min_new_tokens} is above max_new_tokens "
                f"{self.max_new_tokens}"
            )
        if "" in self.stop:
            mistakes.append("stop has an empty text, which would end every answer at once")
        if "" in self.banned_words:
            mistakes.append("banned_words has an empty text, which would ban every answer")
        if any(math.isnan(bias) or bias == math.inf for bias in self.logit_bias.values()):
            mistakes.append("logit_bias must be numbers, or -inf to forbid a token")
        if self.num_beams > 1 and self.num_return_sequences > self.num_beams:
            mistakes.append(
                f"num_return_sequences {self.num_return_sequences} is above num_beams "
                f"{self.num_beams}: a search ends with as many answers as it has beams"
            )
        return mistakes

    def _without_effect(self) -> list[str]:
        """What was given, is not neutral, and cannot act."""
        mistakes = []
        if not self.samples:
            reason = "temperature 0 takes the likeliest" if self.do_sample else "add do_sample"
            acts = {"temperature"} if self.temperature == 0 else set()
            mistakes += [
                f"{name} {getattr(self, name)} has no effect without sampling: {reason}"
                for name, neutral in OF_SAMPLING.items()
                if name not in acts and getattr(self, name) != neutral
            ]
        if self.num_beams == 1:
            mistakes += [
                f"{name} {getattr(self, name)} has no effect without beams: add num_beams"
                for name, neutral in OF_BEAMS.items()
                if getattr(self, name) != neutral
            ]
            if self.num_return_sequences > 1 and not self.samples:
                mistakes.append(
                    f"num_return_sequences {self.num_return_sequences} would give the same answer "
                    "every time: add do_sample or num_beams"
                )
        return mistakes

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn. A temperature of 0 is the limit in which the likeliest wins."""
        return self.do_sample and self.temperature > 0

    @property
    def strategy(self) -> Literal["greedy", "sample", "beam", "beam-sample"]:
        """What the settings amount to."""
        if self.num_beams > 1:
            return "beam-sample" if self.samples else "beam"
        return "sample" if self.samples else "greedy"

    @property
    def rows(self) -> int:
        """Rows that an engine must take at a time."""
        return max(self.num_beams, self.num_return_sequences)


def biases_of(given: Sequence[str]) -> dict[int | str, float]:
    """`logit_bias` from words of the form TOKEN=BIAS; the last = counts, for a token may be one.

    Raises: SettingsError naming every word that is something else.
    """
    biases: dict[int | str, float] = {}
    mistakes = []
    for word in given:
        token, equals, number = word.rpartition("=")
        try:
            bias = float(number)
        except ValueError:
            token = ""
        if not equals or not token:
            mistakes.append(f"logit_bias {word!r}: expected TOKEN=BIAS, such as 42=-5")
            continue
        biases[token] = bias
    if mistakes:
        raise SettingsError(mistakes)
    return biases
