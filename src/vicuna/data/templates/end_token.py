"""The end-of-sequence rule: which token ends an answer, and which tokens stop generation.

A template names the special token that ends its answers, or "eos" for the tokenizer's own. Training
puts that token behind every answer, in the loss if the answer is; generation stops at it, at the
tokenizer's own end token, and at those that the base's generation config names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from vicuna.data.tokenizer import Tokenizer

EOS = "eos"


def end_ids(end_token: str, tokenizer: Tokenizer) -> tuple[int, frozenset[int]]:
    """(id that ends an answer, ids that stop generation) of a template's end token.

    An end token that this tokenizer does not have as a special token could never stop anything: the
    tokenizer's own end stands for it then.
    """
    data = tokenizer.data
    own = None if end_token == EOS else tokenizer.token_id(end_token)
    end_id = data.eos_id if own is None else own
    return end_id, frozenset({end_id, data.eos_id, *data.end_ids})


class EndFinder:
    """Finds the special token that ends an answer in what a chat template renders behind it.

    special_tokens: the tokenizer's, longest first. special: a pattern of any of them.
    """

    def __init__(self, special_tokens: Sequence[str], eos_token: str) -> None:
        self._eos_token = eos_token
        pattern = "|".join(map(re.escape, special_tokens))
        self.special = re.compile(pattern)
        self._run = re.compile(rf"\s{{0,2}}(?:{pattern})+")

    def tokens_behind(self, tail: str) -> list[re.Match[str]]:
        """The special tokens that directly follow an answer, given what is rendered behind it."""
        run = self._run.match(tail)
        return list(self.special.finditer(run[0])) if run else []

    def end_of(self, tail: str) -> str:
        """The token that ends the answer: the tokenizer's end if it is there, else the first of
        those behind it; "eos" for the tokenizer's end, and if there is none."""
        tokens = [match[0] for match in self.tokens_behind(tail)]
        if not tokens or self._eos_token in tokens:
            return EOS
        return tokens[0]
