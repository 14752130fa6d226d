"""Comparing models: what is measured equals what is measured by hand, and the gate holds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gguf_kit import tiny_base, tiny_gguf
from kit import FAMILIES, with_adapter
from vicuna.config import VerifySettings
from vicuna.data.tokenizer import Tokenizer
from vicuna.errors import UserError
from vicuna.model.adapter import read_adapter, save
from vicuna.model.vocabulary import load_vocabulary
from vicuna.verify.compare import compare
from vicuna.verify.logits import FolderLogits, GgufLogits, ModelLogits, Texts
from vicuna.verify.report import GATES, Report, gate_of, misses
from vicuna.verify.texts import texts_for

TEXTS = [[5, 9, 200, 31, 7, 11, 60], [17, 3, 41], [8, 8, 120, 90, 33]]


class Fixed:
    """Scores that were given."""

    def __init__(self, *scores: Any) -> None:
        self._scores = [np.asarray(s, np.float32) for s in scores]

    def logits(self, _: Texts) -> Iterator[np.ndarray]:
        yield from self._scores


def softmax(row: list[float]) -> list[float]:
    top = [math.exp(v) for v in row]
    return [v / sum(top) for v in top]


def test_the_numbers_are_those_of_the_definitions() -> None:
    before, after = [[0.0, 1.0, 2.0], [1.0, 0.0, 0.0]], [[0.0, 2.0, 1.0], [1.0, 0.0, 0.0]]
    found = compare(Fixed(before), Fixed(after), {"zh": [[0, 2]]}).texts["zh"]
    p, q = softmax(before[0]), softmax(after[0])
    kl = sum(a * math.log(a / b) for a, b in zip(p, q))
    assert found.tokens == 2
    assert found.largest_kl == pytest.approx(kl)
    assert found.mean_kl == pytest.approx(kl / 2)
    assert found.agreement == 0.5
    assert found.largest_logit_difference == 1.0
    assert found.perplexity_before == pytest.approx(1 / p[2])
    assert found.perplexity_after == pytest.approx(1 / q[2])
    assert found.perplexity_ratio == pytest.approx(p[2] / q[2])


def test_positions_in_parts_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 9, 20))
    texts = {"zh": [rng.integers(0, 20, 9).tolist()]}
    whole = compare(Fixed(a), Fixed(b), texts)
    monkeypatch.setattr("vicuna.verify.compare._ROWS", 2)
    parts = compare(Fixed(a), Fixed(b), texts)
    assert parts.to_json()["zh"] == pytest.approx(whole.to_json()["zh"])


def test_the_worst_kind_of_text_counts() -> None:
    same, other = [[0.0, 1.0], [0.0, 0.0]], [[5.0, 0.0], [0.0, 0.0]]
    found = compare(Fixed(same, same), Fixed(same, other), {"zh": [[0, 1]], "en": [[0, 1]]})
    assert found.texts["zh"].mean_kl == 0
    assert found.mean_kl == found.texts["en"].mean_kl > 0.1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_no_numbers_are_an_error(value: float) -> None:
    good = [[0.0, 1.0], [0.0, 1.0]]
    with pytest.raises(UserError, match="the result gives logits that are not finite"):
        compare(Fixed(good), Fixed([[value, 1.0], [0.0, 1.0]]), {"zh": [[0, 1]]})


# -- what gives the scores ----


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_by_layer_equals_the_whole_model(tmp_path: Path, family: str) -> None:
    model = tiny_base(tmp_path, family)
    for ids, found in zip(TEXTS, FolderLogits(tmp_path).logits(TEXTS)):
        with torch.no_grad():
            wanted = model(input_ids=torch.tensor([ids])).logits[0].numpy()
        np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_many_texts_are_computed_in_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_base(tmp_path, "llama")
    whole = list(FolderLogits(tmp_path).logits(TEXTS))
    monkeypatch.setattr("vicuna.verify.logits._POSITIONS", 10)
    parts = list(FolderLogits(tmp_path).logits(TEXTS))
    assert [len(p) for p in parts] == [len(ids) for ids in TEXTS]
    for a, b in zip(whole, parts):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_counts_as_in_peft(tmp_path: Path, rslora: bool) -> None:
    model = tiny_base(tmp_path / "base", "llama")
    peft = with_adapter(model, rslora=rslora)
    (tmp_path / "adapter").mkdir()
    save(peft, tmp_path / "adapter", {})
    files = read_adapter(str(tmp_path / "adapter"))
    found = FolderLogits(tmp_path / "base", adapters=[(files, 1.0)]).logits(TEXTS)
    for wanted, scores in zip(ModelLogits(peft).logits(TEXTS), found):
        np.testing.assert_allclose(scores, wanted, atol=1e-4)


def test_a_gguf_file_scores_like_its_folder(tmp_path: Path) -> None:
    tiny_gguf(tmp_path, "llama-gqa-tied")
    scorer = GgufLogits(tmp_path / "f32.gguf", longest=16, threads=1)
    found = compare(FolderLogits(tmp_path), scorer, {"zh": TEXTS})
    scorer.close()
    assert found.mean_kl < 1e-6
    assert found.texts["zh"].agreement == 1


def test_weights_of_another_shape_are_told(tmp_path: Path) -> None:
    tiny_base(tmp_path / "a", "llama")
    tiny_base(tmp_path / "b", "llama", intermediate_size=64)
    (tmp_path / "b" / "config.json").write_bytes((tmp_path / "a" / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"mlp\..*_proj\.weight has the shape"):
        next(FolderLogits(tmp_path / "b").logits(TEXTS))


# -- texts, gate, report ----


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_base(folder, "llama")
    return folder


def encoder(folder: Path) -> Tokenizer:
    return Tokenizer(load_vocabulary(folder))


def test_texts_are_chinese_and_english_within_their_budget(base: Path) -> None:
    texts = texts_for(VerifySettings(verify_tokens=300), encoder(base))
    assert set(texts) == {"zh", "en"}
    for of_kind in texts.values():
        assert 250 < sum(map(len, of_kind)) <= 300
        assert all(1 < len(ids) <= 256 for ids in of_kind)


def test_a_file_of_ones_own_replaces_them(base: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text('{"instruction": "你好", "output": "好"}\n', encoding="utf-8")
    texts = texts_for(VerifySettings(verify_data=str(own)), encoder(base))
    assert encoder(base).decode(texts["data"][0]) == "你好\n好"
    for content in ("", "{}\n"):
        own.write_text(content)
        with pytest.raises(UserError, match="no text"):
            texts_for(VerifySettings(verify_data=str(own)), encoder(base))


def test_a_gate_is_moved_by_what_is_given() -> None:
    assert gate_of("8bit", VerifySettings()) == GATES["8bit"]
    moved = gate_of("exact", VerifySettings(max_kl=0.5))
    assert (moved.max_kl, moved.exact) == (0.5, False)


def verified(base: Path, other: Path, tmp_path: Path, kind: str, **given: Any) -> Report:
    report = Report("merge", tmp_path / "result", kind)
    settings = VerifySettings(verify_tokens=32, **given)
    report.verify(
        settings, lambda: FolderLogits(base), lambda: FolderLogits(other), lambda: encoder(base)
    )
    return report


def test_the_same_model_passes_every_gate(base: Path, tmp_path: Path) -> None:
    for kind in GATES:
        report = verified(base, base, tmp_path, kind)
        assert not report.misses
        report.finish()


@pytest.mark.parametrize(
    ("ratio", "said"),
    [(1.0, ""), (1.09, ""), (1.34, "perplexity is up by 34%"), (2.5, "2.5 times what it was")],
)
def test_a_perplexity_that_rose_is_said_beside_passes(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ratio: float, said: str
) -> None:
    """The gates of few bits are wide: "passes" alone would sound like nothing was lost."""
    report = verified(base, base, tmp_path, "3bit")
    assert report.comparison is not None
    texts = report.comparison.texts.items()
    worse = {k: replace(d, perplexity_after=d.perplexity_before * ratio) for k, d in texts}
    report.comparison = replace(report.comparison, texts=worse)
    assert report.comparison.perplexity_ratio == pytest.approx(ratio, abs=1e-6)
    report.finish()
    out = " ".join(capsys.readouterr().out.split())
    assert "passes: gate" in out
    assert ("worse than before" in out) == bool(said)
    assert said in out


def test_another_model_passes_none_but_is_kept_where_asked(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_base(tmp_path / "other", "llama", seed=1)
    for kind in ("exact", "16bit", "4bit"):
        with pytest.raises(UserError, match="it was removed"):
            verified(base, tmp_path / "other", tmp_path, kind)
    report = verified(base, tmp_path / "other", tmp_path, "4bit", keep_failed=True)
    with pytest.raises(UserError, match="it was kept"):
        report.finish()
    assert "does not pass" in capsys.readouterr().out
    assert report.to_json()["passed"] is False


def test_no_verify_compares_nothing_and_says_so(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = verified(base, tmp_path / "missing", tmp_path, "exact", verify=False)
    report.finish()
    assert "not compared" in capsys.readouterr().out
    assert report.to_json()["passed"] is None


def test_report_json_holds_what_was_measured(base: Path, tmp_path: Path) -> None:
    report = verified(base, base, tmp_path, "16bit")
    report.measure(100, base)
    written = json.loads(report.write(base).read_text())
    assert written["bytes_before"] == 100
    assert written["bytes_after"] > 10_000
    assert written["peak_memory_bytes"] > 1 << 20
    assert set(written["comparison"]) == {"zh", "en"}
    assert written["comparison"]["zh"]["mean_kl"] == 0
    assert written["gate"]["max_kl"] == GATES["16bit"].max_kl
    (base / "report.json").unlink()


def test_reports_of_two_files_in_a_folder_stay_apart(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf", "a.gguf"):
        (tmp_path / name).touch()
        report = Report("export", tmp_path / name, "16bit")
        report.write_as(report.path)
    assert json.loads((tmp_path / "report.json").read_text())["result"] == "a.gguf"
    assert json.loads((tmp_path / "b.gguf.report.json").read_text())["result"] == "b.gguf"


def test_misses_name_the_figure_and_the_gate() -> None:
    found = compare(Fixed([[0.0, 1.0]] * 2), Fixed([[9.0, 1.0]] * 2), {"zh": [[0, 1]]})
    assert "mean KL divergence" in misses(found, GATES["8bit"])[0]
    assert "times that before" in misses(found, GATES["8bit"])[1]
