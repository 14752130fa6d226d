"""Numbers that a browser sends, as this page takes them.

Gradio answers a number beyond a slider's ends by itself: in English, with a traceback in the
server's output, and before any function of the page is asked. Here such a number reaches the
function, which takes it, or says in the language of the page what is wrong with it.
"""

from __future__ import annotations

import math
from typing import Any

import gradio as gr


def take_all_numbers() -> None:
    """Let numbers beyond the ends of sliders and number boxes through to the functions."""
    gr.Number.raise_if_out_of_bounds = staticmethod(_accept)  # type: ignore[method-assign]


def _accept(num: Any, minimum: Any, maximum: Any) -> None:
    """In the place of gradio's own check."""


def number(value: Any, otherwise: float, low: float = -1e9, high: float = 1e9) -> float:
    """A number that a browser sent, between two ends; `otherwise` where it is none, as in a box
    that was emptied."""
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return otherwise
    return min(max(found, low), high) if math.isfinite(found) else otherwise
