"""When memory runs out: the same work again in smaller micro-batches.

Which examples make up a step never depends on how it is cut, so a step that is computed again in
smaller packs has the same result, up to rounding. The smaller limit stays in `State.micro_batch`:
later steps, checkpoints and a resumed run keep it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar

import torch

from vicuna.config import TrainSettings
from vicuna.config.checkpointing import costlier
from vicuna.config.precisions import SMALLEST, share_of_memory
from vicuna.data.loss_mask import Example
from vicuna.data.pack import Pack, build_packs
from vicuna.errors import UserError
from vicuna.messages import Message, lines
from vicuna.model.out_of_memory import give_back, is_memory
from vicuna.model.trainable import TrainableModel
from vicuna.paths import shell_word
from vicuna.train.checkpoint import State
from vicuna.train.progress import RunConsole
from vicuna.train.run_folder import RunFolder

T = TypeVar("T")
Purpose = Literal["training", "eval"]


class MicroBatcher:
    """Cuts examples into packs and hands them to the work, smaller each time that they do not fit.

    The packs that fitted last are kept while the examples stay the same, as they do in an
    evaluation.

    Args:
        purpose: which limit of `state.micro_batch` it uses and lowers.
        state: of the run; this class is the only one to change its micro-batch.
        end_id: the token that separates examples in a pack.
        optimizer: its gradients are dropped before work is done again.
    """

    def __init__(
        self,
        purpose: Purpose,
        state: State,
        end_id: int,
        trainable: TrainableModel,
        optimizer: torch.optim.Optimizer,
        settings: TrainSettings,
        run: RunFolder,
        console: RunConsole,
    ) -> None:
        self.purpose, self.state, self.end_id = purpose, state, end_id
        self.trainable, self.optimizer, self.settings = trainable, optimizer, settings
        self.folder, self.console = run, console
        self.seconds = 0.0  # spent cutting
        self._alone_before = False
        self._last: tuple[int, Sequence[Example], list[Pack]] | None = None

    @property
    def max_tokens(self) -> int:
        """Tokens computed at a time."""
        micro_batch = self.state.micro_batch
        return micro_batch.tokens if self.purpose == "training" else micro_batch.eval_tokens

    def packs(self, examples: Sequence[Example]) -> list[Pack]:
        """The examples in packs of at most `max_tokens`."""
        if self._last and self._last[0] == self.max_tokens and self._last[1] is examples:
            return self._last[2]
        cut = self.state.micro_batch
        began = time.perf_counter()
        packs = build_packs(
            examples, self.end_id, self.max_tokens, cut.examples, cut.share_prefixes
        )
        self.seconds += time.perf_counter() - began
        self._last = (self.max_tokens, examples, packs)
        return packs

    def run(
        self, examples: Sequence[Example], work: Callable[[Iterable[Pack], int], T]
    ) -> tuple[list[Pack], T]:
        """The packs that fitted, and what the work returned for them.

        Args:
            work: (packs, their supervised tokens) -> result. Called again when memory ran out; it
                may leave nothing behind then but gradients, which are dropped.

        Raises: UserError if one example alone does not fit.
        """
        self._alone_before = False
        while True:
            packs = self.packs(examples)
            seen: list[Pack] = []
            try:
                return packs, work(_recorded(packs, seen), sum(p.supervised for p in packs))
            except (RuntimeError, MemoryError) as error:
                if not is_memory(error):
                    raise
            # Outside of the handler: the error's frames would hold the tensors that must go.
            self.optimizer.zero_grad(set_to_none=True)
            give_back(self.trainable.device)
            self._shrink(seen[-1] if seen else max(packs, key=lambda p: len(p.ids)))

    def _shrink(self, failed: Pack) -> None:
        """Halve the limit until the pack that did not fit is cut.

        A pack of one example cannot be cut. It is tried once more, since memory was given back.
        """
        if failed.examples == 1 or self.max_tokens <= 1:
            if self._alone_before:
                raise self._does_not_fit(len(failed.ids))
            self._alone_before = True
            self._warn(Message("computed again after memory was given back"))
            return
        old = tokens = self.max_tokens
        while tokens >= len(failed.ids) or tokens == old:
            tokens //= 2
        cut, tokens = self.state.micro_batch, max(1, tokens)
        if self.purpose == "training":
            self.state.micro_batch = replace(cut, tokens=tokens)
        else:
            self.state.micro_batch = replace(cut, eval_tokens=tokens)
        self._warn(
            Message(
                "computed again, {tokens:,} tokens at a time instead of {old:,}",
                tokens=self.max_tokens,
                old=old,
            )
        )

    def _warn(self, remedy: str) -> None:
        message = Message("out of memory in {place}: {remedy}", place=self._place(), remedy=remedy)
        self.console.warn(message)
        self.folder.log(
            "warning", step=self.state.step, message=message, micro_batch_tokens=self.max_tokens
        )

    def _place(self) -> str:
        step = self.state.step
        return (
            Message("step {step}", step=step + 1)
            if self.purpose == "training"
            else Message("the evaluation at step {step}", step=step)
        )

    def _does_not_fit(self, tokens: int) -> UserError:
        kept = Message("; the last checkpoint is intact") if self.state.step else ""
        return UserError(
            "out of memory in {place}: one example of {tokens:,} tokens alone does not fit{kept}",
            place=self._place(),
            tokens=tokens,
            kept=kept,
            where=f"{self.trainable.device}",
            fix=advice(
                self.settings,
                self.trainable,
                self.state.settings["precision"],
                self.folder.path,
                tokens,
                self.purpose,
            ),
        )


def _recorded(packs: Sequence[Pack], seen: list[Pack]) -> Iterator[Pack]:
    """The packs; the one that is being computed is the last of `seen`."""
    for pack in packs:
        seen.append(pack)
        yield pack


def advice(
    settings: TrainSettings,
    trainable: TrainableModel,
    precision: str,
    run: Path,
    tokens: int,
    purpose: Purpose = "training",
) -> str:
    """What to try when an example does not fit, the cheapest first; only what is not on already.

    Args:
        precision: of the base, as it was chosen. run: the run's folder.
        tokens: of the example.
    """
    again = f"vicuna train --resume {shell_word(run)}"
    levels = costlier(trainable.checkpointing)
    if trainable.llama is None:
        levels = ("full",) if trainable.checkpointing == "none" else ()
    elif trainable.device.type == "cpu":
        levels = tuple(k for k in levels if k != "offload")  # the host's memory is what ran out
    same: list[str] = []
    other: list[str] = []
    if levels and purpose == "training":
        alternatives = f", or {', '.join(levels[1:])}" if levels[1:] else ""
        same.append(f"{again} --gradient_checkpointing {levels[0]}{alternatives}")
    if precision != SMALLEST:
        share = share_of_memory(precision, SMALLEST)
        other.append(
            Message(
                "--precision {precision} ({share} of the base's memory)",
                precision=SMALLEST,
                share=share,
            )
        )
    if tokens > 32:
        other.append(
            Message(
                "--cutoff_len {cutoff} (one example is computed in one piece)",
                cutoff=max(16, tokens // 2),
            )
        )
    if settings.lora_dropout and purpose == "training":
        other.append("--lora_dropout 0")
    if settings.lora_target != ["q_proj", "v_proj"] and purpose == "training":
        other.append(Message("--lora_target q_proj,v_proj (fewer layers learn)"))
    other.append(Message("a smaller base"))
    ways = [
        Message("{way} (the same result, computed again instead of kept)", way=way) for way in same
    ]
    ways += [Message("a new run with {way}", way=way) for way in other]
    return Message("Try, the cheapest first:\n{ways}", ways=lines(ways, "- "))
