"""A template together with a tokenizer: conversations to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vicuna.data.conversation import Turn
from vicuna.data.templates.base import Template
from vicuna.data.tokenizer import Piece, Tokenizer


@dataclass
class Renderer:
    """A template together with a tokenizer: conversations to token ids, both ways of use."""

    template: Template
    tokenizer: Tokenizer
    end_id: int = field(init=False)
    stop_ids: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        vocabulary = self.tokenizer.data
        end = None if self.template.end_token == "eos" else self.template.end_token
        found = self.tokenizer.token_id(end) if end else None
        # A template's end that this vocabulary does not have as a token could never stop anything.
        self.end_id = vocabulary.eos_id if found is None else found
        self.stop_ids = frozenset({self.end_id, vocabulary.eos_id, *vocabulary.end_ids})

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Token ids of a prompt whose last turn is the user's."""
        example = self.tokenizer.encode(self.template.prompt(turns), self.end_id)
        return [int(i) for i in example.ids]

    def spelled(self, pieces: Sequence[Piece]) -> str:
        """A rendering as one text, its control tokens spelled."""
        vocabulary = self.tokenizer.data
        spelling = {
            "bos": vocabulary.bos_token if vocabulary.bos_id is not None else "",
            "end": self.tokenizer.token(self.end_id),
            "silent_end": "",
        }
        return "".join(spelling.get(s.kind, s.text) for s in pieces)
