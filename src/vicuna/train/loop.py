"""The training loop: packs, gradients, optimiser steps; evaluations, samples, checkpoints between.

Step k is a function of (config, data, k). Everything it depends on is in the adapter's weights, the
optimiser's moments and `State`, and these three are what a checkpoint holds.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from vicuna import interrupts
from vicuna.config import TrainSettings
from vicuna.data.dataset import Split
from vicuna.data.loss_mask import Example
from vicuna.errors import UserError
from vicuna.files import whole_folder
from vicuna.messages import Message
from vicuna.model import adapter as adapters
from vicuna.model import load
from vicuna.model.out_of_memory import is_memory
from vicuna.model.trainable import TrainableModel
from vicuna.paths import shell_word
from vicuna.train import checkpoint as checkpoints
from vicuna.train.checkpoint import State
from vicuna.train.oom import MicroBatcher, Purpose, advice
from vicuna.train.optimizer import Schedule
from vicuna.train.progress import RunConsole, Trackers, plot_loss
from vicuna.train.run_folder import RunFolder

if TYPE_CHECKING:
    from vicuna.train.samples import Sampler

FP16_SCALE_GROWS_EVERY = 500
FP16_SCALE_MAX = 65536.0
EARLY = "no lower validation loss"


@dataclass
class Outcome:
    """How a run ended. finished: False if it was interrupted and can be resumed."""

    finished: bool
    reason: str
    step: int
    first_eval: float | None = None
    best_eval: float | None = None
    last_loss: float | None = None


class Training:
    """A run that is ready to train; `setup.prepare` makes it. Close it after use.

    Args:
        split: the examples in their order, and those of the evaluation.
        state: what the next step depends on besides tensors; changed by each step.
        end_id: the token that ends an answer, and separates examples in a pack.
        adapter_meta: what `vicuna.json` beside the adapter's weights says.
        sampler: answers the sample prompts; None if there are none.
        resumed: whether it resumes a checkpoint of its own.
    """

    def __init__(
        self,
        settings: TrainSettings,
        run: RunFolder,
        console: RunConsole,
        trainable: TrainableModel,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        split: Split,
        state: State,
        end_id: int,
        adapter_meta: dict[str, Any],
        sampler: Sampler | None = None,
        resumed: bool = False,
    ) -> None:
        self.settings, self.folder, self.console = settings, run, console
        self.trainable, self.optimizer, self.schedule = trainable, optimizer, schedule
        self.split, self.state, self.end_id = split, state, end_id
        self.adapter_meta, self.sampler, self.resumed = adapter_meta, sampler, resumed
        self.parameters = trainable.parameters
        self.trackers = Trackers(settings, run)
        self.signals = 0  # how often Ctrl-C, or SIGTERM, came
        self._stepping = self._saving = self._finishing = False
        self.first_eval: float | None = None
        self.first_step = state.step
        self._train_batches, self._eval_batches = (
            MicroBatcher(purpose, state, end_id, trainable, optimizer, settings, run, console)
            for purpose in get_args(Purpose)
        )
        self.eval_every = settings.eval_steps or max(1, math.ceil(state.total / 10))
        self.sample_every = settings.sample_steps or self.eval_every

    def close(self) -> None:
        """Release the run's folder."""
        self.folder.close()

    # -- the loop --------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Train to the end or the first signal; all that was learned is on the disk afterwards."""
        state = self.state
        for warning in self.console.warnings:
            self.folder.log("warning", step=state.step, message=warning)
        if self.split.validation and not self.resumed:
            self._evaluate()
        with self._signals():
            try:
                with self.console.bar(state.total, state.step) as show:
                    reason = self._loop(show)
            except KeyboardInterrupt:
                if self.signals > 2:
                    raise
                return self._interrupted_at_once()
            if not reason:
                return self._interrupted()
            return self._finish(reason)

    def _loop(self, show: Callable[[int, str], None]) -> str:
        """Step after step; why it ended, "" if it was interrupted."""
        state = self.state
        if state.evaluation_due and self._after_step():
            return EARLY
        while state.step < state.total:
            event = self._step()
            show(state.step, _progress(event))
            if self._after_step():
                return EARLY
            if self.signals and state.step < state.total:
                return ""
        return "done"

    def _step(self) -> dict[str, Any]:
        """One optimiser step over exactly `batch_size` examples; returns its event of the log."""
        state = self.state
        began = time.perf_counter()
        self._stepping = True
        examples = self._examples(state.step)
        read, cut_before = time.perf_counter() - began, self._train_batches.seconds
        self.trainable.dropout.step = state.step
        self.optimizer.zero_grad(set_to_none=True)
        packs, loss = self._train_batches.run(
            examples,
            lambda packs, supervised: self.trainable.backward(packs, supervised, state.loss_scale),
        )
        supervised = sum(p.supervised for p in packs)
        rate = self.schedule.rate(state.step)
        # Weights and state change together: a second Ctrl-C finds them whole.
        with interrupts.shielded():
            norm, finite = self._change_weights(loss, rate)
            tokens = sum(p.tokens for p in packs)
            seconds = time.perf_counter() - began
            state.step += 1
            state.examples += len(examples)
            state.tokens += tokens
            state.seconds += seconds
            self._stepping = False
            self._note_finite(finite, loss)
        event: dict[str, Any] = {
            "step": state.step,
            "loss": round(loss, 6) if math.isfinite(loss) else None,
            "learning_rate": rate,
            "grad_norm": round(norm, 6) if math.isfinite(norm) else None,
            "examples": len(examples),
            "tokens": tokens,
            "supervised_tokens": supervised,
            "computed_tokens": sum(len(p.ids) for p in packs),
            "seconds": round(seconds, 4),
            "data_seconds": round(read + self._train_batches.seconds - cut_before, 4),
            "tokens_per_second": round(tokens / seconds, 1),
            "memory_gib": round(peak_memory_gib(self.trainable.device), 3),
            "epoch": round(state.examples / self.split.sampler.epoch_size, 4),
        }
        if state.step % self.settings.logging_steps == 0 or state.step == state.total:
            self.trackers.log("train", self.folder.log("step", **event))
        return event

    def _examples(self, step: int) -> list[Example]:
        indices = self.split.sampler.step(step - self.state.data_offset)
        return [self.split.dataset[int(i)] for i in indices]

    def _change_weights(self, loss: float, rate: float) -> tuple[float, bool]:
        """Change the weights if loss and gradient are finite: (the gradient's norm, whether)."""
        try:
            norm = self._unscale_and_clip()
            finite = math.isfinite(loss) and math.isfinite(norm)
            if finite:
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                self.optimizer.step()
        except (RuntimeError, MemoryError) as e:
            if not is_memory(e):
                raise
            # Some weights may be changed already: this step cannot be computed again.
            raise UserError(
                "out of memory while step {step} changed the weights; the last checkpoint is "
                "intact",
                step=self.state.step + 1,
                where=str(self.trainable.device),
                fix=advice(
                    self.settings,
                    self.trainable,
                    self.state.settings["precision"],
                    self.folder.path,
                    self.settings.cutoff_len,
                ),
            ) from e
        return norm, finite

    def _unscale_and_clip(self) -> float:
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        if self.state.loss_scale != 1.0:
            torch._foreach_div_(gradients, self.state.loss_scale)
        norm: Tensor = torch.nn.utils.get_total_norm(gradients)
        limit = self.settings.max_grad_norm
        if limit:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), limit, norm)
        return float(norm)

    def _note_finite(self, finite: bool, loss: float) -> None:
        """Count steps without a finite gradient.

        Raises: UserError after too many in a row.
        """
        state, settings = self.state, self.settings
        fp16 = load.Chosen(state.settings["precision"], "").dtype is torch.float16
        if finite:
            state.last_loss = loss
            state.nonfinite_in_a_row = 0
            if fp16 and state.step % FP16_SCALE_GROWS_EVERY == 0:
                state.loss_scale = min(state.loss_scale * 2, FP16_SCALE_MAX)
            return
        state.nonfinite += 1
        state.nonfinite_in_a_row += 1
        if fp16:
            state.loss_scale = max(1.0, state.loss_scale / 2)
        message = Message("step {step} skipped: loss or gradient is not finite", step=state.step)
        self.console.warn(message)
        self.folder.log("warning", step=state.step, message=message, loss_scale=state.loss_scale)
        if state.nonfinite_in_a_row >= settings.max_nonfinite_steps:
            raise UserError(
                "{count} steps in a row without a finite gradient",
                count=state.nonfinite_in_a_row,
                where=Message("step {step}", step=state.step),
                fix="Lower --learning_rate, or use --precision bf16 or fp32. The last "
                "checkpoint is intact.",
            )

    # -- between steps ---------------------------------------------------------------------------

    def _after_step(self) -> bool:
        """Evaluate, sample and save if it is time; whether to stop early."""
        state = self.state
        last = state.step == state.total
        stop = False
        if self.split.validation and (state.step % self.eval_every == 0 or last):
            stop = self._evaluate()
        due = state.step % self.sample_every == 0 or last
        if self.sampler is not None and due and not self.signals:
            self.sampler.sample(state, lambda: self.signals > 0)
        # A whole checkpoint at the end, too: it is what adapter/ is made from.
        best_now = bool(self.split.validation) and state.best_step == state.step
        if state.step % self.settings.save_steps == 0 or last or best_now or stop:
            self._save()
        return stop and not last

    def _evaluate(self) -> bool:
        """Compute the eval loss; whether patience has run out."""
        state = self.state
        began = time.perf_counter()
        state.evaluation_due = True
        _, (loss, count) = self._eval_batches.run(
            self.split.validation, lambda packs, _: self.trainable.mean_loss(packs)
        )
        state.evaluation_due = False
        if self.first_eval is None:
            self.first_eval = loss
        # What the run began with is what to beat, not a result.
        trained = state.step > self.first_step
        better = trained and (state.best_loss is None or loss < state.best_loss)
        if better:
            state.best_loss, state.best_step = loss, state.step
            state.evaluations_without_gain = 0
        elif trained:
            state.evaluations_without_gain += 1
        event = self.folder.log(
            "eval",
            step=state.step,
            loss=round(loss, 6),
            perplexity=round(math.exp(min(loss, 50.0)), 4),
            supervised_tokens=count,
            best=better,
            seconds=round(time.perf_counter() - began, 3),
        )
        self.trackers.log("eval", event)
        self.console.say(f"step {state.step}: eval loss {loss:.4f}" + (" (best)" if better else ""))
        patience = self.settings.early_stopping_patience
        return bool(patience) and state.evaluations_without_gain >= patience

    def _save(self) -> None:
        state = self.state
        self._saving = True
        try:
            target = checkpoints.save(
                self.folder.checkpoints, state, self.trainable.model, self.optimizer,
                list(self.parameters), self.adapter_meta,
            )  # fmt: skip
        finally:
            self._saving = False
        self.folder.log(
            "checkpoint", step=state.step, path=str(target.relative_to(self.folder.path))
        )
        spare = [checkpoints.name_of(state.best_step)] if state.best_loss is not None else []
        checkpoints.prune(self.folder.checkpoints, self.settings.save_total_limit, spare)

    # -- the end ---------------------------------------------------------------------------------

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM: the first ends the run after the current step, the second at once,
        without that step. A checkpoint that is being written is finished first; the third signal
        ends the run without it."""

        def note(*_: Any) -> None:
            self.signals += 1
            if self.signals == 1:
                self.console.say(self._stopping())
            elif self.signals == 2 and self._saving:
                self.console.say("a checkpoint is being written (Ctrl-C again: stop without it)")
            else:
                interrupts.keeps(self._lost())
                interrupts.interrupt()

        try:
            old = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: whoever runs it there has its own way to stop
            yield
            return
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _stopping(self) -> str:
        """What the first Ctrl-C says."""
        if self._finishing:
            return "all steps are saved; writing the adapter (Ctrl-C again: stop at once)"
        kept = f"stopping after step {self.state.step + self._stepping}; everything is saved"
        if self._stepping:
            return f"{kept} (Ctrl-C again: stop at once and lose this step) ..."
        return f"{kept} (Ctrl-C again: stop at once) ..."

    def _interrupted_at_once(self) -> Outcome:
        """After the second Ctrl-C: the current step is lost, the completed ones are saved.

        Raises: KeyboardInterrupt at the third.
        """
        state = self.state
        self.optimizer.zero_grad(set_to_none=True)
        lost = "nothing is lost"
        if self._stepping:
            lost = f"step {state.step + 1} was interrupted and is lost"
        elif state.evaluation_due:
            lost = "the evaluation was interrupted; resuming repeats it"
        self.console.say(f"{lost}; saving the completed steps ...")
        return self._interrupted()

    def _lost(self) -> str:
        """What is lost and what is kept if nothing more is written."""
        step = self.state.step
        resume = f"resume with: vicuna train --resume {shell_word(self.folder.path)}"
        saved = [int(p.name[5:]) for p in checkpoints.all_of(self.folder.checkpoints)]
        last = max((k for k in saved if k <= step), default=0)
        if last == step:
            return f"everything up to step {step} is saved; {resume}"
        steps = f"steps {last + 1} to {step} are" if step - last > 1 else f"step {step} is"
        kept = f"those up to {last} are saved" if last else "there is no checkpoint yet"
        return f"{steps} lost, {kept}; {resume}"

    def _interrupted(self) -> Outcome:
        state = self.state
        if not (self.folder.checkpoints / checkpoints.name_of(state.step)).is_dir():
            self._save()
        self._end("interrupted")
        return Outcome(False, "interrupted", state.step, self.first_eval, state.best_loss)

    def _finish(self, reason: str) -> Outcome:
        state = self.state
        self._finishing = True
        best = self.settings.final_adapter == "best" and bool(self.split.validation)
        source = self.folder.checkpoints / checkpoints.name_of(
            state.best_step if best else state.step
        )
        took = state.best_step if best and source.is_dir() else state.step
        if best and state.best_step and not source.is_dir():
            self.console.warn(
                Message(
                    "the best checkpoint (step {step}) is not in this run's folder",
                    step=state.best_step,
                )
            )
        with whole_folder(self.folder.adapter) as aside:
            if took != state.step:
                for path in (source / "adapter").iterdir():
                    (aside / path.name).write_bytes(path.read_bytes())
            else:
                adapters.save(self.trainable.model, aside, self.adapter_meta)
        self._end(reason, adapter_step=took)
        return Outcome(True, reason, state.step, self.first_eval, state.best_loss, state.last_loss)

    def _end(self, reason: str, **more: Any) -> None:
        state = self.state
        self.folder.log(
            "end",
            step=state.step,
            reason=reason,
            loss=state.last_loss,
            best_loss=state.best_loss,
            best_step=state.best_step,
            examples_seen=state.examples,
            tokens_seen=state.tokens,
            train_seconds=round(state.seconds, 2),
            nonfinite_steps=state.nonfinite,
            **more,
        )
        try:
            plot_loss(self.folder.path)
        except UserError as e:  # the run itself is on the disk
            self.console.warn(str(e))
        self.trackers.close()


def _progress(event: dict[str, Any]) -> str:
    """A step's event as the progress bar shows it."""
    loss = "not finite" if event["loss"] is None else f"{event['loss']:.4f}"
    return f"loss {loss}  {event['tokens_per_second']:.0f} tokens/s  {event['memory_gib']:.1f} GiB"


def peak_memory_gib(device: torch.device) -> float:
    """The peak memory so far, in GiB: of the GPU if there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return float(psutil.Process().memory_info().peak_wset) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
