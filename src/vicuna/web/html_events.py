"""Buttons inside of HTML that tell the server what they are for.

An element with `data-act` inside of a `clickable_html()` component triggers its click event with
that act and everything else that the element carries as `data-...` (`data-path` must not be among
it: gradio takes a path for a file); a range or a checkbox tells its value.
"""

from __future__ import annotations

from typing import Any

import gradio as gr


def clickable_html(value: str = "", **options: Any) -> gr.HTML:
    """An HTML component whose buttons act; `event_payload` reads what they carry."""
    return gr.HTML(value, js_on_load="vicunaListen(element, trigger);", **options)


def event_payload(event: gr.EventData) -> dict[str, str]:
    """What the button carried: `act`, and the rest of its data. Nothing of it is to be trusted."""
    found = event._data if isinstance(event._data, dict) else {}
    return {str(k): str(v) for k, v in found.items()}


def address_of(request: gr.Request) -> str:
    """Where a request came from; "" where that is not known."""
    return str(getattr(getattr(request, "client", None), "host", "") or "")


def number(found: dict[str, str], key: str = "i") -> int:
    """A whole number that a button carried; -1 where it is none."""
    text = found.get(key, "")
    return int(text) if text.isdigit() and len(text) < 10 else -1
