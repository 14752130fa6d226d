"""`vicuna train`: from the words behind the command to a finished run and what to type next."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from vicuna import config, interrupts
from vicuna.errors import EXIT_INTERRUPTED, UserError
from vicuna.paths import shell_word
from vicuna.train.finished import finished
from vicuna.train.progress import Screen


def run(words: Sequence[str]) -> int:
    """Train; returns the exit code.

    Raises: UserError for everything a user can mend.
    """
    settings, given = config.parse(config.TrainSettings, words)
    screen = Screen()
    if end := finished(settings, given):
        screen.say(f"this run is finished: {end.steps} updates, {end.reason}")
        screen.say(f"adapter    {end.run / 'adapter'}")
        screen.say(f"learn on:  vicuna train --init_adapter {shell_word(end.run)} --dataset FILE")
        return 0
    again = "the same command"
    if settings.resume:
        again = f"vicuna train --resume {shell_word(settings.resume)}"
    interrupts.keeps(f"no update was begun, and nothing is lost; start again with: {again}")
    # torch and transformers are imported from here on, after the settings are known to be good.
    from vicuna.train.loop import Outcome, Training
    from vicuna.train.setup import prepare

    session = prepare(settings, given, screen)
    try:
        outcome: Outcome = Training(session).run()
    except BaseException as e:
        # A disk that is full has no room for these words either.
        with contextlib.suppress(UserError):
            session.run.log("warning", step=session.state.step, message=f"{type(e).__name__}: {e}")
        raise
    finally:
        session.run.close()
    folder = session.run.path
    if not outcome.finished:
        interrupts.answered()
        screen.say(f"stopped after update {outcome.step}; everything up to here is saved")
        screen.say(f"go on with:  vicuna train --resume {shell_word(folder)}")
        return EXIT_INTERRUPTED
    screen.say(f"\ndone after {outcome.step} updates ({outcome.reason})")
    if outcome.best_eval is not None:
        before = f"{outcome.first_eval:.4f} -> " if outcome.first_eval is not None else ""
        screen.say(f"held-out loss {before}{outcome.best_eval:.4f}")
    screen.say(f"adapter    {session.run.adapter}")
    screen.say(f"loss plot  {folder / 'loss.png'}")
    screen.say(f"talk:      vicuna chat --adapter {shell_word(folder)}")
    return 0
