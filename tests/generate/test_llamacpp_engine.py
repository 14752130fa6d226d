"""The llama.cpp engine: its tree against plain recomputation, what it keeps, and how it ends."""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gguf_kit import scores_after, tiny_base, tiny_gguf
from kit import with_adapter
from vicuna.errors import UserError
from vicuna.generate.engines import llamacpp
from vicuna.generate.engines.base import Cancelled, OutOfMemory
from vicuna.generate.engines.llamacpp import LlamaCppEngine
from vicuna.llamacpp import library
from vicuna.llamacpp.cores import physical_cores

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="needs the extra cpp (xllamacpp)"
)
CONTEXT = 256


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return tiny_gguf(tmp_path_factory.mktemp("tiny"), "llama-gqa-tied")


@pytest.fixture
def engine(tiny: tuple[Any, Path]) -> Iterator[LlamaCppEngine]:
    with LlamaCppEngine(tiny[1], CONTEXT, spare=lambda _: 512, threads=1, cache_type="f32") as made:
        yield made


def close_to(a: torch.Tensor, b: torch.Tensor, within: float = 1e-3) -> bool:
    return float((a - b).abs().max()) < within


# -- the tree ----


@pytest.mark.parametrize("seed", range(6))
def test_a_random_tree_is_computed_as_if_each_row_stood_alone(
    tiny: tuple[Any, Path], engine: LlamaCppEngine, seed: int
) -> None:
    chance = random.Random(seed)
    token = lambda: chance.randrange(5, 340)  # noqa: E731
    paths: list[list[int]] = [[token()]]
    for _ in range(3):
        # A prompt that goes on from a row, from the middle of one, or anew.
        old = chance.choice(paths)
        prompt = old[: chance.randrange(len(old) + 1)] + [token() for _ in range(8)]
        assert close_to(engine.prefill(prompt), scores_after(tiny[0], prompt))
        paths = [prompt]
        for _ in range(6):
            n = chance.randrange(1, engine.max_rows + 1)
            parents = [chance.randrange(len(paths)) for _ in range(n)]
            tokens = [token() for _ in range(n)]
            logits = engine.step(tokens, parents)
            paths = [[*paths[p], t] for p, t in zip(parents, tokens)]
            assert logits.shape == (n, 352)
            assert logits.dtype == torch.float32
            for row, path in zip(logits, paths):
                assert close_to(row, scores_after(tiny[0], path))


def test_rows_may_swap_places(tiny: tuple[Any, Path], engine: LlamaCppEngine) -> None:
    engine.prefill([5, 6, 7])
    engine.step([10, 11, 12], [0, 0, 0])
    logits = engine.step([20, 21, 22, 23], [2, 0, 2, 0])
    for row, path in zip(logits, ([12, 20], [10, 21], [12, 22], [10, 23])):
        assert close_to(row, scores_after(tiny[0], [5, 6, 7, *path]))


def test_sixteen_beams_for_many_steps_never_run_out_of_sequences(
    tiny: tuple[Any, Path], engine: LlamaCppEngine
) -> None:
    engine.prefill([5, 6, 7])
    engine.step([9] * 16, [0] * 16)
    path = [5, 6, 7, 9]
    for i in range(20):  # all from one row, as where one beam wins
        logits = engine.step([30 + j for j in range(16)], [i % 16] * 16)
        path.append(30 + (i + 1) % 16)  # the row that the next ones grow from
    assert close_to(logits[20 % 16], scores_after(tiny[0], path))


def test_a_dropped_row_gives_its_cells_back(tiny: tuple[Any, Path]) -> None:
    with LlamaCppEngine(tiny[1], 256, threads=1, cache_type="f32") as engine:
        engine.prefill([5, 6])
        engine.step([7] * 4, [0] * 4)
        for _ in range(200):  # 4 new cells a step: 800 in all, of which at most 212 live
            engine.step([8, 9, 10, 11], [0, 0, 0, 0])


@pytest.mark.parametrize(
    ("tokens", "parents"), [([], []), ([1], [0, 0]), ([1] * 17, [0] * 17), ([1], [1]), ([1], [-1])]
)
def test_impossible_rows_are_refused(
    engine: LlamaCppEngine, tokens: list[int], parents: list[int]
) -> None:
    engine.prefill([5, 6, 7])
    with pytest.raises(ValueError, match="rows"):
        engine.step(tokens, parents)


