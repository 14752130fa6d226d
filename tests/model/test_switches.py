"""However PEFT switches adapters, our own forward passes compute what PEFT's would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kit import END, shake, tiny_model
from vicuna.data.loss_mask import Example
from vicuna.data.pack import build_packs
from vicuna.errors import UserError
from vicuna.generate.engines.torch import TorchEngine, open_engine
from vicuna.model.trainable import TrainableModel

CPU = torch.device("cpu")
PROMPT = list(range(3, 23))
Switch = Callable[[Any, Path], None]


def config(**changes: Any) -> Any:
    from peft import LoraConfig

    shape = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj", "down_proj"]}
    return LoraConfig(**{**shape, "task_type": "CAUSAL_LM", **changes})


def two_adapters(family: str) -> Any:
    """A PEFT model with two adapters, the first one active."""
    from peft import get_peft_model

    model = tiny_model(family)
    torch.manual_seed(1)
    peft = get_peft_model(model, config())
    peft.add_adapter("other", config(r=2, target_modules=["q_proj", "up_proj"]))
    shake(peft)
    return peft.eval()


def saved_elsewhere(folder: Path, family: str) -> None:
    """A third adapter on disk, for layers that the others leave alone."""
    from peft import get_peft_model

    peft = get_peft_model(tiny_model(family), config(target_modules=["v_proj", "o_proj", "q_proj"]))
    shake(peft, 7)
    peft.save_pretrained(str(folder))


def layers(peft: Any) -> Iterator[Any]:
    return (m for m in peft.modules() if hasattr(m, "lora_A"))


def scaled(peft: Any, _: Path) -> None:
    for layer in layers(peft):
        layer.scale_layer(0.5)


def set_scale(peft: Any, _: Path) -> None:
    for layer in layers(peft):
        layer.set_scale("default", -1.5)


def loaded(peft: Any, folder: Path) -> None:
    peft.load_adapter(str(folder), "third")
    peft.set_adapter("third")


def weighted(peft: Any, _: Path) -> None:
    peft.add_weighted_adapter(["default", "other"], [0.3, 0.9], "both", combination_type="cat")
    peft.set_adapter("both")


def rewritten(peft: Any, _: Path) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    state = get_peft_model_state_dict(peft)
    set_peft_model_state_dict(peft, {k: v * 1.5 for k, v in state.items()})


def added(peft: Any, _: Path) -> None:
    torch.manual_seed(3)
    peft.add_adapter("fresh", config(target_modules=["k_proj", "gate_proj"]))
    shake(peft, 5)
    peft.base_model.set_adapter(["default", "fresh"])


def nothing(peft: Any, _: Path) -> None:
    """There is no way back."""


# Each way there, and back.
WAYS: dict[str, tuple[Switch, Switch]] = {
    "layers off": (
        lambda p, _: p.base_model.disable_adapter_layers(),
        lambda p, _: p.base_model.enable_adapter_layers(),
    ),
    "another": (lambda p, _: p.set_adapter("other"), lambda p, _: p.set_adapter("default")),
    "several": (
        lambda p, _: p.base_model.set_adapter(["default", "other"]),
        lambda p, _: p.set_adapter("default"),
    ),
    "merged": (lambda p, _: p.merge_adapter(), lambda p, _: p.unmerge_adapter()),
    "merged safely": (
        lambda p, _: p.merge_adapter(safe_merge=True), lambda p, _: p.unmerge_adapter()
    ),
    "another merged": (
        lambda p, _: p.merge_adapter(["other"]), lambda p, _: p.unmerge_adapter()
    ),
    "scaled": (scaled, lambda p, _: [m.unscale_layer(0.5) for m in layers(p)] and None),
    "scale set": (set_scale, lambda p, _: [m.set_scale("default", 1) for m in layers(p)] and None),
    "loaded for other layers": (loaded, lambda p, _: p.delete_adapter("third")),
    "weighted": (weighted, lambda p, _: p.delete_adapter("both")),
    "deleted": (lambda p, _: p.delete_adapter("default"), nothing),
    "added for other layers": (added, lambda p, _: p.set_adapter("default")),
    "written anew": (rewritten, nothing),
    "frozen": (
        lambda p, _: p.requires_grad_(False),
        lambda p, _: p.set_requires_grad("default", True),
    ),
    "unloaded": (lambda p, _: p.unload() and None, nothing),
    "merged and unloaded": (lambda p, _: p.merge_and_unload() and None, nothing),
}  # fmt: skip


def by_peft(peft: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = peft(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    return logits


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_answers_follow_every_switch(tmp_path: Path, family: str, way: str) -> None:
    saved_elsewhere(tmp_path, family)
    mine, theirs = two_adapters(family), two_adapters(family)
    engine = open_engine(mine, 64)
    before = engine.prefill(PROMPT)
    assert near(before, by_peft(theirs, PROMPT))
    for switch in WAYS[way]:
        switch(mine, tmp_path)
        switch(theirs, tmp_path)
        wanted = by_peft(theirs, PROMPT)
        assert near(engine.prefill(PROMPT), wanted)
        # Going on with what was computed: after the switch, and from a prefix.
        assert near(engine.step([9], [0]), by_peft(theirs, [*PROMPT, 9]))
        assert near(engine.prefill([*PROMPT[:10], 8]), by_peft(theirs, [*PROMPT[:10], 8]))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_what_was_computed_before_a_switch_is_not_used_for_the_next_answer(family: str) -> None:
    mine, theirs = two_adapters(family), two_adapters(family)
    engine = open_engine(mine, 64)
    engine.prefill(PROMPT)
    with mine.disable_adapter():
        engine.step([5], [0])
    assert near(engine.prefill([*PROMPT, 5]), by_peft(theirs, [*PROMPT, 5]))
    with mine.disable_adapter(), theirs.disable_adapter():
        assert near(engine.prefill(PROMPT), by_peft(theirs, PROMPT))
    assert near(engine.prefill(PROMPT), by_peft(theirs, PROMPT))


def one_example() -> Any:
    ids = np.array(PROMPT + [7, 8, 9], np.int32)
    labels = np.ones(len(ids), np.uint8)
    labels[0] = 0
    return build_packs([Example(ids, labels)], END, 512)


def loss_by_peft(peft: Any, packs: Any) -> torch.Tensor:
    ids = torch.from_numpy(packs[0].ids.astype(np.int64))[None]
    logits = peft(input_ids=ids, use_cache=False).logits[0]
    rows = torch.from_numpy(packs[0].target_rows)
    targets = torch.from_numpy(packs[0].target_ids)
    return torch.nn.functional.cross_entropy(logits[rows], targets, reduction="sum")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_loss_and_its_gradients_follow(tmp_path: Path, family: str, way: str) -> None:
    saved_elsewhere(tmp_path, family)
    mine, theirs = two_adapters(family), two_adapters(family)
    trainable, packs = TrainableModel(mine, CPU), one_example()
    trainable.packed_attention()
    for switch in (lambda *_: None, *WAYS[way]):
        switch(mine, tmp_path)
        switch(theirs, tmp_path)
        found, wanted = trainable.loss_sum(packs[0]), loss_by_peft(theirs, packs)
        assert float(found) == pytest.approx(float(wanted), rel=1e-5)
        if not wanted.requires_grad:
            continue
        found.backward()
        wanted.backward()
        for (name, p), (_, q) in zip(mine.named_parameters(), theirs.named_parameters()):
            if q.requires_grad and q.grad is not None:
                assert p.grad is not None, name
                assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-5), name
        mine.zero_grad()
        theirs.zero_grad()


def test_a_base_that_is_to_be_trained_is_refused() -> None:
    trainable, packs = TrainableModel(two_adapters("llama"), CPU), one_example()
    trainable.model.requires_grad_(True)
    with pytest.raises(UserError, match="is to be trained"):
        trainable.loss_sum(packs[0])
    with torch.no_grad():
        trainable.loss_sum(packs[0])


VARIANTS = {"dora": {"use_dora": True}, "biases": {"lora_bias": True}}


@pytest.mark.parametrize("kind", VARIANTS)
def test_what_is_more_than_a_lora_is_refused_or_computed_by_peft(kind: str) -> None:
    mine, theirs = two_adapters("llama"), two_adapters("llama")
    engine, trainable, packs = open_engine(mine, 64), TrainableModel(mine, CPU), one_example()
    for peft in (mine, theirs):
        torch.manual_seed(3)
        peft.add_adapter("more", config(**VARIANTS[kind]))
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if "lora_B.more" in name:
                    parameter.add_(torch.randn(parameter.shape))
    assert near(engine.prefill(PROMPT), by_peft(theirs, PROMPT))  # it is not active yet
    mine.set_adapter("more")
    with pytest.raises(UserError, match=r"more .*not supported"):
        engine.prefill(PROMPT)
    with pytest.raises(UserError, match=r"more .*not supported"):
        trainable.loss_sum(packs[0])
    theirs.set_adapter("more")
    # An engine that is opened over it leaves the computing to PEFT.
    assert near(open_engine(mine, 64).prefill(PROMPT), by_peft(theirs, PROMPT))
    mine.set_adapter("default")
    theirs.set_adapter("default")
    assert near(engine.prefill(PROMPT), by_peft(theirs, PROMPT))


@contextmanager
def laid_out(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine where weights are laid out for answering."""
    from vicuna.model import linear

    monkeypatch.setattr(linear, "pack_weight", lambda weight: weight.clone())
    monkeypatch.setattr(linear, "onednn_linear", torch.nn.functional.linear)
    yield


