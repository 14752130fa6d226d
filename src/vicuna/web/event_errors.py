"""What goes wrong in an event reaches the browser in words, whoever sent what."""

from __future__ import annotations

import functools
import inspect
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, closing
from typing import Any

import gradio as gr

from vicuna import terminal
from vicuna.errors import UserError
from vicuna.web.i18n import translate
from vicuna.web.render import toast

WIDE = 400  # characters of a line of the log: an error may quote all that somebody sent


def plainly(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function of an event, of the same kind, whose mistakes are told to the one who asks."""
    made: Callable[..., Any]
    if inspect.isasyncgenfunction(fn):

        async def steps(*given: Any, **named: Any) -> AsyncIterator[Any]:
            try:
                # Closed with this one, so that nobody follows any more what is not looked at.
                async with aclosing(fn(*given, **named)) as inner:
                    async for step in inner:
                        yield step
            except Exception as e:
                raise _reported(e, given) from None

        made = steps
    elif inspect.iscoroutinefunction(fn):

        async def coming(*given: Any, **named: Any) -> Any:
            try:
                return await fn(*given, **named)
            except Exception as e:
                raise _reported(e, given) from None

        made = coming
    elif inspect.isgeneratorfunction(fn):

        def each(*given: Any, **named: Any) -> Iterator[Any]:
            try:
                with closing(fn(*given, **named)) as inner:
                    yield from inner
            except Exception as e:
                raise _reported(e, given) from None

        made = each
    else:

        def plain(*given: Any, **named: Any) -> Any:
            try:
                return fn(*given, **named)
            except Exception as e:
                raise _reported(e, given) from None

        made = plain
    return functools.wraps(fn)(made)


def _reported(error: Exception, given: tuple[Any, ...]) -> Exception:
    if isinstance(error, gr.Error):
        return error
    request = next((value for value in given if isinstance(value, gr.Request)), None)
    if isinstance(error, UserError):
        return gr.Error(toast(error, functools.partial(translate, request)), print_exception=False)
    lines = "".join(traceback.format_exception(error)).splitlines()
    terminal.say("\n".join(line[:WIDE] for line in lines), error=True)
    return gr.Error(translate(request, "page.failed"), print_exception=False)
