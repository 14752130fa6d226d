"""Several adapters as one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kit import tiny_model, with_adapter
from vicuna.errors import UserError
from vicuna.generate.engines.torch import TorchEngine
from vicuna.model.adapter import read_adapter, save
from vicuna.model.lora_delta import save_weighted_sum

PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of one base: of different ranks, scales and modules."""
    place = tmp_path_factory.mktemp("mix")
    shapes = {
        "law": {"rank": 4, "alpha": 12.0},
        "poems": {"rank": 2, "alpha": 8.0, "target": ("q_proj", "down_proj"), "rslora": True},
    }
    for seed, (name, shape) in enumerate(shapes.items(), 1):
        (place / name).mkdir()
        meta = {"base": {"name": "tiny"}, "template": {"name": name}}
        save(with_adapter(tiny_model("llama"), seed, **shape), place / name, meta)
    return place


def test_the_merged_adapter_adds_what_its_parts_add(folder: Path, tmp_path: Path) -> None:
    law, poems = (read_adapter(str(folder / name)) for name in ("law", "poems"))
    engine = TorchEngine(tiny_model("llama"), 64)
    base = engine.prefill(PROMPT)
    engine.load_adapter("law", law)
    engine.load_adapter("poems", poems)
    assert torch.allclose(engine.prefill(PROMPT), base)  # loaded is not chosen
    engine.use_adapters({"law": 0.7, "poems": -0.4})
    both = engine.prefill(PROMPT)
    assert (both - base).abs().max() > 0.01

    save_weighted_sum({"law": (law, 0.7), "poems": (poems, -0.4)}, tmp_path / "mix")
    merged = read_adapter(str(tmp_path / "mix"))
    assert merged.lora.rank == 6
    assert merged.meta["template"] == {"name": "law"}  # the heaviest one's
    assert merged.meta["mixed"][1] == {"adapter": "poems", "strength": -0.4}
    engine.load_adapter("merged", merged)
    engine.use_adapters({"merged": 1.0})
    assert torch.allclose(engine.prefill(PROMPT), both, atol=1e-4)

    engine.drop_adapter("law")
    engine.use_adapters({"merged": 1.0})
    assert torch.allclose(engine.prefill(PROMPT), both, atol=1e-4)


def test_what_is_there_stays_and_shapes_must_match(folder: Path, tmp_path: Path) -> None:
    law = read_adapter(str(folder / "law"))
    with pytest.raises(UserError, match="exists already"):
        save_weighted_sum({"law": (law, 1.0)}, folder / "poems")
    (tmp_path / "wide").mkdir()
    wide = with_adapter(tiny_model("llama", hidden_size=64), 1, rank=4)
    save(wide, tmp_path / "wide", {})
    with pytest.raises(UserError, match="different shapes"):
        save_weighted_sum(
            {"a": (law, 1.0), "b": (read_adapter(str(tmp_path / "wide")), 1.0)}, tmp_path / "x"
        )
    assert not (tmp_path / "x").exists()
    with pytest.raises(UserError, match="nothing to merge"):
        save_weighted_sum({}, tmp_path / "x")
