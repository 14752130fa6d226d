"""The fixtures of the tests of generation, in `generate_kit`."""

from __future__ import annotations

from generate_kit import encoder, engine, model, renderer

__all__ = ["encoder", "engine", "model", "renderer"]
