"""Paths as people name their files: what stands in them is never taken for something else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vicuna import config
from vicuna.config import DataSettings, MergeSettings, TrainSettings, parse
from vicuna.data.records.find_files import expand
from vicuna.errors import SettingsError, UserError

NAMES = (
    "plain.jsonl",
    "with space.jsonl",
    "中文 数据.jsonl",
    "emoji😀.jsonl",
    "x[1].jsonl",
    "a=b.jsonl",
    "seed=3.jsonl",
    "a,b.jsonl",
    "v2@final.jsonl",
    "a@weight=2.jsonl",
    "-dash.jsonl",
    "100%.jsonl",
    "q?.jsonl",
    "star*.jsonl",
    "'quoted\".jsonl",
    "#1.jsonl",
    "a:b.jsonl",
    "{x}.jsonl",
    "~tilde.jsonl",
    "team@home/d.jsonl",
    "a,b/d.jsonl",
    "x[1]/d.jsonl",
    "weight=3/d.jsonl",
    "max_samples=1@x/d.jsonl",
)
RECORD = json.dumps({"instruction": "a", "output": "b"}) + "\n"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(RECORD)
    return tmp_path


def entries(*words: str) -> list[tuple[str, float, int]]:
    settings, _ = parse(TrainSettings, ["--dataset", *words])
    return [(e.path, e.weight, e.max_samples) for e in settings.dataset]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("absolute", [False, True])
def test_a_data_file(here: Path, name: str, absolute: bool) -> None:
    given = str(here / name) if absolute else name
    assert entries(given) == [(given, 1.0, 0)]
    assert entries(f"{given}@weight=2,max_samples=7") == [(given, 2.0, 7)]
    assert entries(f"{given}@max_samples=1", "plain.jsonl") == [
        (given, 1.0, 1), ("plain.jsonl", 1.0, 0),
    ]  # fmt: skip
    assert [p.resolve() for p in expand(given)] == [here / name]
    free: list[str] = []
    parse(DataSettings, [given], free=free)
    assert free == [given]


@pytest.mark.parametrize("folder", ["team@home", "a,b", "x[1]", "weight=3", "max_samples=1@x"])
def test_globs_and_folders(here: Path, folder: str) -> None:
    for given in (f"{folder}/*.jsonl", f"{folder}/**/*.jsonl", folder, f"{folder}/"):
        assert entries(given) == [(given, 1.0, 0)]
        assert entries(f"{given}@weight=2") == [(given, 2.0, 0)]
        assert [p.resolve() for p in expand(given)] == [here / folder / "d.jsonl"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("plain.jsonl@max_sample=3", "max_sample"),
        ("plain.jsonl@weigth=3", "weigth"),
        ("plain.jsonl@weight=much", "weight"),
        ("plain.jsonl@weight=2,max_samples=-1", "max_samples"),
    ],
)
def test_options_that_are_wrong_are_options(given: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        entries(given)


@pytest.mark.parametrize(
    "given", ["a@b@c.jsonl", "user@host:data.jsonl", "me@x=1.jsonl", "@", "a@"]
)
def test_what_is_no_option_is_part_of_the_path(given: str) -> None:
    assert entries(given) == [(given, 1.0, 0)]


@pytest.mark.parametrize("given", ["x" * 5000 + "@weight=2", "a\0b@weight=2", "~nobody@weight=2"])
def test_what_cannot_be_a_path_is_no_crash(given: str) -> None:
    assert entries(given)[0][1] == 2.0


def adapters(*words: str) -> list[str]:
    settings, _ = parse(MergeSettings, ["--adapter", *words])
    return settings.adapter


def test_folders_with_commas(here: Path) -> None:
    for name in ("ad,apt", "x,y,z", "one", "apt"):
        (here / name).mkdir()
    assert adapters("ad,apt") == ["ad,apt"]
    assert adapters("one,apt") == ["one", "apt"]
    assert adapters("ad,apt,one") == ["ad,apt", "one"]
    assert adapters("one,x,y,z,ad,apt") == ["one", "x,y,z", "ad,apt"]
    assert adapters("ad,apt", "one") == ["ad,apt", "one"]
    assert adapters("not,here") == ["not", "here"]
    assert adapters(str(here / "ad,apt")) == [str(here / "ad,apt")]
    assert adapters("team@home", "x[1]", "weight=3") == ["team@home", "x[1]", "weight=3"]


@pytest.mark.parametrize("given", ["x" * 5000, "a\0b"], ids=["long", "nul"])
def test_what_cannot_be_a_path_is_an_answer(given: str) -> None:
    from vicuna.model.adapter import locate_adapter
    from vicuna.model.base import locate, locate_gguf

    for find in (expand, locate_adapter, locate, locate_gguf):
        with pytest.raises(UserError) as found:
            find(given)
        assert len(str(found.value)) < 300


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("x.jsonl@wieght=2", "wieght: no such option of a data set; did you mean weight?"),
        ("x.jsonl@colums.instruction=a", "did you mean columns.instruction?"),
        ("x.jsonl@max_sample=2", "did you mean max_samples?"),
        ("x.jsonl@weight=-1", "weight of a data set is -1, but must be above 0"),
    ],
)
def test_an_option_of_data_that_is_wrong_is_named_as_it_was_written(given: str, words: str) -> None:
    for work in (
        lambda: config.dataset_entries([given]),
        lambda: config.build(config.TrainSettings, {"dataset": [given]}),
    ):
        with pytest.raises(SettingsError) as found:
            work()
        assert words in str(found.value)
        assert ".0." not in str(found.value)
