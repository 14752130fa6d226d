"""Messages of `vicuna` in the language of the page; `vicuna/i18n` has the catalogue."""

from __future__ import annotations

from collections.abc import Callable

from vicuna.errors import UserError
from vicuna.i18n.translate import translate

Translate = Callable[..., str]


def localize_error(message: Exception | str, tr: Translate) -> str:
    """A message, or all that an error says, in the language of `tr`."""
    text = message.message if isinstance(message, UserError) else message
    return translate(text if isinstance(text, str) else str(text), tr("page.code"))


def localized_parts(error: UserError, tr: Translate) -> tuple[str, str]:
    """(what happened, the way out)."""
    return localize_error(error.what, tr), localize_error(error.fix, tr)


def localize_reason(reason: str, tr: Translate) -> str:
    """A reason of a data report.

    Caches of before keep a reason as text, `REASON: details`: it is translated by its beginning.
    """
    text = localize_error(reason, tr)
    head, colon, details = reason.partition(": ")
    if not colon or text.strip("「」") != reason:
        return text
    known = localize_error(head, tr)
    return text if known.strip("「」") == head else f"{known}：{localize_error(details, tr)}"
