"""Fixtures of all tests: a cache of their own, and the folders that helpers are imported from."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [
    str(HERE),
    *(str(HERE / name) for name in ("generate", "web", "browser", "train", "export")),
]


def pytest_collection_finish() -> None:
    """One thread: tiny models gain nothing from more, and lose much on a busy machine."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    cache = tmp_path_factory.getbasetemp() / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VICUNA_CACHE", str(cache))
        yield cache


@pytest.fixture(scope="session", autouse=True)
def same_type_on_any_chip() -> Iterator[None]:
    """`precision auto` is fp32 here, whether or not this CPU has bf16: what tests compare must not
    depend on the machine. bf16 is asked for by name where it is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vicuna.model.load.cpu_has_bf16", lambda: False)
        yield
