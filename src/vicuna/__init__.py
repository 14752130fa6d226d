"""Fine-tune Llama-family models on Chinese instructions, and talk with the result.

`vicuna.load(...)` opens a model to ask; see `vicuna.api`. Nothing heavy is imported before.
"""

from __future__ import annotations

import os.path
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vicuna.api import Model as Model
    from vicuna.api import load as load
    from vicuna.generate.events import Finished as Finished
    from vicuna.generate.events import Step as Step
    from vicuna.generate.settings import Settings as Settings

__version__ = "0.1.0"
__all__ = ["Finished", "Model", "Settings", "Step", "load"]

_PLACES = {
    "load": "vicuna.api",
    "Model": "vicuna.api",
    "Step": "vicuna.generate.events",
    "Finished": "vicuna.generate.events",
    "Settings": "vicuna.generate.settings",
}

if sys.argv and os.path.splitext(os.path.basename(sys.argv[0]))[0] in ("-m", "vicuna"):
    # This process is the command: Ctrl-C is answered while libraries are still imported, too.
    from vicuna.interrupts import catch_early

    catch_early()


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'vicuna' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PLACES[name]), name)
