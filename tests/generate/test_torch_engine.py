"""The PyTorch engines: scores are those of a plain forward over each row's whole path, however the
tree grew, and what is known is not computed again."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from generate_kit import tiny_llama
from torch import Tensor

from vicuna.errors import UserError
from vicuna.generate.engines import torch as engines
from vicuna.generate.engines import transformers as plain_engines
from vicuna.generate.engines import tree_cache
from vicuna.generate.engines.base import Cancelled, OutOfMemory
from vicuna.generate.engines.torch import TorchEngine, open_engine
from vicuna.generate.engines.transformers import PlainEngine
from vicuna.model.llama import Layer


def alone(model: Any, context: int) -> TorchEngine:
    """The engine with weights laid out for answering, over a copy: the model's own stay."""
    return TorchEngine(copy.deepcopy(model), context, alone=True)


KINDS = [TorchEngine, PlainEngine]
SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 4}),
    "llama grouped tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 12}),
    "mistral": ("MistralConfig", {"sliding_window": 6}),
}


def make(family: str) -> Any:
    import transformers

    name, changes = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**SHAPE, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # biases and norms, too
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


def fresh(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        scores: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0, -1].float()
    return scores


def near(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=2e-4, rtol=1e-4)


def wander(engine: Any, model: Any, prompt: list[int], steps: int, seed: int) -> list[list[int]]:
    """Grow a random tree and check every row of every step; the paths of the last rows."""
    rng = random.Random(seed)
    assert near(engine.prefill(prompt), fresh(model, prompt))
    paths = [list(prompt)]
    for _ in range(steps):
        parents = sorted(rng.randrange(len(paths)) for _ in range(rng.randint(1, 5)))
        rng.shuffle(parents)
        tokens = [rng.randrange(50) for _ in parents]
        scores = engine.step(tokens, parents)
        paths = [[*paths[p], t] for p, t in zip(parents, tokens)]
        assert scores.shape == (len(parents), 50)
        for row, path in zip(scores, paths):
            assert near(row, fresh(model, path))
    return paths


@pytest.mark.parametrize("kind", [*KINDS, alone])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_fork_die_and_go_on(family: str, kind: Any) -> None:
    model = make(family)
    engine = kind(model, 200)
    for seed in range(3):
        prompt = [(7 * i + seed) % 50 for i in range(9)]
        paths = wander(engine, model, prompt, 12, seed)
        # A further turn begins with one of the rows, and is a prompt again.
        wander(engine, model, [*paths[-1], 3, 4], 3, seed)


@pytest.mark.parametrize("family", ["llama grouped tied", "mistral"])
def test_dead_slots_are_given_back(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_cache, "RECLAIM", 10)
    monkeypatch.setattr(tree_cache, "GROWTH", 4)
    model = make(family)
    engine = TorchEngine(model, 200)
    wander(engine, model, [1, 2, 3], 40, 5)
    assert engine.tree.used < 80  # of some 120 appended
    assert engine.tree.capacity <= engine.tree.used + 10


@pytest.mark.parametrize("kind", KINDS)
def test_a_further_turn_computes_only_its_tokens(kind: Any) -> None:
    model = make("llama")
    engine = kind(model, 100)
    seen = []

    def turn(ids: list[int]) -> None:
        before = engine.computed
        assert near(engine.prefill(ids), fresh(model, ids))
        seen.append(engine.computed - before)

    turn([1, 2, 3, 4])
    engine.step([5], [0])
    turn([1, 2, 3, 4, 5, 6, 7])
    turn([1, 2, 9])
    turn([1, 2, 9])
    turn([8, 2, 9])
    assert seen == [4, 2, 1, 1, 3]


