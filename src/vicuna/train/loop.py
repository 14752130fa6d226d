"""The training loop: packs, gradients, one update; evaluation, samples, checkpoints between them.

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
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vicuna import interrupts
from vicuna.data.loss_mask import Example
from vicuna.errors import UserError
from vicuna.files import whole_folder
from vicuna.model import adapter as adapters
from vicuna.model import load
from vicuna.model.out_of_memory import is_memory
from vicuna.paths import shell_word
from vicuna.train import checkpoint as checkpoints
from vicuna.train.oom import EVALUATION, TRAINING, Shrinking, advice
from vicuna.train.reporters import Reporters
from vicuna.train.setup import Session

FP16_SCALE_GROWS_EVERY = 500
FP16_SCALE_MAX = 65536.0
EARLY = "no lower validation loss"


@dataclass
class Outcome:
    """How a run ended. finished: False where it was interrupted and can be resumed."""

    finished: bool
    reason: str
    step: int
    first_eval: float | None = None
    best_eval: float | None = None
    last_loss: float | None = None


class Training:
    """One run of the loop over a session."""

    def __init__(self, session: Session) -> None:
        self.s = session
        self.state = session.state
        self.parameters = session.trainable.parameters
        self.reporters = Reporters(session.settings, session.run)
        self.signals = 0  # how often Ctrl-C, or SIGTERM, came
        self._updating = self._saving = self._finishing = False
        self._cut_off: set[str] = set()  # sample prompts whose last answer is not whole
        self.first_eval: float | None = None
        self.first_step = session.state.step
        self._training = Shrinking(session, TRAINING)
        self._evaluation = Shrinking(session, EVALUATION)
        total = self.state.total
        self.eval_every = session.settings.eval_steps or max(1, math.ceil(total / 10))
        self.sample_every = session.settings.sample_steps or self.eval_every

    # -- the loop --------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Train to the end or the first signal; all that was learned is on the disk afterwards."""
        s, state = self.s, self.state
        s.run.log(
            "start",
            step=state.step,
            total_steps=state.total,
            resumed=s.resumed,
            examples=s.split.train_examples,
            validation_examples=len(s.split.validation),
            precision=state.settings["precision"],
            template=s.renderer.template.name,
        )
        for words in s.screen.warnings:
            s.run.log("warning", step=state.step, message=words)
        if s.split.validation and not s.resumed:
            self._evaluate()
        with self._signals():
            try:
                with s.screen.bar(state.total, state.step) as show:
                    reason = self._loop(show)
            except KeyboardInterrupt:
                if self.signals > 2:
                    raise
                return self._given_up()
            if not reason:
                return self._interrupted()
            return self._finish(reason)

    def _loop(self, show: Callable[[int, str], None]) -> str:
        """Update after update; why it ended, "" where it was interrupted."""
        state = self.state
        if state.evaluation_due and self._between():
            return EARLY
        while state.step < state.total:
            line = self._step()
            show(state.step, _words(line))
            if self._between():
                return EARLY
            if self.signals and state.step < state.total:
                return ""
        return "done"

    def _step(self) -> dict[str, Any]:
        """One update over exactly `batch_size` examples."""
        s, state = self.s, self.state
        began = time.perf_counter()
        self._updating = True
        examples = self._examples(state.step)
        read, cut_before = time.perf_counter() - began, self._training.seconds
        s.trainable.dropout.step = state.step
        s.optimizer.zero_grad(set_to_none=True)
        packs, loss = self._training.run(
            examples,
            lambda packs, supervised: s.trainable.backward(packs, supervised, state.loss_scale),
        )
        supervised = sum(p.supervised for p in packs)
        rate = s.schedule.rate(state.step)
        # Weights and state change together: a second Ctrl-C finds them whole.
        with interrupts.shielded():
            norm, finite = self._update(loss, rate)
            tokens = sum(p.tokens for p in packs)
            seconds = time.perf_counter() - began
            state.step += 1
            state.examples += len(examples)
            state.tokens += tokens
            state.seconds += seconds
            self._updating = False
            self._note_finite(finite, loss)
        line: dict[str, Any] = {
            "step": state.step,
            "loss": round(loss, 6) if math.isfinite(loss) else None,
            "learning_rate": rate,
            "grad_norm": round(norm, 6) if math.isfinite(norm) else None,
            "examples": len(examples),
            "tokens": tokens,
            "supervised_tokens": supervised,
            "computed_tokens": sum(len(p.ids) for p in packs),
            "seconds": round(seconds, 4),
            "data_seconds": round(read + self._training.seconds - cut_before, 4),
            "tokens_per_second": round(tokens / seconds, 1),
            "memory_gib": round(peak_memory_gib(s.trainable.device), 3),
            "epoch": round(state.examples / s.split.sampler.epoch_size, 4),
        }
        if state.step % s.settings.logging_steps == 0 or state.step == state.total:
            self.reporters.log("train", s.run.log("step", **line))
        return line

    def _examples(self, step: int) -> list[Example]:
        wanted = self.s.split.sampler.step(step - self.state.data_offset)
        return [self.s.split.dataset[int(i)] for i in wanted]

    def _update(self, loss: float, rate: float) -> tuple[float, bool]:
        """Change the weights, unless loss or gradient is not finite: (gradient's norm, whether)."""
        s = self.s
        try:
            norm = self._unscale_and_clip()
            finite = math.isfinite(loss) and math.isfinite(norm)
            if finite:
                for group in s.optimizer.param_groups:
                    group["lr"] = rate
                s.optimizer.step()
        except (RuntimeError, MemoryError) as e:
            if not is_memory(e):
                raise
            # Some weights may be changed already: this cannot be done again.
            raise UserError(
                f"out of memory while the weights of update {s.state.step + 1} were changed; the "
                "last checkpoint is unharmed",
                where=str(s.trainable.device),
                fix=advice(s, s.settings.cutoff_len),
            ) from e
        return norm, finite

    def _unscale_and_clip(self) -> float:
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        if self.state.loss_scale != 1.0:
            torch._foreach_div_(gradients, self.state.loss_scale)
        norm: Tensor = torch.nn.utils.get_total_norm(gradients)
        limit = self.s.settings.max_grad_norm
        if limit:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), limit, norm)
        return float(norm)

    def _note_finite(self, finite: bool, loss: float) -> None:
        """Count steps without a finite gradient; stop with advice when they do not end."""
        state, settings = self.state, self.s.settings
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
        words = f"update {state.step} skipped: loss or gradient is not finite"
        self.s.screen.warn(words)
        self.s.run.log("warning", step=state.step, message=words, loss_scale=state.loss_scale)
        if state.nonfinite_in_a_row >= settings.max_nonfinite_steps:
            raise UserError(
                f"{state.nonfinite_in_a_row} updates in a row without a finite gradient",
                where=f"step {state.step}",
                fix="Lower --learning_rate, or use --precision bf16 or fp32. The last whole "
                "checkpoint is unharmed.",
            )

    # -- between steps ---------------------------------------------------------------------------

    def _between(self) -> bool:
        """Evaluate, sample and save where it is time; whether to stop early."""
        s, state = self.s, self.state
        last = state.step == state.total
        stop = False
        if s.split.validation and (state.step % self.eval_every == 0 or last):
            stop = self._evaluate()
        due = state.step % self.sample_every == 0 or last
        if s.sample_prompts and due and not self.signals:
            self._sample()
        # A whole checkpoint at the end, too: it is what adapter/ is made from.
        best_now = bool(s.split.validation) and state.best_step == state.step
        if state.step % s.settings.save_steps == 0 or last or best_now or stop:
            self._save()
        return stop and not last

    def _evaluate(self) -> bool:
        """Mean loss over the held-out examples; whether patience has run out."""
        s, state = self.s, self.state
        began = time.perf_counter()
        state.evaluation_due = True
        _, (loss, count) = self._evaluation.run(
            s.split.validation, lambda packs, _: s.trainable.mean_loss(packs)
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
        event = s.run.log(
            "eval",
            step=state.step,
            loss=round(loss, 6),
            perplexity=round(math.exp(min(loss, 50.0)), 4),
            supervised_tokens=count,
            best=better,
            seconds=round(time.perf_counter() - began, 3),
        )
        self.reporters.log("eval", event)
        s.screen.say(f"step {state.step}: held-out loss {loss:.4f}" + (" (best)" if better else ""))
        patience = s.settings.early_stopping_patience
        return bool(patience) and state.evaluations_without_gain >= patience

    def _sample(self) -> None:
        """Answer the sample prompts with the weights as they are now, within the budget."""
        from vicuna.train.samples import Budget, answer, out_of_time

        s, state = self.s, self.state
        budget = Budget(s.settings.sample_share, state.seconds, state.sample_seconds)
        # What was cut off last time is asked first.
        prompts = sorted(s.sample_prompts, key=lambda p: p not in self._cut_off)
        s.screen.say(f"step {state.step}: answering {len(prompts)} sample prompts ...")
        whole = []
        try:
            for answered in answer(s, prompts, lambda: budget.gone or self.signals > 0):
                s.run.log("sample", step=state.step, **asdict(answered))
                cut = "" if answered.whole else " (cut off)"
                s.screen.say(f"step {state.step}: {answered.prompt!r} -> {answered.answer!r}{cut}")
                whole += [answered.prompt] * answered.whole
        finally:
            state.sample_seconds += budget.used
        self._cut_off = {p for p in prompts if p not in whole}
        if self._cut_off and budget.gone:
            words = out_of_time(state.step, len(whole), len(prompts), s.settings.sample_share)
            s.run.log("warning", step=state.step, message=words)
            s.screen.say(words)

    def _save(self) -> None:
        s, state = self.s, self.state
        self._saving = True
        try:
            target = checkpoints.save(
                s.run.checkpoints, state, s.trainable.model, s.optimizer, list(self.parameters),
                s.meta,
            )  # fmt: skip
        finally:
            self._saving = False
        s.run.log("checkpoint", step=state.step, path=str(target.relative_to(s.run.path)))
        spare = [checkpoints.name_of(state.best_step)] if state.best_loss is not None else []
        checkpoints.prune(s.run.checkpoints, s.settings.save_total_limit, spare)

    # -- the end ---------------------------------------------------------------------------------

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM: the first ends the run after the update at hand, the second gives
        that up. A checkpoint that is being written is finished first; the third gives it up."""

        def note(*_: Any) -> None:
            self.signals += 1
            if self.signals == 1:
                self.s.screen.say(self._kept())
            elif self.signals == 2 and self._saving:
                self.s.screen.say("a checkpoint is being written; once more: at once, without it")
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

    def _kept(self) -> str:
        """What the first Ctrl-C says."""
        if self._finishing:
            return "all updates are saved; the adapter is being written (once more: at once)"
        kept = f"stopping after update {self.state.step + self._updating}: everything is kept"
        if self._updating:
            return f"{kept} (once more: at once, and this update is lost) ..."
        return f"{kept} (once more: at once) ..."

    def _given_up(self) -> Outcome:
        """After the second Ctrl-C: the update at hand is lost, the whole ones are saved.

        Raises: KeyboardInterrupt at the third.
        """
        s, state = self.s, self.state
        s.optimizer.zero_grad(set_to_none=True)
        lost = "nothing"
        if self._updating or state.evaluation_due:
            half = f"update {state.step + 1}" if self._updating else "the evaluation"
            lost = f"{half} was given up half done and"
        s.screen.say(f"{lost} is lost; saving what was done before ...")
        return self._interrupted()

    def _lost(self) -> str:
        """What is lost, and kept, where nothing more is written."""
        step = self.state.step
        again = f"go on with: vicuna train --resume {shell_word(self.s.run.path)}"
        saved = [int(p.name[5:]) for p in checkpoints.all_of(self.s.run.checkpoints)]
        last = max((k for k in saved if k <= step), default=0)
        if last == step:
            return f"everything up to update {step} is kept; {again}"
        updates = f"updates {last + 1} to {step} are" if step - last > 1 else f"update {step} is"
        kept = f"those up to {last} are kept" if last else "there is no checkpoint yet"
        return f"{updates} lost, {kept}; {again}"

    def _interrupted(self) -> Outcome:
        state = self.state
        if not (self.s.run.checkpoints / checkpoints.name_of(state.step)).is_dir():
            self._save()
        self._end("interrupted")
        return Outcome(False, "interrupted", state.step, self.first_eval, state.best_loss)

    def _finish(self, reason: str) -> Outcome:
        s, state = self.s, self.state
        self._finishing = True
        best = s.settings.final_adapter == "best" and bool(s.split.validation)
        source = s.run.checkpoints / checkpoints.name_of(state.best_step if best else state.step)
        took = state.best_step if best and source.is_dir() else state.step
        if best and state.best_step and not source.is_dir():
            s.screen.warn(
                f"the best checkpoint (step {state.best_step}) is not in this run's folder"
            )
        with whole_folder(s.run.adapter) as aside:
            if took != state.step:
                for path in (source / "adapter").iterdir():
                    (aside / path.name).write_bytes(path.read_bytes())
            else:
                adapters.save(s.trainable.model, aside, s.meta)
        self._end(reason, adapter_step=took)
        return Outcome(True, reason, state.step, self.first_eval, state.best_loss, state.last_loss)

    def _end(self, reason: str, **more: Any) -> None:
        from vicuna.train.plot import plot_loss

        s, state = self.s, self.state
        s.run.log(
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
            plot_loss(s.run.path)
        except UserError as e:  # the run itself is on the disk
            s.screen.warn(str(e))
        self.reporters.close()


def _words(line: dict[str, Any]) -> str:
    loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
    return f"loss {loss}  {line['tokens_per_second']:.0f} tokens/s  {line['memory_gib']:.1f} GiB"


def peak_memory_gib(device: torch.device) -> float:
    """The most memory held so far: on the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return float(psutil.Process().memory_info().peak_wset) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
