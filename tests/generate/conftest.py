"""Fixtures of the tests of generation; see `generate_kit`."""

from __future__ import annotations

from typing import Any

import pytest
from generate_kit import byte_level, make_renderer, tiny_llama

from vicuna.data.encode import Encoder
from vicuna.data.template import Renderer
from vicuna.generate.engines.torch import TorchEngine


@pytest.fixture(scope="session")
def renderer() -> Renderer:
    return make_renderer(byte_level(), "chatml")


@pytest.fixture(scope="session")
def encoder(renderer: Renderer) -> Encoder:
    return renderer.encoder


@pytest.fixture(scope="session")
def model(encoder: Encoder) -> Any:
    return tiny_llama(encoder.vocab_size)


@pytest.fixture
def engine(model: Any) -> TorchEngine:
    return TorchEngine(model, 256)