def test_the_answer_of_a_beam_is_known_in_the_next_turn() -> None:
    model = make("llama")
    engine = TorchEngine(model, 100)
    engine.prefill([1, 2, 3])
    engine.step([4, 5, 6], [0, 0, 0])
    engine.step([7, 8], [1, 2])
    engine.step([9, 10], [0, 0])
    before = engine.computed
    # A path that is dead already (its row was dropped) still lies in the tree.
    assert near(engine.prefill([1, 2, 3, 6, 8, 11]), fresh(model, [1, 2, 3, 6, 8, 11]))
    assert engine.computed - before == 1


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_float32_of_the_last_position(kind: Any) -> None:
    engine = kind(tiny_llama(50).bfloat16(), 64)
    scores = engine.prefill([3, 4])
    assert (scores.dtype, scores.shape) == (torch.float32, (50,))
    scores = engine.step([5, 6], [0, 0])
    assert (scores.dtype, scores.shape) == (torch.float32, (2, 50))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_long_prompts_come_in_pieces_and_a_cancel_between_them_keeps_what_was_read(
    kind: Any, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "CHUNK", 8)
    monkeypatch.setattr(plain_engines, "CHUNK", 8)
    model = make(family)
    engine = kind(model, 100)
    prompt = [i % 50 for i in range(21)]
    answers = iter([False, False, True])
    with pytest.raises(Cancelled):
        engine.prefill(prompt, lambda: next(answers))
    assert engine.computed == 16
    assert near(engine.prefill(prompt), fresh(model, prompt))
    assert engine.computed == 21
    # Behind the window nothing may come back into visible.
    assert near(engine.prefill([*prompt[:15], 31]), fresh(model, [*prompt[:15], 31]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        KeyboardInterrupt(),
    ],
    ids=str,
)
def test_what_stops_between_two_layers_leaves_nothing_wrong(
    kind: Any, error: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("llama")
    engine = kind(model, 64)
    engine.prefill([1, 2, 3])
    fails = True

    def fail(*_: Any) -> None:
        if fails:
            raise error

    if kind is PlainEngine:
        model.model.layers[1].register_forward_pre_hook(fail)
    else:
        whole = Layer.infer_qkv
        second = engine._layers[1]

        def failing(layer: Any, *rest: Any) -> Tensor:
            if layer is second:
                fail()
            return whole(layer, *rest)

        monkeypatch.setattr(Layer, "infer_qkv", failing)
    # The first layer has the new token already, the second not.
    with pytest.raises((OutOfMemory, KeyboardInterrupt)):
        engine.step([4], [0])
    fails = False
    assert near(engine.prefill([1, 2, 3, 5]), fresh(model, [1, 2, 3, 5]))


@pytest.mark.parametrize("kind", KINDS)
def test_other_errors_are_not_called_memory(kind: Any) -> None:
    with pytest.raises(IndexError):
        kind(tiny_llama(50), 64).prefill([99])


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_training_goes_on_training(kind: Any) -> None:
    model = tiny_llama(50, attention_dropout=0.5)
    model.train()
    model.model.layers[1].eval()
    before = {n: m.training for n, m in model.named_modules()}
    scores = kind(model, 64).prefill([1, 2, 3])
    assert {n: m.training for n, m in model.named_modules()} == before
    model.eval()
    assert near(scores, fresh(model, [1, 2, 3]))
    model.train()
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()


def adapted(model: Any, *names: str) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    peft = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        peft.add_adapter(name, config)
    return peft.eval()


@pytest.mark.parametrize("kind", [*KINDS, alone])
def test_an_adapter_applies_unmerged(kind: Any) -> None:
    base = make("qwen2")
    plain = fresh(base, [1, 2, 3])
    peft = adapted(base, "default")
    scores = kind(peft, 64).prefill([1, 2, 3])
    assert near(scores, fresh(peft, [1, 2, 3]))
    assert not near(scores, plain)


@pytest.mark.parametrize("kind", [*KINDS, alone])
def test_adapters_are_switched_between_requests(kind: Any) -> None:
    base = make("llama")
    plain = fresh(base, [1, 2, 3])
    peft = adapted(base, "one", "two")
    engine = kind(peft, 64)
    wanted = {}
    for name in ("one", "two"):
        peft.set_adapter(name)
        wanted[name] = fresh(peft, [1, 2, 3])
    assert not near(wanted["one"], wanted["two"])
    for name in ("two", "one", "two"):
        engine.use_adapters({name: 1.0})
        assert near(engine.prefill([1, 2, 3]), wanted[name])
        engine.use_adapters({})
        assert near(engine.prefill([1, 2, 3]), plain)
    engine.use_adapters({"one": 0.0})
    assert near(engine.prefill([1, 2, 3]), plain)
    engine.use_adapters({"one": 1.0})
    assert near(engine.prefill([1, 2, 3]), wanted["one"])


def test_models_of_other_families_take_the_plain_engine() -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.Gemma2Config(**{**SHAPE, "head_dim": 8, "sliding_window": 16})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    engine = open_engine(model, 100)
    assert isinstance(engine, PlainEngine)
    wander(engine, model, [1, 2, 3], 4, 0)
    assert isinstance(open_engine(make("qwen3"), 100), TorchEngine)


def test_who_computes_with_weights_that_were_given_up_sees_it() -> None:
    model = make("llama")
    engine = TorchEngine(model, 64, alone=True)
    if engine._layers[0].inputs.group.packed is None:
        pytest.skip("nothing is laid out anew on this machine")
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert weight.shape == (32, 32)
    assert weight.untyped_storage().nbytes() == 4
    assert bool(fresh(model, [1, 2]).isnan().all())


def test_an_engine_may_be_made_again_with_an_adapter() -> None:
    base = make("qwen2")
    peft = adapted(copy.deepcopy(base), "default")
    wanted = fresh(peft, [1, 2, 3])
    state = {k: v for k, v in peft.state_dict().items() if "lora_" in k}
    assert near(
        TorchEngine(base, 64, alone=True).prefill([1, 2, 3]), fresh(make("qwen2"), [1, 2, 3])
    )
    again = adapted(base, "default")
    again.load_state_dict(state, strict=False)
    assert near(TorchEngine(again, 64, alone=True).prefill([1, 2, 3]), wanted)


# -- the type of keys and values ----


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
def test_a_smaller_cache_is_close(family: str, cache_type: Any) -> None:
    model = make(family)
    whole, small = TorchEngine(model, 100), TorchEngine(model, 100, cache_type)
    prompt = [(7 * i) % 50 for i in range(20)]
    steps = [([3, 9, 3], [0, 0, 0]), ([1, 2, 3, 4], [0, 2, 2, 1]), ([8], [3])]
    pairs = [(whole.prefill(prompt), small.prefill(prompt))]
    pairs += [(whole.step(*s).clone(), small.step(*s)) for s in steps]
    for right, found in pairs:
        off = (found - right).norm() / right.norm()
        assert 0 < off < (2e-3 if cache_type == "f16" else 4e-2)
    size = model.config.head_dim or 8
    share = 0.5 if cache_type == "f16" else (size + 4) / (4 * size)
    assert small.tree.memory == share * whole.tree.memory


def test_a_cache_of_8_bits_forks_and_gives_dead_slots_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is moved are codes and scales together: the same tree without moving says the same."""
    model = make("llama")
    found = []
    for reclaim in (10, 1000):
        monkeypatch.setattr(tree_cache, "RECLAIM", reclaim)
        engine, rng = TorchEngine(model, 200, "q8_0"), random.Random(1)
        engine.prefill([1, 2, 3])
        rows = 1
        for _ in range(30):
            parents = [rng.randrange(rows) for _ in range(rng.randint(1, 4))]
            scores = engine.step([rng.randrange(50) for _ in parents], parents)
            rows = len(parents)
        found.append((engine.tree.used, scores))
    assert found[0][0] < found[1][0]
    assert near(found[0][1], found[1][1])


def test_a_head_of_zeros_is_kept() -> None:
    layer = tree_cache.make_cache("q8_0", 1, 4, torch.float32, torch.device("cpu"))
    layer.resize(2, 0)
    layer.write(0, torch.zeros(2, 2, 4))
    assert not any(t.any() for t in layer.keys_values(0, 2))


def test_a_model_of_another_family_has_no_other_cache() -> None:
    import transformers

    config = transformers.Gemma2Config(**{**SHAPE, "head_dim": 8, "sliding_window": 16})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="gemma2"):
        open_engine(model, 100, "q8_0")


def test_a_model_that_is_not_all_in_memory_is_refused() -> None:
    model = make("llama")
    model.model.layers[1].to("meta")
    with pytest.raises(UserError, match=r"model\.layers\.1.* not in memory"):
        open_engine(model, 100)
