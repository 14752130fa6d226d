"""A page over a folder with a tiny model and data: what the tests of Data and Train begin with."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))
from page_kit import open_page
from run_kit import save_tiny_model, write_data


@contextmanager
def served(place: Path, **more: Any) -> Iterator[str]:
    """The address of a page over a folder with `tiny`, `data` and `runs`."""
    if not (place / "tiny").is_dir():
        save_tiny_model(place / "tiny")
        (place / "data").mkdir()
        write_data(place / "data" / "tiny.jsonl", 60)
    with open_page(place, model=str(place / "tiny"), template="", **more) as (_, address):
        yield address
