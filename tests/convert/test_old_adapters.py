"""`vicuna adapter`: adapters of 2023 told for what they are, and written anew; all commands read
them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kit import tiny_model
from ship_kit import QUICK, adapter_in, base_in, content, report_of, tensors_of
from vicuna.commands.adapter import inspect, upgrade
from vicuna.commands.merge import run as merge
from vicuna.errors import EXIT_MISTAKE, SettingsError, UserError
from vicuna.model.adapter import attach_saved, plain_folder, read_adapter

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(base, adapter of alpha 8 and rank 4)."""
    folder = tmp_path_factory.mktemp("made")
    base = base_in(folder / "base")
    return base, adapter_in(folder / "today", base, alpha=8)


def of_2023(
    source: Path, folder: Path, weights: str, key: Callable[[str], str], config: Any, more: Any = ()
) -> Path:
    """The same adapter as its year wrote it, beside the optimiser's files."""
    folder.mkdir(parents=True)
    tensors = load_file(source / "adapter_model.safetensors")
    torch.save({key(k): v for k, v in tensors.items()} | dict(more), folder / weights)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": [1, 2]}, folder / name)
    (folder / "trainer_state.json").write_text("{}")
    if config is not None:
        old = json.loads((source / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**old, **config}))
    return folder


def plain(key: str) -> str:
    return key


def default(key: str) -> str:
    return key.replace(".weight", ".default.weight")


def wrapped(key: str) -> str:
    return "module." + default(key)


OLD: dict[str, tuple[str, Callable[[str], str], Any]] = {
    "bin": ("adapter_model.bin", plain, {}),
    "keys with default": ("adapter_model.bin", default, {}),
    "a checkpoint without a config": ("pytorch_model.bin", default, None),
    "wrapped": ("pytorch_model.bin", wrapped, None),
    "a config that forgets modules": (
        "adapter_model.bin", plain, {"target_modules": ["q_proj", "v_proj"]},
    ),
}  # fmt: skip


@pytest.fixture(params=OLD)
def old(request: pytest.FixtureRequest, made: tuple[Path, Path], tmp_path: Path) -> Path:
    weights, key, config = OLD[request.param]
    return of_2023(made[1], tmp_path / "old", weights, key, config)


def logits(adapter: Path) -> torch.Tensor:
    model = attach_saved(tiny_model("llama", vocab_size=352), read_adapter(str(adapter)))
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.arange(3, 30)[None]).logits
    return found


