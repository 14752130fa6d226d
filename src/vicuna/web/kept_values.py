"""What somebody chose on the page and a reload brings back: kept in the browser, by its tab.

Nothing is sent anywhere for it, and two tabs keep each their own. Conversations, the adapters that
answer and the system prompt are on the server instead (`sessions.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def keep(components: Sequence[Any]) -> None:
    """Note in the browser what is chosen in these components, each with an id of its own."""
    for component in components:
        component.change(
            None, component, None, js=f"(value) => {{ vicunaKeep('{component.elem_id}', value); }}"
        )


def restored(components: Sequence[Any]) -> str:
    """JavaScript that takes the values of these components as they are now, and is a list of those
    that were kept."""
    return f"vicunaRestored({[str(c.elem_id) for c in components]}, now)"