@pytest.mark.parametrize("tied", [False, True])
def test_weights_laid_out_for_answering(monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    family = "llama-gqa-tied" if tied else "llama"
    with laid_out(monkeypatch):
        mine, theirs = two_adapters(family), two_adapters(family)
        engine = TorchEngine(mine, 64, alone=True)
        assert near(engine.prefill(PROMPT), by_peft(theirs, PROMPT))
        with mine.disable_adapter(), theirs.disable_adapter():
            assert near(engine.prefill(PROMPT), by_peft(theirs, PROMPT))

        def merged() -> None:
            mine.merge_adapter()
            engine.prefill(PROMPT)

        with pytest.raises((UserError, RuntimeError, ValueError)):
            merged()


@pytest.mark.parametrize("family", ["llama", "llama-gqa-tied"])
def test_an_adapter_of_the_output_matrix(family: str) -> None:
    from peft import get_peft_model

    def made() -> Any:
        model = tiny_model(family)
        torch.manual_seed(1)
        peft = get_peft_model(model, config(target_modules=["q_proj", "lm_head"]))
        shake(peft)
        return peft.eval()

    mine, theirs = made(), made()
    engine = open_engine(mine, 64)
    assert near(engine.prefill(PROMPT), by_peft(theirs, PROMPT))
    with mine.disable_adapter(), theirs.disable_adapter():
        assert near(engine.prefill(PROMPT), by_peft(theirs, PROMPT))
    with pytest.raises(UserError, match="lm_head"):
        TrainableModel(mine, CPU)


def test_a_merge_in_training_is_seen_by_a_packed_evaluation() -> None:
    mine, theirs = two_adapters("llama"), two_adapters("llama")
    trainable, packs = TrainableModel(mine, CPU), one_example()
    trainable.packed_attention()
    with mine.disable_adapter(), theirs.disable_adapter():
        found, _ = trainable.mean_loss(packs)
        with torch.no_grad():
            wanted = float(loss_by_peft(theirs, packs)) / packs[0].supervised
    assert found == pytest.approx(wanted, rel=1e-5)