def test_the_beams_of_the_strategies_are_transformers_own(
    tiny: tuple[Any, Path], engine: LlamaCppEngine
) -> None:
    from generate_kit import byte_level, make_renderer

    from vicuna.generate.decode import complete
    from vicuna.generate.settings import Settings

    renderer = make_renderer(byte_level(), "chatml")
    for prompt in ([5, 6, 7], [40, 41, 42, 43, 99, 100]):
        wanted = tiny[0].generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            num_beams=4, do_sample=False, max_new_tokens=12,
            eos_token_id=renderer.end_id, pad_token_id=renderer.end_id,
        )[0, len(prompt) :].tolist()  # fmt: skip
        choice = Settings(num_beams=4, max_new_tokens=12)
        found = complete(engine, prompt, choice, renderer)
        assert list(found.answers[0].token_ids) == wanted[: len(found.answers[0].token_ids)]


# -- what it keeps ----


def test_a_further_turn_computes_only_its_tokens(
    tiny: tuple[Any, Path], engine: LlamaCppEngine
) -> None:
    first = list(range(5, 65))
    engine.prefill(first)
    for token in (70, 71, 72):
        engine.step([token], [0])
    before = engine.computed
    second = [*first, 70, 71, 72, *range(80, 90)]
    assert close_to(engine.prefill(second), scores_after(tiny[0], second))
    assert engine.computed - before == 10


def test_after_undo_the_earlier_turn_is_still_there(
    tiny: tuple[Any, Path], engine: LlamaCppEngine
) -> None:
    engine.prefill([*range(5, 65), *range(100, 120)])
    before = engine.computed
    again = [*range(5, 65), 200, 201]
    assert close_to(engine.prefill(again), scores_after(tiny[0], again))
    assert engine.computed - before == 2


def test_the_beam_that_won_is_known_when_the_chat_goes_on(engine: LlamaCppEngine) -> None:
    engine.prefill(list(range(5, 25)))
    engine.step([30, 31], [0, 0])
    engine.step([40, 41], [0, 1])
    before = engine.computed
    engine.prefill([*range(5, 25), 31, 41, 50])
    assert engine.computed - before == 1


def test_the_same_prompt_again_computes_one_token(
    tiny: tuple[Any, Path], engine: LlamaCppEngine
) -> None:
    prompt = list(range(5, 45))
    engine.prefill(prompt)
    before = engine.computed
    assert close_to(engine.prefill(prompt), scores_after(tiny[0], prompt))
    assert engine.computed - before == 1


# -- how it ends ----


def test_cancel_between_pieces_keeps_what_was_read(
    tiny: tuple[Any, Path], engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llamacpp, "CHUNK", 16)
    prompt = list(range(5, 105))
    with pytest.raises(Cancelled):
        engine.prefill(prompt, lambda: engine.computed >= 32)
    assert engine.computed == 32
    assert close_to(engine.prefill(prompt), scores_after(tiny[0], prompt))
    assert engine.computed == 100


def test_cancel_within_a_piece_ends_it_early(
    tiny: tuple[Any, Path], engine: LlamaCppEngine
) -> None:
    asked = 0

    def cancel() -> bool:
        nonlocal asked
        asked += 1
        return asked > 5

    engine.prefill([5, 6, 7])
    prompt = [5, 6, 7, *range(10, 110)]
    with pytest.raises(Cancelled):
        engine.prefill(prompt, cancel)
    assert engine.computed == 3
    assert close_to(engine.prefill(prompt), scores_after(tiny[0], prompt))
    assert engine.computed == 103


def test_ctrl_c_within_a_piece_is_raised_and_leaves_no_half_tree(
    tiny: tuple[Any, Path], engine: LlamaCppEngine
) -> None:
    asked = 0

    def interrupted() -> bool:
        nonlocal asked
        asked += 1
        if asked > 5:
            raise KeyboardInterrupt
        return False

    prompt = list(range(10, 110))
    with pytest.raises(KeyboardInterrupt):
        engine.prefill(prompt, interrupted)
    assert close_to(engine.prefill(prompt), scores_after(tiny[0], prompt))


