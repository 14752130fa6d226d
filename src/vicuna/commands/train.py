"""`vicuna train`: from its arguments to a finished run, and what to type next."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from vicuna import config, interrupts
from vicuna.errors import EXIT_INTERRUPTED, UserError
from vicuna.paths import shell_word
from vicuna.train.progress import RunConsole
from vicuna.train.run_folder import ended_run


def run(argv: Sequence[str]) -> int:
    """Train; returns the exit code.

    Raises: UserError for everything that a user can mend.
    """
    settings, named = config.parse(config.TrainSettings, argv)
    console = RunConsole()
    if ended := ended_run(settings, named):
        console.say(f"this run is finished: {ended.steps} steps{_why(ended.reason)}")
        console.say(f"adapter    {ended.run / 'adapter'}")
        run_word = shell_word(ended.run)
        console.say(f"train on:  vicuna train --init_adapter {run_word} --dataset FILE")
        return 0
    command = "the same command"
    if settings.resume:
        command = f"vicuna train --resume {shell_word(settings.resume)}"
    interrupts.keeps(f"no step was done, and nothing is lost; start again with: {command}")
    # torch and transformers are imported from here on, after the settings are known to be valid.
    from vicuna.train.setup import prepare

    training = prepare(settings, named, console)
    folder = training.folder.path
    try:
        outcome = training.run()
    except BaseException as e:
        # A full disk has no room for this warning either.
        with contextlib.suppress(UserError):
            message = f"{type(e).__name__}: {e}"
            training.folder.log("warning", step=training.state.step, message=message)
        raise
    finally:
        training.close()
    if not outcome.finished:
        interrupts.answered()
        console.say(f"stopped after step {outcome.step}; everything up to here is saved")
        console.say(f"resume with:  vicuna train --resume {shell_word(folder)}")
        return EXIT_INTERRUPTED
    console.say(f"\nfinished after {outcome.step} steps{_why(outcome.reason)}")
    if outcome.best_eval is not None:
        before = f"{outcome.first_eval:.4f} -> " if outcome.first_eval is not None else ""
        console.say(f"eval loss  {before}{outcome.best_eval:.4f}")
    console.say(f"adapter    {folder / 'adapter'}")
    console.say(f"loss plot  {folder / 'loss.png'}")
    console.say(f"chat:      vicuna chat --adapter {shell_word(folder)}")
    return 0


def _why(reason: str) -> str:
    """Why a run ended, if not because all of its steps were done."""
    return "" if reason == "done" else f" ({reason})"
