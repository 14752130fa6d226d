"""A template together with a tokenizer: conversations to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vicuna.data.conversation import Turn
from vicuna.data.templates.base import Template
from vicuna.data.templates.end_token import end_ids
from vicuna.data.tokenizer import Piece, Tokenizer


@dataclass
class Renderer:
    """A template together with a tokenizer: conversations to token ids, for training and inference.

    end_id: the token that ends an answer. stop_ids: all tokens that generation stops at.
    """

    template: Template
    tokenizer: Tokenizer
    end_id: int = field(init=False)
    stop_ids: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        self.end_id, self.stop_ids = end_ids(self.template.end_token, self.tokenizer)

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Token ids of a prompt whose last turn is the user's."""
        example = self.tokenizer.encode(self.template.prompt(turns), self.end_id)
        return [int(i) for i in example.ids]

    def spelled(self, pieces: Sequence[Piece]) -> str:
        """A rendering as one text, its control tokens spelled."""
        data = self.tokenizer.data
        spelling = {
            "bos": data.bos_token if data.bos_id is not None else "",
            "end": self.tokenizer.token(self.end_id),
            "silent_end": "",
        }
        return "".join(spelling.get(s.kind, s.text) for s in pieces)
