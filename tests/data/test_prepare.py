"""Preparing files: cached once, the same in worker processes, cut and split as asked."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "generate"))
from generate_kit import byte_level, make_renderer

from vicuna import config
from vicuna.data import dataset, prepare
from vicuna.data.conversation import Turn
from vicuna.data.dataset import Lengths
from vicuna.data.loss_mask import NEXT_TOKEN, targets_of
from vicuna.data.templates.renderer import Renderer
from vicuna.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VICUNA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return make_renderer(byte_level(), "chatml")


def write(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    return path


def load(path: Path, renderer: Renderer, **settings: object) -> tuple[dataset.Dataset, dict]:
    built = config.build(config.DataSettings, settings)
    entries = [config.DatasetEntry(path=str(path))]
    found, report = dataset.load(entries, built, renderer)
    return found, report.to_json()["files"][0]


SHORT = {"instruction": "问", "output": "答"}
LONG = {"instruction": "问", "output": "很长的答案" * 60}
CHAT = {"input": ["一" * 20, "二" * 20, "三" * 20], "output": ["甲" * 20, "乙" * 20, "丙" * 20]}


def test_long_records_are_dropped_and_said(tmp_path: Path, renderer: Renderer) -> None:
    path = write(tmp_path / "a.jsonl", [SHORT, LONG])
    found, report = load(path, renderer, cutoff_len=128)
    assert len(found) == 1
    assert (report["used"], report["dropped"]) == (1, 1)
    (problem,) = [p for p in report["problems"] if p["action"] == "dropped"]
    assert problem["line"] == 2
    assert "cutoff_len is 128" in problem["reason"]


def test_a_cut_answer_is_never_taught_to_end(tmp_path: Path, renderer: Renderer) -> None:
    path = write(tmp_path / "a.jsonl", [SHORT, LONG])
    found, report = load(path, renderer, cutoff_len=128, overlong="cut")
    assert [len(found[i].ids) for i in range(2)][1] == 128
    _, targets = targets_of(found[1], renderer.end_id)
    assert renderer.end_id not in targets
    assert renderer.end_id in targets_of(found[0], renderer.end_id)[1]
    assert any("cut to cutoff_len" in p["reason"] for p in report["problems"])


def test_split_makes_examples_of_whole_turns(tmp_path: Path, renderer: Renderer) -> None:
    path = write(tmp_path / "a.jsonl", [CHAT])
    whole, _ = load(path, renderer, cutoff_len=4096)
    limit = len(whole[0].ids) - 10
    found, report = load(path, renderer, cutoff_len=limit, overlong="split")
    assert len(found) == 2
    assert report["used"] == 1
    first = renderer.prompt([Turn("user", "三" * 20)])
    assert found[1].ids[: len(first)].tolist() == first
    for i in range(2):
        assert len(found[i].ids) <= limit
        assert renderer.end_id in targets_of(found[i], renderer.end_id)[1]


def test_texts_are_split_into_windows(tmp_path: Path, renderer: Renderer) -> None:
    text = "".join(chr(0x4E00 + 7 * i) for i in range(90))
    path = write(tmp_path / "a.jsonl", [{"text": text}])
    found, _ = load(path, renderer, cutoff_len=64, overlong="split")
    assert len(found) > 1
    for i in range(len(found)):
        assert len(found[i].ids) <= 64
        last = i == len(found) - 1
        assert (renderer.end_id in targets_of(found[i], renderer.end_id)[1]) == last


def test_the_second_time_comes_from_the_cache(
    tmp_path: Path, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", [SHORT] * 5)
    load(path, renderer)

    def never(*_: object) -> None:
        raise AssertionError("computed twice")

    monkeypatch.setattr(prepare, "_make", never)
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(path.read_bytes())
    found, report = load(copy, renderer, cutoff_len=64)
    assert len(found) == 5
    assert report["path"] == str(copy)


def test_workers_give_what_one_process_gives(
    tmp_path: Path, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    records: list[dict[str, object]] = [
        {"instruction": f"第{i}问", "output": f"第{i}答" * (i % 9)} for i in range(1500)
    ]
    path = write(tmp_path / "a.jsonl", records)
    one, report_one = load(path, renderer)
    monkeypatch.setenv("VICUNA_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(prepare, "SMALL", 0)
    monkeypatch.setattr(prepare, "_cores", lambda: 2)
    many, report_many = load(path, renderer)
    assert report_one == report_many
    assert len(one) == len(many)
    for i in range(len(one)):
        assert np.array_equal(one[i].ids, many[i].ids)
        assert np.array_equal(one[i].labels, many[i].labels)


def test_max_samples_takes_the_first_usable_records(tmp_path: Path, renderer: Renderer) -> None:
    records: list[dict[str, object]] = [{"instruction": "无答案"}, SHORT, LONG, CHAT]
    path = write(tmp_path / "a.jsonl", records)
    found, report = load(path, renderer, max_samples=2)
    assert len(found) == 2
    assert (report["records"], report["used"], report["dropped"]) == (3, 2, 1)


def test_duplicates_are_named(tmp_path: Path, renderer: Renderer) -> None:
    near = {**LONG, "output": LONG["output"] + "。"}
    path = write(tmp_path / "a.jsonl", [SHORT, LONG, SHORT, near])
    _, report = load(path, renderer)
    reasons = {(p["line"], p["reason"]) for p in report["problems"]}
    assert (3, "exact duplicate: of line 1") in reasons
    assert (4, "near duplicate: of line 2") in reasons


def test_the_cutoff_is_explained_in_words() -> None:
    lengths = np.array([100] * 61 + [300] * 24 + [900] * 12 + [3000] * 3)
    words = dataset.cutoff_words(Lengths(lengths, np.minimum(lengths, 50)), 256)
    assert words == (
        "cutoff_len 256: 39% of examples are longer, 0% would lose the whole answer; "
        "1,024 keeps 97%"
    )


def test_records_on_one_line_are_counted_one_by_one(tmp_path: Path, renderer: Renderer) -> None:
    path = tmp_path / "one_line.json"
    path.write_text(json.dumps([LONG, LONG, SHORT, SHORT, LONG], ensure_ascii=False))
    found, report = load(path, renderer, cutoff_len=128)
    assert len(found) == 2
    assert (report["records"], report["used"], report["dropped"]) == (5, 2, 3)
    assert sum("duplicate" in p["reason"] for p in report["problems"]) == 3


def test_strict_stops_at_an_overlong_record(tmp_path: Path, renderer: Renderer) -> None:
    path = write(tmp_path / "a.jsonl", [SHORT, LONG])
    with pytest.raises(UserError, match=r"a\.jsonl:2: too long"):
        load(path, renderer, cutoff_len=128, strict=True)


def test_of_answers_to_one_question_the_best_is_used(tmp_path: Path, renderer: Renderer) -> None:
    def answer(text: str, question: str = "问", **more: object) -> dict[str, object]:
        return {"prompt": question, "response": text, **more}

    ranked = [answer("差", rank=1), answer("好", rank=0), answer("独", "别的", rank=5)]
    scored = [answer("七分", score=7), answer("九分", score=9), answer("也九分", score=9.0)]
    for name, records, lost in (("r", ranked, [1]), ("s", scored, [1]), ("n", [*scored[:1]], [])):
        path = write(tmp_path / f"{name}.jsonl", records)
        found, report = load(path, renderer)
        assert len(found) == len(records) - len(lost)
        dropped = [p for p in report["problems"] if p["action"] == "dropped"]
        assert [p["line"] for p in dropped] == lost
        assert all("better answer" in p["reason"] for p in dropped)
        assert report["unused"] == {"rank" if name == "r" else "score": len(records)}


def test_an_answer_that_is_not_learned(tmp_path: Path, renderer: Renderer) -> None:
    def said(*weights: int) -> dict[str, object]:
        turns: list[dict[str, object]] = []
        for i, weight in enumerate(weights):
            turns.append({"role": "user", "content": f"问{i}"})
            turns.append({"role": "assistant", "content": f"答{i}", "weight": weight})
        return {"messages": turns}

    path = write(tmp_path / "a.jsonl", [said(0, 1), said(1, 0), said(0)])
    for turns, used, reasons in (("all", 2, 1), ("last", 1, 2)):
        found, report = load(path, renderer, train_turns=turns)
        assert (len(found), report["used"]) == (used, used)
        assert report["records"] == report["used"] + report["dropped"] == 3
        assert sum(p["action"] == "dropped" for p in report["problems"]) == reasons
    example = load(path, renderer)[0][0]
    learned = example.ids[1:][example.labels[:-1] == NEXT_TOKEN]
    taught = renderer.tokenizer.decode(learned.tolist())
    assert "答1" in taught
    assert "答0" not in taught


def test_what_was_not_used_is_said(tmp_path: Path, renderer: Renderer) -> None:
    more = {"topic": "天文", "images": [], "note": ""}
    path = write(tmp_path / "a.jsonl", [{**SHORT, **more}, SHORT, {**SHORT, "score": 1}])
    for _ in range(2):  # made, and from the cache
        _, report = load(path, renderer)
        assert report["unused"] == {"topic": 1, "score": 1}
        assert "columns not used: topic (1), score (1)" in report["notes"]


def test_columns_are_part_of_the_cache(tmp_path: Path, renderer: Renderer) -> None:
    path = write(tmp_path / "a.jsonl", [{"q": "问", "a1": "答", "a2": "别"}])
    settings = config.build(config.DataSettings, {})
    ids = []
    for own in ("a1", "a2"):
        (entry,) = config.dataset_entries([f"{path}@columns.instruction=q,columns.output={own}"])
        found, report = dataset.load([entry], settings, renderer)
        assert report.files[0].used == 1
        ids.append(found[0].ids.tolist())
    assert ids[0] != ids[1]
    assert (
        dataset.load([config.DatasetEntry(path=str(path))], settings, renderer)[1].files[0].used
        == 0
    )