def test_a_full_cache_is_told_and_the_engine_can_be_used_again(tiny: tuple[Any, Path]) -> None:
    with LlamaCppEngine(tiny[1], CONTEXT, threads=1, cache_type="f32") as engine:
        engine.prefill([5] * 250)
        engine.step([6], [0])
        engine.step([7, 8], [0, 0])
        engine.step([7, 8], [0, 1])  # 255 of the cache's 256 cells
        with pytest.raises(OutOfMemory, match="full"):
            engine.step([7, 8], [0, 1])
        assert close_to(engine.prefill([5, 6, 7]), scores_after(tiny[0], [5, 6, 7]))


def test_forget_drops_everything(engine: LlamaCppEngine) -> None:
    engine.prefill(list(range(5, 45)))
    engine.reset()
    before = engine.computed
    engine.prefill(list(range(5, 45)))
    assert engine.computed - before == 40


def test_close_gives_the_file_and_the_memory_back(tiny: tuple[Any, Path]) -> None:
    engine = LlamaCppEngine(tiny[1], CONTEXT, threads=1)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs Linux's /proc")
    mapped = str(tiny[1]) in maps.read_text()
    engine.close()
    engine.close()
    assert mapped
    assert str(tiny[1]) not in maps.read_text()


# -- opening ----


def test_the_context_is_the_models_own_up_to_a_limit(
    tiny: tuple[Any, Path], tmp_path: Path
) -> None:
    with LlamaCppEngine(tiny[1], threads=1) as engine:
        assert engine.context_length == 512
    _, long = tiny_gguf(tmp_path, "llama", max_position_embeddings=131072)
    with LlamaCppEngine(long, threads=1) as engine:
        assert engine.context_length == llamacpp.LONGEST


