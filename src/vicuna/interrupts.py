"""Ctrl-C, the same for every command: one line that says what is kept, exit code 130.

The first one ends the command where it is (`train` has a way of its own, see `train/loop.py`).
What renames or cleans up is shielded, so that nothing half-made stays behind however often it is
pressed. A command says with `keeps` what stands at that moment.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from vicuna.errors import EXIT_INTERRUPTED

WORD = "interrupted"  # the line begins with it; the page looks for it
_kept = "nothing was written"
_caught = False
_shields = 0
_waiting = False


def keeps(words: str) -> None:
    """What stays if Ctrl-C comes from now on, in words."""
    global _kept
    _kept = words


def line() -> str:
    """What to print for a command that was interrupted."""
    return f"{WORD}: {_kept}"


def caught() -> bool:
    """Whether there was a Ctrl-C. Libraries make other errors of it now and then."""
    return _caught


def answered() -> None:
    """The command has said by itself what is kept."""
    global _caught
    _caught = False


def catch_early() -> None:
    """Before anything is begun, not even imported: there is nothing to clean up."""

    def leave(*_: Any) -> NoReturn:
        os.write(2, f"\n{line()}\n".encode())
        os._exit(EXIT_INTERRUPTED)

    _handle(leave)


def catch() -> None:
    """Ctrl-C raises KeyboardInterrupt from now on, where it is not shielded from."""

    def note(*_: Any) -> None:
        interrupt()

    _handle(note)
    sys.unraisablehook = _unraisable


def interrupt() -> None:
    """What a handler of Ctrl-C does to end what is going on.

    Raises: KeyboardInterrupt; later, where something is shielded now.
    """
    global _caught, _waiting
    _caught = True
    if _shields:
        _waiting = True
        return
    raise KeyboardInterrupt


def leave_at_once() -> None:
    """A Ctrl-C while the process ends ends it."""
    _handle(lambda *_: os._exit(EXIT_INTERRUPTED))


@contextmanager
def shielded() -> Iterator[None]:
    """What is inside is done whole: Ctrl-C takes effect behind it. For what is short."""
    global _shields, _waiting
    _shields += 1
    try:
        yield
    finally:
        _shields -= 1
        if _waiting and not _shields:
            _waiting = False
            raise KeyboardInterrupt


@contextmanager
def children_spared() -> Iterator[None]:
    """Processes begun inside do not get the terminal's Ctrl-C: this one ends them."""
    mask = getattr(signal, "pthread_sigmask", None)
    if mask is None:  # Windows
        yield
        return
    before = mask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        mask(signal.SIG_SETMASK, before)


def _handle(handler: Any) -> None:
    # Outside the main thread whoever runs it has its own way to stop.
    with suppress(ValueError):
        signal.signal(signal.SIGINT, handler)


def _unraisable(what: Any) -> None:
    """A Ctrl-C that fell into a destructor, where nothing can be raised, comes again behind it."""
    if issubclass(what.exc_type, KeyboardInterrupt):
        import _thread

        _thread.interrupt_main()
    else:
        sys.__unraisablehook__(what)
