"""Merging: the sum itself, what is refused, and that nothing half-written stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ship_kit import QUICK, adapter_in, base_in, content, report_of, same_bytes, tensors_of
from vicuna.commands.merge import run
from vicuna.convert.combine import Method, combine
from vicuna.errors import SettingsError, UserError
from vicuna.model.adapter import read_adapter
from vicuna.model.load import Chosen, load_base


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(base, adapter, another adapter of it)."""
    folder = tmp_path_factory.mktemp("made")
    base = base_in(folder / "base")
    one = adapter_in(folder / "one", base)
    two = adapter_in(folder / "two", base, seed=2, target=("q_proj", "v_proj"))
    return base, one, two


def merged(target: Path, *words: Any) -> Path:
    assert run([*map(str, words), "--output_dir", str(target), *QUICK]) == 0
    return target


def delta(adapter: Path, module: str) -> torch.Tensor:
    files = read_adapter(str(adapter))
    a, b = files.pairs()[module]
    return files.scale * (b @ a)


# -- the sum ----


def test_each_matrix_is_the_base_plus_its_delta_rounded_once(
    made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, one, _ = made
    before, after = tensors_of(base), tensors_of(merged(tmp_path / "m", "--adapter", one))
    touched = {f"{module}.weight" for module in read_adapter(str(one)).pairs()}
    assert len(touched) == 14
    for name, weight in before.items():
        if name in touched:
            wanted = weight.float() + delta(one, name.removesuffix(".weight"))
            assert torch.allclose(after[name].float(), wanted.bfloat16().float(), rtol=0.01)
            assert not torch.equal(after[name], weight)
        else:
            assert torch.equal(after[name], weight)
        assert after[name].dtype == torch.bfloat16


def test_in_fp32_it_is_pefts_own_merge(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    from peft import PeftModel

    base, one, _ = made
    folder = merged(tmp_path / "m", "--adapter", one, "--dtype", "fp32")
    model = load_base(base, Chosen("fp32", ""), torch.device("cpu"))
    theirs = PeftModel.from_pretrained(model, str(one)).merge_and_unload().state_dict()
    for name, tensor in tensors_of(folder).items():
        assert torch.allclose(tensor, theirs[name], atol=1e-6), name
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    assert report_of(folder)["kind"] == "32bit"


def test_shards_hold_the_same_and_open_in_transformers(
    made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    _, one, _ = made
    whole = merged(tmp_path / "whole", "--adapter", one)
    cut = merged(tmp_path / "cut", "--adapter", one, "--max_shard_size", "20KB")
    assert same_bytes(tensors_of(whole), tensors_of(cut))
    files = sorted(cut.glob("model-*.safetensors"))
    assert len(files) > 3
    largest = max(t.numel() * 2 for t in tensors_of(cut).values())
    assert all(f.stat().st_size < max(20_000, largest) + 4096 for f in files)
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    for file in files:
        assert {n for n, f in index["weight_map"].items() if f == file.name} == set(load_file(file))
    ids = torch.arange(3, 20)[None]
    one_, two_ = (
        load_base(f, Chosen("bf16", ""), torch.device("cpu"))(ids).logits for f in (whole, cut)
    )
    assert torch.equal(one_, two_)


def test_several_are_summed_with_their_weights(
    made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, one, two = made
    words = ["--adapter", f"{one},{two}", "--weights", "0.7,0.3", "--dtype", "fp32"]
    after, before = tensors_of(merged(tmp_path / "m", *words)), tensors_of(base)
    for module, both in (("self_attn.q_proj", True), ("mlp.up_proj", False)):
        name = f"model.layers.1.{module}"
        wanted = before[f"{name}.weight"].float() + 0.7 * delta(one, name)
        wanted = wanted + 0.3 * delta(two, name) if both else wanted
        assert torch.allclose(after[f"{name}.weight"], wanted, atol=1e-6)
    assert [a["weight"] for a in report_of(tmp_path / "m")["adapters"]] == [0.7, 0.3]


@pytest.mark.parametrize("method", ["svd", "ties", "ties_svd", "magnitude_prune"])
def test_pefts_methods_give_what_peft_gives(
    made: tuple[Path, Path, Path], tmp_path: Path, method: str
) -> None:
    from peft import PeftModel

    base, one, two = made
    words = ["--method", method, "--density", "0.6"]
    folder = merged(tmp_path / "m", "--adapter", one, two, *words, "--dtype", "fp32")
    model = load_base(base, Chosen("fp32", ""), torch.device("cpu"))
    peft: Any = PeftModel.from_pretrained(model, str(one), adapter_name="one")
    peft.load_adapter(str(two), adapter_name="two")
    more = {} if method == "svd" else {"density": 0.6}
    peft.add_weighted_adapter(["one", "two"], [1.0, 1.0], "both", combination_type=method, **more)
    peft.set_adapter("both")
    theirs, ours = peft.merge_and_unload().state_dict(), tensors_of(folder)
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], atol=1e-5), name


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_drops_values_and_makes_up_for_them(
    made: tuple[Path, Path, Path], method: str
) -> None:
    one, two = (read_adapter(str(a)) for a in made[1:])
    both = combine([(one, 1.0), (two, 1.0)], Method(method, density=0.6)).pairs()
    module = "model.layers.0.mlp.down_proj"  # the first's alone: nothing is added to it
    kept = 0
    for found, own in zip(both[module], one.pairs()[module]):
        left = found != 0
        kept += int(left.sum())
        assert torch.allclose(found[left], (own * one.scale**0.5 / 0.6)[left], atol=1e-5)
    assert 0.45 < kept / sum(t.numel() for t in both[module]) < 0.75


def test_dare_drops_by_its_seed_alone(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, one, two = made
    found = []
    for i, seed in enumerate((1, 1, 2)):
        torch.manual_seed(i)
        words = ["--method", "dare_linear", "--seed", seed, "--no-verify"]
        found.append(tensors_of(merged(tmp_path / str(i), "--adapter", one, two, *words)))
    assert same_bytes(found[0], found[1])
    assert not same_bytes(found[0], found[2])


def test_an_output_matrix_shared_with_the_embedding_gets_its_own(tmp_path: Path) -> None:
    family = "llama-gqa-tied"
    base = base_in(tmp_path / "base", family)
    adapter = adapter_in(tmp_path / "a", base, family, target=("q_proj", "lm_head"))
    folder = merged(tmp_path / "m", "--adapter", adapter)
    after = tensors_of(folder)
    assert torch.equal(
        after["model.embed_tokens.weight"], tensors_of(base)["model.embed_tokens.weight"]
    )
    assert not torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


# -- what goes along ----


def test_the_result_answers_like_base_and_adapter(
    made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    import vicuna

    base, one, _ = made
    folder = merged(tmp_path / "m", "--adapter", one, "--dtype", "fp32")
    apart = vicuna.load(str(base), adapter=str(one), precision="fp32")
    whole = vicuna.load(str(folder), precision="fp32")
    for question in ("你好", "What is it?"):
        answers = [
            m.generate(question, max_new_tokens=12).answers[0].token_ids for m in (apart, whole)
        ]
        assert answers[0] == answers[1]
    from vicuna.data.templates.registry import find_template
    from vicuna.model.vocabulary import load_vocabulary

    assert find_template("auto", load_vocabulary(folder)).name == "alpaca"
    assert "### Instruction" in (folder / "chat_template.jinja").read_text()


def test_a_run_folder_and_a_pickled_base_work(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base")
    adapter_in(tmp_path / "run" / "adapter", base)
    wanted = tensors_of(merged(tmp_path / "m", "--adapter", tmp_path / "run"))
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    words = ["--adapter", tmp_path / "run", "--model", base, "--allow_other_base", "true"]
    assert same_bytes(tensors_of(merged(tmp_path / "b", *words)), wanted)


def test_the_sources_stay_as_they_are(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, one, _ = made
    before = [content(base), content(one)]
    merged(tmp_path / "m", "--adapter", one)
    assert [content(base), content(one)] == before


# -- refused ----


def refused(target: Path, *words: Any, match: str) -> None:
    with pytest.raises(UserError, match=match):
        merged(target, *words)
    assert not target.exists()
    assert not list(target.parent.glob(".*part*"))


def test_a_quantised_base_is_refused_with_the_way_out(
    made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base = base_in(tmp_path / "base")
    path = base / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    path.write_text(json.dumps(config))
    words = ["--model", base, "--adapter", made[1]]
    refused(tmp_path / "m", *words, match=r"quantized \(gptq\)(.|\n)*then quantize the result")


def test_another_base_is_refused_and_allowed_by_name(
    made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    other = base_in(tmp_path / "other", seed=5)
    words = ["--model", other, "--adapter", made[1]]
    refused(tmp_path / "m", *words, match="trained on other weights")
    merged(tmp_path / "m", *words, "--allow_other_base")
    wide = base_in(tmp_path / "wide", hidden_size=48)
    refused(tmp_path / "n", "--model", wide, "--adapter", made[1], match="another shape")


def altered(adapter: Path, target: Path, change: Any) -> Path:
    """A copy of an adapter without its base's name, its tensors changed."""
    from safetensors.torch import save_file

    target.mkdir()
    (target / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {k: t for key, tensor in tensors.items() for k, t in [change(key, tensor)]},
        target / "adapter_model.safetensors",
    )
    return target


def zero(key: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    return key, tensor * 0 if "lora_B" in key else tensor


def tiny(key: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    return key, tensor * 1e-12 if "lora_B" in key else tensor


def renamed(key: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    return key.replace("layers.", "h."), tensor


def infinite(key: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    return key, tensor * float("inf") if "layers.1.mlp" in key else tensor


def huge(key: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    return key, tensor * 1e8 if "lora_B" in key else tensor


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (zero, "adds nothing"), (tiny, "changes nothing"), (renamed, "another architecture"),
        (infinite, "no numbers"),
    ],
)  # fmt: skip
def test_a_merge_that_means_nothing_is_an_error(
    made: tuple[Path, Path, Path], tmp_path: Path, change: Any, said: str
) -> None:
    adapter = altered(made[1], tmp_path / "a", change)
    refused(tmp_path / "m", "--model", made[0], "--adapter", adapter, match=said)


def test_what_does_not_fit_fp16_is_told(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    adapter = altered(made[1], tmp_path / "a", huge)
    words = ["--model", made[0], "--adapter", adapter, "--dtype", "fp16"]
    refused(tmp_path / "m", *words, match="float16 cannot hold")


def test_all_mistakes_come_together(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as e:
        run(["--weights", "1,x", "--method", "ties", "--output_dir", str(tmp_path / "m")])
    assert len(e.value.mistakes) == 3


def test_ranks_that_differ_are_told(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    other = adapter_in(tmp_path / "a", made[0], rank=2)
    words = ["--adapter", made[1], other, "--method", "ties"]
    refused(tmp_path / "m", *words, match="ties_svd")
    merged(tmp_path / "n", "--adapter", made[1], other, "--method", "svd", "--no-verify")


# -- the folder ----


def test_nothing_is_replaced_without_force_and_nothing_foreign_ever(
    made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, one, _ = made
    folder = merged(tmp_path / "m", "--adapter", one, "--no-verify")
    before = content(folder)
    with pytest.raises(UserError, match="--force"):
        merged(folder, "--adapter", one)
    assert content(folder) == before
    merged(folder, "--adapter", one, "--force", "--dtype", "fp32")
    assert content(folder) != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("x")
    for place, said in (
        (tmp_path / "mine", "report.json"),
        (base, "holds the source of the result"),
    ):
        with pytest.raises(UserError, match=said):
            merged(place, "--adapter", one, "--force")
    with pytest.raises(UserError, match="holds the source of the result"):
        merged(base.parent, "--adapter", one, "--force")


def test_a_result_that_misses_the_gate_is_not_there(
    made: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vicuna.model import lora_delta

    right = lora_delta.LoraDelta.apply

    def wrong(self: Any, name: str, weight: torch.Tensor) -> torch.Tensor:
        return weight + 2 * (right(self, name, weight) - weight)

    monkeypatch.setattr(lora_delta.LoraDelta, "apply", wrong)
    refused(tmp_path / "m", "--adapter", made[1], match="differs too much from its source")
    with pytest.raises(UserError, match="it was kept"):
        merged(tmp_path / "m", "--adapter", made[1], "--keep_failed")
    assert report_of(tmp_path / "m")["passed"] is False


def test_an_interruption_or_a_full_disk_leaves_nothing(
    made: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from vicuna.weights import safetensors_writer

    right, written = safetensors_writer.write_bytes, []

    def fails(f: Any, planned: Any, error: type[BaseException]) -> None:
        written.append(planned.name)
        if len(written) % 5 == 0:
            raise error(28, "No space left on device")
        right(f, planned)

    for error, shown in ((OSError, UserError), (KeyboardInterrupt, KeyboardInterrupt)):
        monkeypatch.setattr(safetensors_writer, "write_bytes", lambda f, p, e=error: fails(f, p, e))
        with pytest.raises(shown):
            merged(tmp_path / "m", "--adapter", made[1])
        assert not list(tmp_path.iterdir())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    written.clear()
    refused(tmp_path / "m", "--adapter", made[1], match="GiB free, but the result takes")
    assert not written
