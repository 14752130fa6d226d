"""The settings of an answer. Needs no torch, so that `vicuna --help` may show them at once."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vicuna.errors import SettingsError, UserError


class Settings(BaseModel):
    """How an answer is chosen. The defaults take the likeliest token until the model ends."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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
    repetition_penalty: float = Field(1.0, gt=0, le=10, description="above 1: repeat less; 1: off")
    stop: tuple[str, ...] = Field((), description="texts that end an answer and are not shown")
    seed: int | None = Field(None, description="the same seed draws the same answer")
    num_beams: int = Field(1, ge=1, description="beams of a beam search")

    @model_validator(mode="after")
    def _together(self) -> Settings:
        mistakes = []
        if self.min_new_tokens > self.max_new_tokens:
            mistakes.append(
                f"min_new_tokens {self.min_new_tokens} is above max_new_tokens "
                f"{self.max_new_tokens}"
            )
        if "" in self.stop:
            mistakes.append("stop has an empty text, which would end every answer at once")
        if mistakes:
            raise SettingsError(mistakes)
        if self.num_beams != 1:
            raise UserError(
                "beams are coming with a later version; this one answers greedily or by sampling",
                where=f"num_beams {self.num_beams}",
                fix="Leave num_beams at 1; --do_sample draws answers.",
            )
        return self

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn. A temperature of 0 is the limit in which the likeliest wins."""
        return self.do_sample and self.temperature > 0
