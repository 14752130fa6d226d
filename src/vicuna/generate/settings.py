"""The settings of one request, and which of them contradict each other. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import ConfigDict, field_validator, model_validator

from vicuna.config.decoding import STRATEGIES, Decoding, fields_that_act
from vicuna.errors import SettingsError
from vicuna.messages import Message

# What only acts in some strategies: another value than the neutral one is refused in the others,
# except for a seed, which is often given once for all requests.
OF_SAMPLING = {n: v for n, v in fields_that_act("sampling").items() if n != "seed"}
OF_BEAMS = fields_that_act("beams")


class Settings(Decoding):
    """How an answer is chosen, from the table `config.decoding.Decoding`. The defaults take the
    most likely token until the model ends.

    `num_beams` and `do_sample` make four strategies: greedy, sample, beam search and beam-sample.

    Raises: SettingsError naming every setting that contradicts another, or that was given and has
        no effect with the others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

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
        mistakes: list[str] = []
        if self.min_new_tokens > self.max_new_tokens:
            mistakes.append(
                Message(
                    "min_new_tokens {min_new_tokens} is above max_new_tokens {max_new_tokens}",
                    min_new_tokens=self.min_new_tokens,
                    max_new_tokens=self.max_new_tokens,
                )
            )
        if "" in self.stop:
            mistakes.append("stop has an empty text, which would end every answer at once")
        if "" in self.banned_words:
            mistakes.append("banned_words has an empty text, which would ban every answer")
        if any(math.isnan(bias) or bias == math.inf for bias in self.logit_bias.values()):
            mistakes.append(Message("logit_bias must be numbers, or -inf to forbid a token"))
        if self.num_beams > 1 and self.num_return_sequences > self.num_beams:
            mistakes.append(
                Message(
                    "num_return_sequences {num_return_sequences} is above num_beams "
                    "{num_beams}: a search ends with as many answers as it has beams",
                    num_return_sequences=self.num_return_sequences,
                    num_beams=self.num_beams,
                )
            )
        return mistakes

    def _without_effect(self) -> list[str]:
        """What was given, is not neutral, and cannot act."""
        mistakes: list[str] = []
        if not self.samples:
            reason = "temperature 0 takes the likeliest" if self.do_sample else "add do_sample"
            acts = {"temperature"} if self.temperature == 0 else set()
            mistakes += [
                Message(
                    "{name} {value} has no effect without sampling: {reason}",
                    name=name,
                    value=getattr(self, name),
                    reason=reason,
                )
                for name, neutral in OF_SAMPLING.items()
                if name not in acts and getattr(self, name) != neutral
            ]
        if self.num_beams == 1:
            mistakes += [
                Message(
                    "{name} {value} has no effect without beams: add num_beams",
                    name=name,
                    value=getattr(self, name),
                )
                for name, neutral in OF_BEAMS.items()
                if getattr(self, name) != neutral
            ]
            if self.num_return_sequences > 1 and not self.samples:
                mistakes.append(
                    Message(
                        "num_return_sequences {num_return_sequences} would give the same "
                        "answer every time: add do_sample or num_beams",
                        num_return_sequences=self.num_return_sequences,
                    )
                )
        return mistakes

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn. A temperature of 0 is the limit in which the likeliest wins."""
        return self.do_sample and self.temperature > 0

    @property
    def strategy(self) -> str:
        """The strategy that the settings amount to, a name in `STRATEGIES`."""
        acting = {"sampling"} if self.samples else set()
        acting |= {"beams"} if self.num_beams > 1 else set()
        return next(name for name, groups in STRATEGIES.items() if groups == acting)

    @property
    def rows(self) -> int:
        """Rows that an engine must take at a time."""
        return max(self.num_beams, self.num_return_sequences)


def biases_of(given: Sequence[str]) -> dict[int | str, float]:
    """`logit_bias` from words of the form TOKEN=BIAS; the last = counts, for a token may be one.

    Raises: SettingsError naming every word that is something else.
    """
    biases: dict[int | str, float] = {}
    mistakes: list[str] = []
    for word in given:
        token, equals, number = word.rpartition("=")
        try:
            bias = float(number)
        except ValueError:
            token = ""
        if not equals or not token:
            mistakes.append(
                Message("logit_bias {word!r}: expected TOKEN=BIAS, such as 42=-5", word=word)
            )
            continue
        biases[token] = bias
    if mistakes:
        raise SettingsError(mistakes)
    return biases
