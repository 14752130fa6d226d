"""Fixtures of all tests: a cache of their own, and the folders that helpers are imported from."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "generate")]
USERS_CACHE = os.environ.get("VICUNA_CACHE")


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    cache = tmp_path_factory.getbasetemp() / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VICUNA_CACHE", str(cache))
        yield cache


@pytest.fixture
def users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache outside the tests, where the embedded base may lie converted already."""
    if USERS_CACHE is None:
        monkeypatch.delenv("VICUNA_CACHE", raising=False)
    else:
        monkeypatch.setenv("VICUNA_CACHE", USERS_CACHE)
