"""What the tabs share to say what happens on the events of their components."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

# What an event changes: component → value or `gr.update`.
Updates = dict[Any, Any]
# Without gradio's progress over the outputs, and not among what programs can call (`api_name`).
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


def bind(fn: Callable[..., Any], *first: Any) -> Callable[..., Any]:
    """`fn` with its first arguments given, as `partial`; but gradio, which looks for a parameter
    of the type `gr.Request`, still finds it."""
    bound: Any
    if inspect.isgeneratorfunction(fn):

        def steps(*rest: Any) -> Iterator[Any]:
            yield from fn(*first, *rest)

        bound = steps
    else:

        def plain(*rest: Any) -> Any:
            return fn(*first, *rest)

        bound = plain
    functools.update_wrapper(bound, fn)
    signature = inspect.signature(fn)
    left = list(signature.parameters.values())[len(first) :]
    bound.__signature__ = signature.replace(parameters=left)
    # Only those of the parameters that are left: gradio resolves all annotations, and passes no
    # request at all if one of them is a name that only type checkers import.
    names = {"return", *(p.name for p in left)}
    bound.__annotations__ = {k: v for k, v in fn.__annotations__.items() if k in names}
    return bound
