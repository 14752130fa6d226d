"""Where memory does not suffice, the same work again in smaller packs.

Which examples make up a step never depends on how it is cut, so a step that is done again in
smaller packs has the same result, up to rounding. The smaller size is kept in `State.cut`: later
steps, checkpoints and a resumed run go on with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from vicuna.config.precisions import SMALLEST, share_of_memory
from vicuna.data.loss_mask import Example
from vicuna.data.pack import Pack, build_packs
from vicuna.errors import UserError
from vicuna.model.out_of_memory import give_back, is_memory
from vicuna.paths import shell_word
from vicuna.train.setup import Session

T = TypeVar("T")

# The entry of `State.cut` that says how many rows training, and evaluation, compute at a time.
TRAINING, EVALUATION = "tokens", "evaluation"
_CHECKPOINTING = ("none", "selective", "full", "offload")


class Shrinking:
    """Cuts examples into packs and hands them to the work, smaller each time that it does not fit.

    use: TRAINING or EVALUATION. The packs that fitted last are kept where the examples stay the
    same, as they do in an evaluation.
    """

    def __init__(self, session: Session, use: str) -> None:
        self.s, self.use = session, use
        self.seconds = 0.0  # spent cutting
        self._alone_before = False
        self._kept: tuple[int, Sequence[Example], list[Pack]] | None = None

    @property
    def size(self) -> int:
        """Rows computed at a time."""
        cut = self.s.state.cut
        # Checkpoints of before had one size for both.
        return cut.get(self.use, cut[TRAINING])

    def packs(self, examples: Sequence[Example]) -> list[Pack]:
        """The examples cut to the present size."""
        if self._kept and self._kept[0] == self.size and self._kept[1] is examples:
            return self._kept[2]
        cut = self.s.state.cut
        began = time.perf_counter()
        found = build_packs(
            examples, self.s.renderer.end_id, self.size, cut["examples"], bool(cut["share"])
        )
        self.seconds += time.perf_counter() - began
        self._kept = (self.size, examples, found)
        return found

    def run(
        self, examples: Sequence[Example], work: Callable[[Iterable[Pack], int], T]
    ) -> tuple[list[Pack], T]:
        """The packs that fitted, and what the work returned for them.

        Args:
            work: (packs, their supervised tokens) -> result. Called anew where memory ran out; it
                may leave nothing behind then but gradients, which are dropped.

        Raises: UserError where one example alone does not fit.
        """
        self._alone_before = False
        while True:
            packs = self.packs(examples)
            at: list[Pack] = []
            try:
                return packs, work(_noting(packs, at), sum(p.supervised for p in packs))
            except (RuntimeError, MemoryError) as error:
                if not is_memory(error):
                    raise
            # Behind the handler: the error's frames would hold the tensors that must go.
            self.s.optimizer.zero_grad(set_to_none=True)
            give_back(self.s.trainable.device)
            self._shrink(at[-1] if at else max(packs, key=lambda p: len(p.ids)))

    def _shrink(self, failed: Pack) -> None:
        """Halve the size until the pack that did not fit is cut.

        A pack of one example cannot be cut. It is tried once more, since memory was given back.
        """
        if failed.examples == 1 or self.size <= 1:
            if self._alone_before:
                raise self._no_room(len(failed.ids))
            self._alone_before = True
            self._say("computed again after memory was given back")
            return
        old = size = self.size
        while size >= len(failed.ids) or size == old:
            size //= 2
        self.s.state.cut[self.use] = max(1, size)
        self._say(f"computed again, {self.size:,} tokens at a time instead of {old:,}")

    def _say(self, what: str) -> None:
        words = f"out of memory in {self._place()}: {what}"
        self.s.screen.warn(words)
        self.s.run.log(
            "warning", step=self.s.state.step, message=words, micro_batch_tokens=self.size
        )

    def _place(self) -> str:
        step = self.s.state.step
        return f"update {step + 1}" if self.use == TRAINING else f"the evaluation at update {step}"

    def _no_room(self, rows: int) -> UserError:
        kept = "; the last checkpoint is unharmed" if self.s.state.step else ""
        return UserError(
            f"out of memory in {self._place()}: one example of {rows:,} tokens alone does not "
            f"fit{kept}",
            where=f"{self.s.trainable.device}",
            fix=advice(self.s, rows, self.use),
        )


def _noting(packs: Sequence[Pack], at: list[Pack]) -> Iterator[Pack]:
    """The packs; the one at hand is the last of `at`."""
    for pack in packs:
        at.append(pack)
        yield pack


def advice(session: Session, rows: int, use: str = TRAINING) -> str:
    """What to try where an example of so many tokens does not fit, the cheapest first.

    Only what is not on already is named.
    """
    settings, trainable = session.settings, session.trainable
    again = f"vicuna train --resume {shell_word(session.run.path)}"
    kinds = _CHECKPOINTING[_CHECKPOINTING.index(trainable.checkpointing) + 1 :]
    if trainable.llama is None:
        kinds = ("full",) if trainable.checkpointing == "none" else ()
    elif trainable.device.type == "cpu":
        kinds = tuple(k for k in kinds if k != "offload")  # the host's memory is what ran out
    same, other = [], []
    if kinds and use == TRAINING:
        same.append(f"{again} --gradient_checkpointing {kinds[0]}" + _or(kinds[1:]))
    precision = session.state.settings["precision"]
    if precision != SMALLEST:
        share = share_of_memory(precision, SMALLEST)
        other.append(f"--precision {SMALLEST} ({share} of the base's memory)")
    if rows > 32:
        other.append(f"--cutoff_len {max(16, rows // 2)} (one example is computed in one piece)")
    if settings.lora_dropout and use == TRAINING:
        other.append("--lora_dropout 0")
    if settings.lora_target != ["q_proj", "v_proj"] and use == TRAINING:
        other.append("--lora_target q_proj,v_proj (fewer layers learn)")
    other.append("a smaller base")
    lines = ["Try, the cheapest first:"]
    lines += [f"- {way} (the same result, computed again instead of kept)" for way in same]
    lines += [f"- a new run with {way}" for way in other]
    return "\n".join(lines)


def _or(kinds: Sequence[str]) -> str:
    return f", or {', '.join(kinds)}" if kinds else ""
