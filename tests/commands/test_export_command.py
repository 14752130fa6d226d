"""`vicuna export gguf`: bases, merged adapters, adapters alone; checked, and refused in words."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from gguf_kit import scores_after, tiny_base
from kit import with_adapter
from vicuna.commands.export import run
from vicuna.data.templates.registry import builtin_templates, template_from_dict
from vicuna.errors import SettingsError, UserError
from vicuna.gguf.read import read_fields
from vicuna.model.adapter import save

needs_llamacpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="needs the extra cpp (xllamacpp)"
)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and an adapter of it that speaks alpaca."""
    folder = tmp_path_factory.mktemp("export")
    model = tiny_base(folder / "base", "llama")
    peft = with_adapter(model, rank=4)
    (folder / "adapter").mkdir()
    save(peft, folder / "adapter", {"template": {"kind": "literal", "name": "alpaca", **_alpaca()}})
    torch.save(peft, folder / "peft.pt")
    return folder


def _alpaca() -> dict[str, str]:
    return {k: v for k, v in builtin_templates()["alpaca"].items() if k != "about"}


def words(shelf: Path, output: Path, *more: str, adapter: bool = True) -> list[str]:
    given = ["--model", str(shelf / "base"), "--output", str(output), "--verify_tokens", "64"]
    return [*given, *(["--adapter", str(shelf / "adapter")] if adapter else []), *more]


@needs_llamacpp
def test_an_adapter_is_merged_on_the_way(shelf: Path, tmp_path: Path) -> None:
    from vicuna.generate.engines.llamacpp import LlamaCppEngine

    path = tmp_path / "merged.gguf"
    assert run(words(shelf, path, "--type", "f32")) == 0
    peft = torch.load(shelf / "peft.pt", weights_only=False)
    ids = list(range(20, 60))
    with LlamaCppEngine(path, context_length=128, threads=1, cache_type="f32") as engine:
        assert (engine.prefill(ids) - scores_after(peft, ids)).abs().max() < 1e-3
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["result"] == "merged.gguf"
    assert report["passed"]
    assert report["template"] == "alpaca"


@needs_llamacpp
def test_the_adapters_template_is_the_files(shelf: Path, tmp_path: Path) -> None:
    from generate_kit import SPECIALS

    from vicuna.data.templates.chat_template import ChatTemplate
    from vicuna.export.template_text import recognised

    run(words(shelf, tmp_path / "x.gguf", "--type", "q8_0", "--modelfile", "--no-verify"))
    fields = read_fields(tmp_path / "x.gguf")
    found = recognised(ChatTemplate(fields["tokenizer.chat_template"], "<s>", "</s>", SPECIALS))
    assert found is not None
    assert (
        found.digest
        == template_from_dict({"kind": "literal", "name": "alpaca", **_alpaca()}).digest
    )
    assert "### Response" in (tmp_path / "x.gguf.Modelfile").read_text()


def test_a_base_that_has_no_template_gets_none(shelf: Path, tmp_path: Path) -> None:
    run(words(shelf, tmp_path / "x.gguf", "--no-verify", adapter=False))
    assert "tokenizer.chat_template" not in read_fields(tmp_path / "x.gguf")
    run(words(shelf, tmp_path / "y.gguf", "--template", "chatml", "--no-verify", adapter=False))
    fields = read_fields(tmp_path / "y.gguf")
    assert "<|im_start|>" in fields["tokenizer.chat_template"]
    ends = {fields[f"tokenizer.ggml.{n}_token_id"] for n in ("eos", "eot")}
    assert {fields["tokenizer.ggml.tokens"][i] for i in ends} == {"</s>", "<|im_end|>"}


@needs_llamacpp
def test_an_adapter_alone(shelf: Path, tmp_path: Path) -> None:
    assert run(words(shelf, tmp_path / "lora.gguf", "--adapter_only", "--type", "f32")) == 0
    assert read_fields(tmp_path / "lora.gguf")["general.type"] == "adapter"
    assert json.loads((tmp_path / "report.json").read_text())["passed"]
    assert run([
        "--adapter_only", str(shelf / "adapter"), "--model", str(shelf / "base"),
        "--output", str(tmp_path / "again.gguf"), "--no-verify",
    ]) == 0  # fmt: skip


@needs_llamacpp
def test_importance_of_ones_own_data(shelf: Path, tmp_path: Path) -> None:
    data = tmp_path / "mine.jsonl"
    rows = [{"instruction": f"问题{i}", "output": "你好，我是助手。"} for i in range(6)]
    data.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows))
    more = ("--type", "q4_0", "--imatrix", str(data), "--num_samples", "4", "--no-verify")
    run(words(shelf, tmp_path / "a.gguf", *more))
    kept = tmp_path / "a.imatrix.gguf"
    assert read_fields(kept)["imatrix.chunk_count"] == 4
    run(words(shelf, tmp_path / "b.gguf", "--type", "q4_0", "--imatrix", str(kept), "--no-verify"))
    run(words(shelf, tmp_path / "c.gguf", "--type", "q4_0", "--no-verify"))
    contents = [weights(tmp_path / f"{n}.gguf") for n in "abc"]
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]


def weights(path: Path) -> dict[str, bytes]:
    from gguf import GGUFReader

    return {t.name: t.data.tobytes() for t in GGUFReader(str(path)).tensors}


@needs_llamacpp
def test_what_is_too_far_off_is_removed(shelf: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    with pytest.raises(UserError, match="differs too much from its source"):
        run(words(shelf, path, "--type", "q4_0", "--max_kl", "1e-9"))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_replaced_unasked(shelf: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        run(words(shelf, path))
    assert path.read_text() == "mine"
    run(words(shelf, path, "--force", "--no-verify"))
    assert path.read_bytes()[:4] == b"GGUF"


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(SettingsError) as e:
        run(["--adapter_only", "--type", "q4_k_m", "--imatrix", "x.dat", "--seed", "3"])
    said = str(e.value)
    for part in ("output is missing", "needs the adapter", "not q4_k_m", "imatrix has no effect"):
        assert part in said
    with pytest.raises(SettingsError, match="num_samples has no effect without imatrix"):
        run(["--output", "x.gguf", "--num_samples", "3"])
    with pytest.raises(SettingsError, match="type is q9"):
        run(["--output", "x.gguf", "--type", "q9"])
