"""The one door to the terminal: what came from a file, a model or a hub cannot command it.

A terminal obeys the control characters it is sent: a file's name, an error's text or a model's
answer could clear the screen, retitle the window or write over what was said before. All that
this project prints goes through here, where such characters become signs that are only seen.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from typing import Any

# C0 and C1 controls and DEL, but for the line's end and the tab; and what turns the direction of
# the text around it, so that it reads otherwise than it is.
_TURNING = "\u202a-\u202e\u2066-\u2069"
COMMANDS = re.compile(f"[\x00-\x08\x0b-\x1f\x7f-\x9f{_TURNING}]")
# And halves of a character, which no encoding of a terminal has.
_NOT_IN_JSON = re.compile(f"{COMMANDS.pattern[:-1]}\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with a sign (␛ for escape) in place of each character that commands a terminal.

    Line ends and tabs stay; a carriage return before a line's end goes.
    """
    if not COMMANDS.search(text):
        return text
    return COMMANDS.sub(lambda m: _sign(m[0]), text.replace("\r\n", "\n"))


def _sign(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else "\ufffd"


def say(text: object = "", *, error: bool = False, end: str = "\n", dim: bool = False) -> None:
    """Print a line, to standard error if `error`; dim if a terminal shows it so."""
    stream = sys.stderr if error else sys.stdout
    shown = visible(str(text))
    if dim and stream.isatty() and "NO_COLOR" not in os.environ:
        shown = f"\x1b[2m{shown}\x1b[0m"
    try:
        stream.write(shown + end)
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as e:  # a full disk behind `>`: the error itself names no place
        raise OSError(e.errno, e.strerror, stream.name) from e


def say_json(value: Any) -> None:
    """Print one JSON object on a line; control characters are escaped, so its value is the same."""
    line = json.dumps(value, ensure_ascii=False)
    say(_NOT_IN_JSON.sub(lambda m: f"\\u{ord(m[0]):04x}", line))


def say_traceback(error: BaseException) -> None:
    """Print an error and where it came from to standard error."""
    say("".join(traceback.format_exception(error)), error=True, end="")


def recount(text: str, last: bool) -> None:
    """Write over the line on standard error that this wrote before; `last` ends it."""
    sys.stderr.write("\r" + visible(text) + ("\n" if last else ""))
    sys.stderr.flush()
