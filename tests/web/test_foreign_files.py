"""Whatever lies in the folders of adapters and runs, a tab lists the rest and says what is wrong."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from app_kit import write_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vicuna.errors import UserError
from vicuna.runs.manager import Runs
from vicuna.serve.registry import AdapterRegistry
from vicuna.web import adapters_html, train_html
from vicuna.web.i18n import translate

NESTED = "[" * 20_000 + "]" * 20_000
# What a file may hold where a number, a text, a table is expected.
ODD: list[Any] = [
    None, True, 0, -1, 1e308, -1e308, 10**30, 1.5, "eight", "", "\ud800", "x" * 100_000, "<b>",
    [], [1], {}, {"name": 1}, [[]], {"a": {"b": [None]}}, float("nan"), float("inf"),
]  # fmt: skip
odd = st.sampled_from(ODD) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
CONFIG = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "base_model_name_or_path": "tiny"}
META = {
    "base": {"name": "tiny"}, "template": {"name": "alpaca"},
    "mixed": [{"adapter": "a", "strength": 0.5}],
}  # fmt: skip
EVENTS = [
    {"event": "start", "step": 0, "total_steps": 9, "time": 1.0},
    {"event": "step", "step": 1, "loss": 2.0, "learning_rate": 0.1, "tokens_per_second": 5.0,
     "memory_gib": 1.0, "time": 2.0},
    {"event": "eval", "step": 1, "loss": 2.0, "time": 2.0},
    {"event": "sample", "step": 1, "prompt": "p", "answer": "a", "time": 2.0},
    {"event": "warning", "message": "OSError: m", "time": 2.0},
    {"event": "end", "step": 1, "reason": "finished", "time": 3.0},
]  # fmt: skip
words = partial(translate, "zh")
quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write(path: Path, value: Any) -> None:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def adapter(folder: Path, config: Any = CONFIG, meta: Any = META) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    write(folder / "adapter_config.json", config)
    write(folder / "vicuna.json", meta)
    return folder


def shown(registry: AdapterRegistry) -> str:
    """The tab's cards as a browser is sent them."""
    found = registry.adapters()
    html = adapters_html.cards(found, dict.fromkeys(registry.paths(), 1.0), True, words)
    html += "".join(f"{name}{path}" for name, path in registry.choices())
    html += registry.describe(dict.fromkeys(registry.paths(), 0.5))
    html.encode()
    return html


def listed(runs: Runs) -> str:
    found = runs.all()
    html = train_html.all_runs(found, words)
    for run in found:
        html += train_html.head(run, words) + train_html.samples(run, words)
        html += train_html.loss_chart(run, found, words) + train_html.other_charts(run, words)
        html += train_html.output(run) + train_html.commands(run)
        assert isinstance(run.settings(), dict)
    html.encode()
    return html


@quick
@given(st.sampled_from([*CONFIG, "lora_dropout", "target_modules"]), odd)
def test_a_config_s_field_may_be_anything(tmp_path: Path, field: str, value: Any) -> None:
    adapter(tmp_path / "good")
    adapter(tmp_path / "odd", config={**CONFIG, field: value})
    assert "good" in shown(AdapterRegistry([tmp_path]))


@quick
@given(
    st.sampled_from([*META, "base.name", "template.name", "mixed.adapter", "mixed.strength"]), odd
)
def test_what_was_noted_may_be_anything(tmp_path: Path, field: str, value: Any) -> None:
    outer, _, inner = field.partition(".")
    held: Any = {"adapter": "a", "strength": 1.0, inner: value} if inner else value
    adapter(tmp_path / "good")
    meta = {**META, outer: [held] if inner and outer == "mixed" else held}
    adapter(tmp_path / "odd", meta=meta)
    assert "good" in shown(AdapterRegistry([tmp_path]))


@pytest.mark.parametrize("text", [NESTED, '{"r":' + NESTED + "}", "", "[]", "{", "9" * 9999, "\0"])
def test_a_file_that_holds_no_table_is_one_card_that_says_so(tmp_path: Path, text: str) -> None:
    adapter(tmp_path / "good")
    for name in ("config", "meta"):
        adapter(tmp_path / name, **{name: text})
    (tmp_path / "bytes").mkdir()
    (adapter(tmp_path / "bytes") / "adapter_config.json").write_bytes(b"\xff\xfe{}")
    registry = AdapterRegistry([tmp_path])
    html = shown(registry)
    assert html.count("无法读取这个适配器") == 3
    assert registry.paths() == {str(tmp_path / "good")}
    registry.delete(str(tmp_path / "config"))
    assert not (tmp_path / "config").exists()


def test_names_that_no_browser_can_be_sent(tmp_path: Path) -> None:
    adapter(tmp_path / "good")
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe"))
    try:
        adapter(place)
    except OSError:
        pytest.skip("this file system takes no such name")
    assert "good" in shown(AdapterRegistry([tmp_path]))
    write_run(tmp_path / "runs" / "good")
    write_run(Path(os.fsdecode(os.fsencode(tmp_path) + b"/runs/\xff\xfe")))
    assert "good" in listed(Runs(tmp_path / "runs"))


