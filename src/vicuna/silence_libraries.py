"""Turn off what the libraries print by themselves."""

from __future__ import annotations

import logging
import os


def silence_libraries() -> None:
    """Turn off the progress bars and hints of transformers and bitsandbytes."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers.utils import logging as of_transformers

    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()
    # It misses a kernel from a hub at each start, on some CPUs, and needs none.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
