"""Fixtures of the tests of memory plans."""

from __future__ import annotations

from typing import Any

import pytest

from kit import config_of


@pytest.fixture
def tiny() -> Any:
    """Four layers, grouped queries."""
    return config_of("qwen2", num_hidden_layers=4)
