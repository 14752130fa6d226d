"""How a step is cut into micro-batches: what decides it at the start, and its form on disk.

Which examples make up a step never depends on it, and neither does the result, up to rounding: it
decides memory and speed alone. `for_run` chooses it once; while the run goes on only
`oom.MicroBatcher` changes it, when memory runs out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from vicuna.config import TrainSettings

# Settings that say how a step is cut; a resumed run keeps its checkpoint's unless one is named.
SETTINGS = frozenset({"micro_batch_tokens", "micro_batch_size", "share_prefixes"})


@dataclass(frozen=True)
class MicroBatch:
    """The limits of a pack.

    tokens: computed at a time in training. eval_tokens: the same in an evaluation. examples: at
    most so many in a pack; 0: no limit. share_prefixes: whether a beginning that several examples
    have in common is computed once.
    """

    tokens: int = 0
    eval_tokens: int = 0
    examples: int = 0
    share_prefixes: bool = True

    def to_json(self) -> dict[str, int]:
        """As `state.json` (`cut`) and `config.yaml` (`resolved.micro_batch`) have it."""
        return {
            "tokens": self.tokens,
            "evaluation": self.eval_tokens,
            "examples": self.examples,
            "share": int(self.share_prefixes),
        }

    @classmethod
    def from_json(cls, noted: Mapping[str, Any]) -> MicroBatch:
        """What `to_json` made; early checkpoints had one limit for training and evaluation.

        Raises: KeyError, TypeError, ValueError if it is something else.
        """
        tokens = int(noted["tokens"])
        eval_tokens = int(noted.get("evaluation", tokens))
        return cls(tokens, eval_tokens, int(noted["examples"]), bool(noted["share"]))


def for_run(
    settings: TrainSettings,
    named: Collection[str],
    tokens: int,
    packs: bool,
    saved: MicroBatch | None = None,
) -> MicroBatch:
    """The micro-batch that a run begins with.

    Args:
        named: settings that the user named.
        tokens: what the hardware takes at a time (`memory.auto_settings`).
        packs: whether the model can compute several examples in one pass. If not, examples go one
            by one whatever a setting or an older checkpoint says: the result would be wrong.
        saved: the micro-batch of the checkpoint that is resumed.
    """
    examples, share = settings.micro_batch_size, settings.share_prefixes
    if saved is not None and not SETTINGS & set(named):
        tokens, eval_tokens = saved.tokens, saved.eval_tokens
        examples, share = saved.examples, saved.share_prefixes
    else:
        eval_tokens = tokens
    if not packs:
        examples, share = 1, False
    return MicroBatch(tokens, eval_tokens, examples, share)
