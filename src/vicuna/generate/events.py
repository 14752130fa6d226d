"""What a strategy tells while it answers: pieces of text, and at the end the whole answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

FinishReason = Literal["stop", "stop_string", "length", "context", "cancelled", "memory"]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token added to the text that may be shown.

    text: whole characters, and nothing that could still turn out to begin a stop string; often "".
    token_id: None for the last piece, where it is text held back that no further token came for.
    """

    text: str
    token_id: int | None


@dataclass(frozen=True, slots=True)
class Finished:
    """A whole answer.

    text: all pieces together.
    token_ids: all tokens chosen, the end token too where the model ended by itself.
    finish_reason: `stop` the model ended; `stop_string`; `length` max_new_tokens reached;
        `context` the context is full; `cancelled`; `memory` none left.
    score: sum of the log-probabilities of `token_ids` under the model itself, before temperature,
        penalty and filters.
    first_token_seconds, total_seconds: from the request on, the prompt's computation included.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    score: float
    prompt_tokens: int
    first_token_seconds: float
    total_seconds: float

    @property
    def completion_tokens(self) -> int:
        """Number of tokens chosen."""
        return len(self.token_ids)

    @property
    def tokens_per_second(self) -> float:
        """Tokens chosen for each second of the whole request."""
        return self.completion_tokens / self.total_seconds if self.total_seconds else 0.0


Event = Piece | Finished


def one_shot_json(finished: Sequence[Finished]) -> dict[str, Any]:
    """What `vicuna generate --json` prints: the answers to one prompt, best first.

    The prompt counts once, because it is computed once.
    """
    total = max(f.total_seconds for f in finished)
    completion = sum(f.completion_tokens for f in finished)
    return {
        "outputs": [
            {
                "text": f.text,
                "token_ids": list(f.token_ids),
                "score": f.score,
                "finish_reason": f.finish_reason,
            }
            for f in finished
        ],
        "usage": {"prompt_tokens": finished[0].prompt_tokens, "completion_tokens": completion},
        "timings": {
            "first_token_seconds": min(f.first_token_seconds for f in finished),
            "total_seconds": total,
            "tokens_per_second": completion / total if total else 0.0,
        },
    }