def inspected(adapter: Path, capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, Any]:
    assert inspect([str(adapter), "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


# -- inspect ----


def test_an_adapter_of_ours_is_told(
    made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    found = inspected(made[1], capsys)
    assert (found["rank"], found["alpha"], found["scale"]) == (4, 8, 2)
    assert found["alpha_assumed"] is False
    assert found["matrices"] == 14
    assert found["template"] == "alpaca"
    assert found["base"] == str(made[0])
    assert found["plain_peft"] is True
    assert found["silent"] == found["not_finite"] == []
    assert found["bytes"] == (made[1] / "adapter_model.safetensors").stat().st_size
    assert inspect([str(made[1])]) == 0
    assert "14 matrices" in " ".join(capsys.readouterr().out.split())


def test_alpha_that_is_written_nowhere_is_called_assumed(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = of_2023(made[1], tmp_path / "old", "pytorch_model.bin", default, None)
    found = inspected(old, capsys)
    assert (found["alpha"], found["alpha_assumed"]) == (8, True)
    assert found["base"] is None
    assert inspect([str(old)]) == 0
    assert "assumed" in capsys.readouterr().out


def test_a_checkpoint_takes_its_runs_config(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = of_2023(made[1], tmp_path / "lora-Vicuna", "adapter_model.bin", plain, {"lora_alpha": 12})
    old = of_2023(made[1], run / "checkpoint-5800", "pytorch_model.bin", default, None)
    found = inspected(old, capsys)
    assert (found["alpha"], found["alpha_assumed"]) == (12, False)
    assert any("one folder up" in note for note in found["notes"])
    (run / "adapter_model.bin").unlink()
    with pytest.raises(UserError, match="checkpoint-5800"):
        read_adapter(str(run))


@pytest.mark.parametrize(
    ("value", "code", "field"), [(0.0, 0, "silent"), (float("nan"), EXIT_MISTAKE, "not_finite")]
)
def test_zeros_and_no_numbers_are_found(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    value: float, code: int, field: str,
) -> None:  # fmt: skip
    old = of_2023(made[1], tmp_path / "old", "adapter_model.bin", plain, {})
    tensors = torch.load(old / "adapter_model.bin", weights_only=True)
    key = next(k for k in tensors if "lora_B" in k)
    torch.save({**tensors, key: tensors[key] * value}, old / "adapter_model.bin")
    found = inspected(old, capsys, code)
    assert len(found[field]) == 1
    assert found["adds_nothing"] is False
    if value:
        with pytest.raises(UserError, match="no numbers"):
            read_adapter(str(old))
    inspect([str(old)])
    assert "adds nothing to 1" in (out := capsys.readouterr().out) or "contain NaN" in out


# -- upgrade ----


def test_what_is_upgraded_is_the_same_adapter_in_plain_peft(
    old: Path, made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel

    before = content(old)
    assert upgrade([str(old), "--output_dir", str(tmp_path / "new")]) == 0
    capsys.readouterr()
    assert content(old) == before
    found = inspected(tmp_path / "new", capsys)
    assert found["plain_peft"] is True
    assert (found["rank"], found["alpha"]) == (4, 8)
    theirs = PeftModel.from_pretrained(tiny_model("llama", vocab_size=352), str(tmp_path / "new"))
    with torch.no_grad():
        scores = theirs.eval()(torch.arange(3, 30)[None]).logits
    assert torch.equal(scores, logits(made[1]))
    report = report_of(tmp_path / "new")
    assert report["identical"] is True
    assert report["tensors_compared"] == 28


def test_an_alpha_may_be_given_only_where_none_is_written(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = of_2023(made[1], tmp_path / "old", "pytorch_model.bin", default, None)
    upgrade([str(old), "--alpha", "32", "--output_dir", str(tmp_path / "new")])
    capsys.readouterr()
    assert inspected(tmp_path / "new", capsys)["scale"] == 8
    with pytest.raises(UserError, match="own alpha is 8"):
        upgrade([str(made[1]), "--alpha", "32", "--output_dir", str(tmp_path / "x")])


def test_ours_keeps_template_and_base(made: tuple[Path, Path], tmp_path: Path) -> None:
    upgrade([str(made[1]), "--output_dir", str(tmp_path / "new")])
    assert read_adapter(str(tmp_path / "new")).meta == read_adapter(str(made[1])).meta


def test_nothing_is_overwritten_and_one_adapter_is_named(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "x").touch()
    with pytest.raises(UserError, match="--force"):
        upgrade([str(made[1]), "--output_dir", str(tmp_path / "new")])
    with pytest.raises(UserError, match="holds the source of the result"):
        upgrade([str(made[1]), "--output_dir", str(made[1]), "--force"])
    for argv in ([], ["a", "b"]):
        with pytest.raises(SettingsError, match="give a folder"):
            inspect(argv)


# -- more than a LoRA ----


@pytest.mark.parametrize(
    ("file", "more"),
    [
        ("adapter_model.bin", "base_model.model.lm_head.modules_to_save.weight"),
        (
            "adapter_model.bin",
            "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        ),
        ("pytorch_model.bin", "base_model.model.model.embed_tokens.lora_embedding_A"),
        ("pytorch_model.bin", "base_model.model.lm_head.modules_to_save.default.weight"),
    ],
)
def test_what_a_lora_cannot_hold_is_refused_not_dropped(
    made: tuple[Path, Path], tmp_path: Path, file: str, more: str
) -> None:
    old = of_2023(made[1], tmp_path / "old", file, plain, {}, {more: torch.ones(3, 4)})
    with pytest.raises(UserError, match="more than a LoRA"):
        read_adapter(str(old))


def test_a_trained_embedding_is_refused_on_its_base(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    from vicuna.model.adapter_fit import notes_on

    name = "base_model.model.model.embed_tokens.weight"
    embedding = tiny_model("llama").get_input_embeddings().weight
    tiny_model("llama").save_pretrained(str(tmp_path / "base"))
    same = of_2023(made[1], tmp_path / "same", "adapter_model.bin", plain, {}, {name: embedding})
    assert notes_on(read_adapter(str(same)), tmp_path / "base") == []
    more = {name: embedding + 1}
    other = of_2023(made[1], tmp_path / "other", "adapter_model.bin", plain, {}, more)
    with pytest.raises(UserError, match=r"more than a LoRA.*embed_tokens"):
        notes_on(read_adapter(str(other)), tmp_path / "base")


def test_a_checkpoints_copy_of_the_base_is_left_alone(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    more = {"base_model.model.model.norm.weight": torch.ones(32)}
    old = of_2023(made[1], tmp_path / "old", "pytorch_model.bin", default, None, more)
    assert torch.equal(logits(old), logits(made[1]))
    assert any("1 tensors of the base" in n for n in read_adapter(str(old)).notes)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_dora": True}, "DoRA"), ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern is 0"),
        ({"lora_alpha": "much"}, "lora_alpha is 'much'"), ({"lora_alpha": -1}, "above 0"),
    ],
)  # fmt: skip
def test_configs_that_cannot_be_followed_are_refused(
    made: tuple[Path, Path], tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    old = of_2023(made[1], tmp_path / "old", "adapter_model.bin", plain, config)
    with pytest.raises(UserError, match=said):
        read_adapter(str(old))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(next(k for k in t if "lora_A" in k)), "alone, its other half"),
        (lambda t: t.update({k: v[0] for k, v in list(t.items())[:1]}), "no matrix of numbers"),
        (lambda t: t.clear() or t.update(x=torch.ones(1)), "no LoRA weights"),
    ],
)
def test_damaged_adapters_are_told(
    made: tuple[Path, Path], tmp_path: Path, change: Any, said: str
) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    tensors = load_file(made[1] / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=said):
        read_adapter(str(folder))


# -- everywhere ----


def test_every_command_takes_them(
    old: Path, made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Answering with both engines, merging, and where a training begins."""
    import vicuna
    from vicuna.config import TrainSettings, parse
    from vicuna.train.progress import RunConsole
    from vicuna.train.resume import find_start

    base, today = made
    how = {"precision": "fp32", "template": "alpaca"}
    for engine in ("torch", "llama.cpp"):
        answers = []
        for adapter in (today, old):
            with vicuna.load(str(base), adapter=str(adapter), engine=engine, **how) as model:
                answers.append(model.generate("你好", max_new_tokens=8).answers[0].token_ids)
        assert answers[0] == answers[1]
    folders = []
    for i, adapter in enumerate((today, old)):
        words = ["--model", str(base), "--adapter", str(adapter), "--output_dir"]
        assert merge([*words, str(tmp_path / f"m{i}"), *QUICK]) == 0
        folders.append(tensors_of(tmp_path / f"m{i}"))
    assert all(torch.equal(folders[0][k], folders[1][k]) for k in folders[0])
    words = ["--model", str(base), "--init_adapter", str(old), "--output_dir", str(tmp_path / "r")]
    settings, given = parse(TrainSettings, [*words, "--dataset", "x.jsonl"])
    settings, start = find_start(settings, given, RunConsole())
    assert (settings.lora_rank, settings.lora_alpha) == (4, 8)
    assert start.adapter is not None
    assert len(start.adapter.pairs()) == 14


def test_engines_that_read_adapters_by_themselves_get_plain_ones(
    old: Path, made: tuple[Path, Path]
) -> None:
    assert plain_folder(read_adapter(str(made[1]))) == made[1]
    found = read_adapter(str(old))
    folder = plain_folder(found)
    assert folder != old
    again = read_adapter(str(folder))
    assert again.notes == []
    assert again.tensors.keys() == found.tensors.keys()
    assert plain_folder(found) == folder
