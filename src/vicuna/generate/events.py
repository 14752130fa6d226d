"""What a strategy tells while it answers: how things stand after each token, then the answers.

Text that a `Step` brings is final: it never changes afterwards, with beams too. A caller that only
wants the text joins or prints what the steps bring:

    for event in decode(engine, prompt_ids, settings, renderer):
        if isinstance(event, Step):
            print(event.text, end="", flush=True)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from vicuna.generate.thoughts import split

if TYPE_CHECKING:
    from vicuna.data.templates.base import ThoughtMarks
    from vicuna.generate.tree import Node

FinishReason = Literal["stop", "stop_string", "length", "context", "cancelled", "memory"]


class TokenLogprob(NamedTuple):
    """A token's log-probability under the model itself: before temperature, penalties and filters.

    top: (token id, log-probability) of the k likeliest tokens in its place, likeliest first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Beam:
    """A branch as it stood after a step. Its texts are put together when they are asked for.

    score: what the branch would count at the end: with beams its log-probability divided by
        length ** length_penalty, else its log-probability.
    token_count: tokens so far.
    finish_reason: None while it is open.
    """

    __slots__ = ("_agreed", "_node", "finish_reason", "score", "token_count")

    def __init__(self, node: Node, score: float, agreed: int) -> None:
        self._node, self._agreed = node, agreed
        self.score = score
        self.token_count = node.length
        self.finish_reason = node.reason

    @property
    def token_id(self) -> int:
        """The last token."""
        return self._node.token_id

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All tokens of the branch."""
        return self._node.token_ids()

    @property
    def text(self) -> str:
        """The whole text so far, less what may still turn out to begin a stop string."""
        return self._node.text()

    @property
    def open(self) -> str:
        """What of the text lies behind the agreed text; it may vanish with the branch."""
        return self._node.text(self._agreed)


@dataclass(frozen=True, slots=True)
class Step:
    """How things stand after a token.

    text: what became final: the text that every branch begins with that may still come first,
        less what earlier steps brought. Often "". The last step brings the rest of the answer.
    beams: the open branches, best first; one for a greedy answer, none in the last step.
    finished: the finished branches that may still be among the answers, best first.
    """

    text: str
    beams: tuple[Beam, ...]
    finished: tuple[Beam, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """One whole answer.

    token_ids: all tokens chosen, the end token too where the model ended by itself.
    score: with beams the `sequences_scores` of transformers: the sum of the log-probabilities, as
        penalties and filters left them, divided by length ** length_penalty. Else the sum of the
        log-probabilities under the model itself.
    finish_reason: `stop` the model ended; `stop_string`; `length` max_new_tokens reached;
        `context` the context is full; `cancelled`; `memory` none left.
    logprobs: for each token, where the settings ask for them.
    """

    text: str
    token_ids: tuple[int, ...]
    score: float
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """The end: the best answers, best first, at least one. What is asked of it is the best one's.

    answers: as many as asked for; fewer where there were not as many different ones.
    finish_reason: why the computation ended: `cancelled` or `memory` where it was broken off, even
        if the best answer had been finished before; else the best answer's.
    first_token_seconds, total_seconds: from the request on, the prompt's computation included.
    """

    answers: tuple[Answer, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    first_token_seconds: float
    total_seconds: float

    @property
    def text(self) -> str:
        """The best answer's text: that of all steps together."""
        return self.answers[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The best answer's tokens."""
        return self.answers[0].token_ids

    @property
    def score(self) -> float:
        """The best answer's score."""
        return self.answers[0].score

    @property
    def completion_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(len(a.token_ids) for a in self.answers)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all answers for each second of the whole request."""
        return self.completion_tokens / self.total_seconds if self.total_seconds else 0.0


Event = Step | Finished


def one_shot_json(finished: Finished, marks: ThoughtMarks | None = None) -> dict[str, Any]:
    """What `vicuna generate --json` prints: the answers to one prompt, best first.

    The prompt counts once, because it is computed once.
    """
    return {
        "outputs": [answer_json(a, marks) for a in finished.answers],
        "usage": {
            "prompt_tokens": finished.prompt_tokens,
            "completion_tokens": finished.completion_tokens,
        },
        "timings": {
            "first_token_seconds": finished.first_token_seconds,
            "total_seconds": finished.total_seconds,
            "tokens_per_second": finished.tokens_per_second,
        },
    }


def answer_json(answer: Answer, marks: ThoughtMarks | None = None) -> dict[str, Any]:
    """One answer; `logprobs` only where they were asked for.

    marks: of its thought. If there is one, `thought` and `answer` are the two parts of the text.
    """
    plain: dict[str, Any] = {
        "text": answer.text,
        "token_ids": list(answer.token_ids),
        "score": answer.score,
        "finish_reason": answer.finish_reason,
    }
    if marks is not None and (parts := split(answer.text, marks)).thought:
        plain |= {"thought": parts.thought, "answer": parts.answer}
    if answer.logprobs is not None:
        plain["logprobs"] = [_logprob_json(t) for t in answer.logprobs]
    return plain


def _logprob_json(token: TokenLogprob) -> dict[str, Any]:
    top: Sequence[tuple[int, float]] = token.top
    return {
        "token_id": token.token_id,
        "logprob": token.logprob,
        "top": [{"token_id": i, "logprob": p} for i, p in top],
    }