def test_llamacpp_keeps_the_terminal_quiet(
    tiny: tuple[Any, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    with LlamaCppEngine(
        tiny[1], 1024, threads=1
    ) as engine:  # it warns of more than it was made for
        engine.prefill([5, 6])
    said = capfd.readouterr()
    assert said.out + said.err == ""


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00 and nothing more")
    with pytest.raises(UserError, match=r"broken\.gguf: the metadata is damaged"):
        LlamaCppEngine(path)


def test_a_missing_wheel_is_told_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    library.library.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[cpp\]'"):
        library.library()


def test_a_build_of_ones_own_is_taken_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "libllama.so"
    monkeypatch.setenv(library.OWN_BUILD, str(own))
    library.library.cache_clear()
    with pytest.raises(UserError, match=r"libllama\.so: llama\.cpp cannot be loaded"):
        library.library()
    own.symlink_to(next(Path(find_wheel()).glob("xllamacpp.*so")))
    assert library.library()
    library.library.cache_clear()


def find_wheel() -> str:
    spec = importlib.util.find_spec("xllamacpp")
    assert spec
    assert spec.submodule_search_locations
    return spec.submodule_search_locations[0]


def test_another_layout_of_the_structures_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = library.ContextParams._fields_
    shifted = type(
        "Shifted", (library.c.Structure,), {"_fields_": [("new", library.c.c_int32), *fields]}
    )
    table = {**library._FUNCTIONS, "llama_context_default_params": (shifted, [])}
    monkeypatch.setattr(library, "_FUNCTIONS", table)
    library.library.cache_clear()
    with pytest.raises(UserError, match="not the one that was tested"):
        library.library()
    library.library.cache_clear()


def test_threads_respect_what_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert physical_cores() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr("vicuna.llamacpp.cores._core", lambda cpu: ("0", str(cpu // 2)))
    assert physical_cores() == 2


# -- adapters ----


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    """(PEFT model, GGUF of its base, GGUF LoRA)."""
    from vicuna.export.gguf_writer import write_adapter
    from vicuna.model.adapter import read_adapter, save

    folder = tmp_path_factory.mktemp("adapted")
    model, gguf = tiny_gguf(folder, "llama-gqa-tied")
    peft = with_adapter(model, rank=4, alpha=12)
    (folder / "adapter").mkdir()
    save(peft, folder / "adapter", {})
    config = model.config.to_dict()
    write_adapter(read_adapter(str(folder / "adapter")), config, folder / "lora.gguf")
    return peft, gguf, folder / "lora.gguf"


def test_an_adapter_is_loaded_scaled_and_switched(adapted: tuple[Any, Path, Path]) -> None:
    peft, gguf, lora = adapted
    prompt = list(range(20, 60))
    with peft.disable_adapter():
        base = scores_after(peft, prompt)
    with_it = scores_after(peft, prompt)
    assert not close_to(base, with_it, 0.1)
    with LlamaCppEngine(gguf, CONTEXT, threads=1, cache_type="f32") as engine:
        engine.load_adapter("mine", lora)
        assert close_to(engine.prefill(prompt), base)  # loaded is not chosen
        engine.use_adapters({"mine": 1.0})
        assert close_to(engine.prefill(prompt), with_it)
        engine.use_adapters({"mine": 0.0})
        assert close_to(engine.prefill(prompt), base)
        engine.use_adapters({"mine": 0.5})
        for module in peft.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("default", 0.5)
        assert close_to(engine.prefill(prompt), scores_after(peft, prompt))
        for module in peft.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("default", 1.0)
        engine.use_adapters({})
        assert close_to(engine.prefill(prompt), base)


def test_an_unknown_adapter_is_named(engine: LlamaCppEngine) -> None:
    with pytest.raises(UserError, match="no adapter 'other' is loaded"):
        engine.use_adapters({"other": 1.0})


def test_an_adapter_of_another_shape_is_refused(
    adapted: tuple[Any, Path, Path], tmp_path: Path
) -> None:
    _, other = tiny_gguf(tmp_path, "qwen2")
    with (
        LlamaCppEngine(other, CONTEXT, threads=1) as engine,
        pytest.raises(UserError, match="cannot load this adapter"),
    ):
        engine.load_adapter("mine", adapted[2])


# -- the command's way to it ----


def test_a_folder_and_an_adapter_answer_through_llamacpp(tmp_path: Path) -> None:
    from vicuna.config import GenerateSettings
    from vicuna.data.conversation import Turn
    from vicuna.generate.load import open_model
    from vicuna.model.adapter import save

    model = tiny_base(tmp_path / "base", "qwen2")
    peft = with_adapter(model)
    (tmp_path / "adapter").mkdir()
    save(peft, tmp_path / "adapter", {})
    logits = {}
    for engine in ("torch", "llama.cpp"):
        choice = GenerateSettings(
            model=str(tmp_path / "base"),
            adapter=str(tmp_path / "adapter"),
            engine=engine,  # type: ignore[arg-type]
            precision="fp32",
            template="alpaca",
            threads=1,
            num_beams=2,
        )
        loaded = open_model(choice)
        prompt = loaded.renderer.prompt([Turn("user", "你好 2026")])
        logits[engine] = loaded.engine.prefill(prompt).float().clone()
    assert close_to(logits["torch"], logits["llama.cpp"], 0.05)  # the cache is f16
    assert "llama.cpp: " in loaded.about


def test_a_gguf_file_brings_its_own_tokenizer_and_ends(tmp_path: Path) -> None:
    from vicuna.config import GenerateSettings
    from vicuna.generate.load import open_model

    _, gguf = tiny_gguf(tmp_path, "llama")
    for file in (*tmp_path.glob("*.json"), *tmp_path.glob("*.safetensors")):
        file.unlink()
    loaded = open_model(
        GenerateSettings(model=str(gguf), engine="llama.cpp", threads=1, template="alpaca")
    )
    encoder = loaded.renderer.tokenizer
    text = "床前明月光，疑是地上霜。2026 don't \n\n x"
    assert encoder.decode(encoder.text(text)) == text
    assert encoder.text(text, first=True) == loaded.engine.tokenize(text)  # type: ignore[attr-defined]
    assert encoder.data.eos_token == "</s>"


def test_a_type_that_llamacpp_does_not_have_is_refused(tmp_path: Path) -> None:
    from vicuna.config import GenerateSettings
    from vicuna.generate.load import open_model

    tiny_base(tmp_path, "llama")
    with pytest.raises(UserError, match="no nf4"):
        open_model(GenerateSettings(model=str(tmp_path), engine="llama.cpp", precision="nf4"))
