"""The folder that commands fail in, made once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from fault_kit import warm_up
from place_kit import make_place


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `place_kit.make_place`."""
    warm_up()
    return make_place(tmp_path_factory.mktemp("place") / "place")
