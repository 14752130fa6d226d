"""What transformers prints by itself, turned off."""

from __future__ import annotations

import os


def quiet_transformers() -> None:
    """Turn off progress bars and hints of the libraries: what matters is said by this project."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