def test_links_out_of_the_folders_are_not_followed(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "runs"
    adapter(outside / "far", config={**CONFIG, "base_model_name_or_path": "secret"})
    write(outside / "secret", {"base_model_name_or_path": "secret"})
    adapter(folder / "good")
    (folder / "whole").symlink_to(outside / "far")
    (adapter(folder / "part") / "adapter_config.json").unlink()
    (folder / "part" / "adapter_config.json").symlink_to(outside / "secret")
    (adapter(folder / "circle") / "vicuna.json").unlink()
    (folder / "circle" / "vicuna.json").symlink_to(folder / "circle" / "vicuna.json")
    inside = folder / "inside"
    inside.symlink_to(folder / "good")
    registry = AdapterRegistry([folder])
    assert "secret" not in shown(registry)
    assert registry.paths() == {str(folder / "good")}
    with pytest.raises(UserError, match="not here"):
        registry.get(str(outside / "far"))


def test_links_out_of_a_run_are_not_shown(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("root:x:0:0\n")
    write_run(tmp_path / "outside", {"event": "sample", "step": 1, "prompt": "secret"})
    runs = tmp_path / "runs"
    write_run(runs / "good")
    for name in ("output.txt", "recipe.yaml", "data.json", "adapter"):
        write_run(runs / f"of {name}")
        (runs / f"of {name}" / name).symlink_to(tmp_path / "secret")
    (runs / "whole").symlink_to(tmp_path / "outside")
    found = Runs(runs)
    html = listed(found)
    assert "root:x" not in html
    assert "secret" not in html
    states = {run.name: run.state for run in found.all()}
    assert states.pop("good") != "unreadable"
    assert set(states.values()) == {"unreadable"}
    with pytest.raises(UserError, match="points outside"):
        found.resume("whole")
    found.delete("whole")
    assert (tmp_path / "outside" / "log.jsonl").is_file()
    assert not (runs / "whole").exists()


@quick
@given(st.integers(0, len(EVENTS) - 1), st.data())
def test_an_event_s_field_may_be_anything(tmp_path: Path, which: int, data: st.DataObject) -> None:
    field = data.draw(st.sampled_from(sorted({*EVENTS[which], "step", "time", "total_steps"})))
    events = [dict(e) for e in EVENTS]
    events[which][field] = data.draw(odd)
    for name in ("odd", "good"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        lines = "".join(json.dumps(e) + "\n" for e in (events if name == "odd" else EVENTS))
        (folder / "log.jsonl").write_text(lines)
    assert "good" in listed(Runs(tmp_path))


@pytest.mark.parametrize("line", [NESTED, "9" * 9999, "{", "[]", '"x"', "\0", '{"event": []}'])
def test_a_line_that_is_no_event_is_left_out_and_counted(tmp_path: Path, line: str) -> None:
    write_run(tmp_path / "odd", *EVENTS[1:])
    with (tmp_path / "odd" / "log.jsonl").open("a") as file:
        file.write(line + "\n" + json.dumps({**EVENTS[1], "step": 2}) + "\n")
    (run,) = Runs(tmp_path).all()
    assert run.log.step == 2
    if "event" not in line:
        assert run.log.odd == 1
        assert "1 行无法读取" in listed(Runs(tmp_path))


@quick
@given(st.sampled_from(["pid", "created", "output_at", "asked", "other"]), odd)
def test_a_note_of_the_process_may_be_anything(tmp_path: Path, field: str, value: Any) -> None:
    folder = tmp_path / "odd"
    if not folder.exists():
        write_run(folder)
    note = {"pid": 2**22 + 1, "created": 1.0, "output_at": 0, "asked": "", field: value}
    write(folder / ".process.json", note)
    (folder / ".lock").write_text(f"pid {value}\n".encode("utf-8", "replace").decode())
    listed(Runs(tmp_path))


def test_a_note_that_names_no_process_of_ours(tmp_path: Path) -> None:
    write_run(tmp_path / "odd")
    for text in ('{"pid": -5, "created": 1}', '{"pid": 0, "created": 1}', NESTED, "[]", ""):
        (tmp_path / "odd" / ".process.json").write_text(text)
        (run,) = Runs(tmp_path).all()
        assert run.state == "killed"


def test_folders_where_files_are_expected(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "good")
    for name in ("log.jsonl", "config.yaml", ".process.json", "output.txt", ".lock"):
        (tmp_path / "runs" / f"of {name}" / name).mkdir(parents=True)
        (tmp_path / "runs" / f"of {name}" / "recipe.yaml").write_text("")
    assert "good" in listed(Runs(tmp_path / "runs"))
    adapter(tmp_path / "shelf" / "good")
    (tmp_path / "shelf" / "odd" / "adapter_config.json").mkdir(parents=True)
    (tmp_path / "shelf" / "odd" / "adapter_model.safetensors").write_bytes(b"")
    assert "good" in shown(AdapterRegistry([tmp_path / "shelf"]))
