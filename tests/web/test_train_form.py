"""The form of a training, its check, its plan, and what is shown of runs."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))
from app_kit import write_run
from run_kit import save_tiny_model, write_data

from vicuna import config
from vicuna.commands.plan import run as memory_plan
from vicuna.config import TrainSettings, WebSettings
from vicuna.errors import SettingsError, UserError
from vicuna.messages import Message, lines
from vicuna.runs.manager import Runs
from vicuna.web import train_form, train_html
from vicuna.web.i18n import catalog, translate
from vicuna.web.state import App
from vicuna.web.train_plan import longest_example, plan

EN, ZH = partial(translate, "en"), partial(translate, "zh")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    save_tiny_model(folder / "runs" / "tiny")
    (folder / "data").mkdir()
    write_data(folder / "data" / "a.jsonl", 24)
    return folder


def app_of(place: Path) -> App:
    return App(WebSettings(adapters=[str(place / "runs")], data=[str(place / "data")]))


def test_every_setting_of_the_table_is_offered_or_left_out_and_has_its_words() -> None:
    offered = train_form.fields()
    assert set(offered) | set(train_form.LEFT_OUT) == set(TrainSettings.model_fields)
    assert set(train_form.MAIN) <= set(offered)
    for name, field in offered.items():
        english, chinese = catalog()[f"settings.{name}"]
        assert english == TrainSettings.model_fields[name].description
        assert re.search("[\u4e00-\u9fff]", chinese)
        assert f"group.{field.group}" in catalog()


def test_a_form_that_nobody_touched_says_nothing() -> None:
    assert train_form.given(train_form.shown({})) == {}
    assert train_form.given({}) == {}


@pytest.mark.parametrize("recipe", train_form.recipes())
def test_a_recipe_comes_back_from_the_form_as_it_was(recipe: str) -> None:
    values = config.read_recipe(config.builtin_recipes()[recipe])
    back = train_form.given(train_form.shown(values))
    assert config.build(TrainSettings, back) == config.build(TrainSettings, values)


def test_fields_become_what_the_command_line_would_give() -> None:
    values = train_form.shown(
        {"dataset": [{"path": "a.jsonl", "weight": 2, "max_samples": 5}, "b"]}
    )
    assert values["dataset"] == ["a.jsonl@weight=2,max_samples=5", "b"]
    values |= {"batch_size": 8.0, "learning_rate": 1e-3, "lora_target": "q_proj, v_proj\n o_proj "}
    values |= {"max_steps": None, "sample_prompts": "一, 二？\n\n三", "use_rslora": True}
    settings = config.build(TrainSettings, train_form.given(values))
    assert (settings.batch_size, settings.learning_rate, settings.max_steps) == (8, 1e-3, 0)
    assert settings.lora_target == ["q_proj", "v_proj", "o_proj"]
    assert settings.sample_prompts == ["一, 二？", "三"]
    assert settings.dataset[0].weight == 2
    # A number that is not whole is a mistake, not rounded away.
    with pytest.raises(SettingsError, match="batch_size"):
        config.build(TrainSettings, train_form.given({"batch_size": 8.5}))


def test_all_mistakes_are_told_at_once(place: Path) -> None:
    app = app_of(place)
    outside = {"dataset": ["/etc/passwd"], "model": "/etc", "template": "../x.yaml"}
    more = {"init_adapter": "/tmp/x", "sample_prompts": ["/etc/hosts.txt"], "val_dataset": ["../x"]}
    with pytest.raises(SettingsError) as e:
        train_form.check(app, {**outside, **more, "val_size": 3})
    told = "\n".join(e.value.mistakes)
    for name in ("val_size and val_dataset exclude", *outside, *more):
        assert name in told
    assert told.count("outside of the folders") == 6
    with pytest.raises(SettingsError) as e:
        train_form.check(app, {"batch_size": 0, "learning_rate": 5, "lora_rank": "x"})
    html = train_html.mistakes(e.value, EN)
    assert html.count("<li>") == 3
    with pytest.raises(SettingsError, match="dataset is missing"):
        train_form.check(app, {})


def test_a_plan_is_for_the_longest_example_there_is(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = {"model": str(place / "runs" / "tiny"), "dataset": [str(place / "data" / "a.jsonl")]}
    settings = train_form.check(app_of(place), chosen)
    longest = longest_example(settings)
    assert 16 < longest < 256 < settings.cutoff_len
    found = plan(chosen, longest)
    assert found["fits"]
    html = train_html.plan(found, 32, EN)
    assert "It fits" in html
    assert f"at most {longest}" in html
    # The figures of the terminal, which speaks of the same process.
    memory_plan(["--model", chosen["model"], "--cutoff_len", str(longest), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (told["peak_bytes"], told["parts"]) == (found["peak_bytes"], found["parts"])
    peak = f"{told['peak_bytes'] / (1 << 30):.1f}"
    assert f"{peak} of" in html
    assert f"本机 CPU：需要 {peak} GiB" in train_html.plan(found, 32, ZH)
    warned = {**found, "notes": ["planned by the known shape llama-7b"], "warnings": ["odd"]}
    assert "known shape llama-7b" in train_html.plan(warned, 32, EN)
    with pytest.raises(UserError, match="context length is 512"):
        plan(chosen, 4096)


def test_a_plan_that_does_not_fit_shows_what_would() -> None:
    found: dict[str, Any] = {
        "fits": False, "peak_bytes": 40 << 30, "parts": {"base": 26 << 30, "activations": 14 << 30},
        "settings": {"precision": "bf16", "micro_batch_tokens": 512, "gradient_checkpointing": "full", "cutoff_len": 512},
        "alternatives": [{"settings": {"precision": "nf4", "lora_target": ["q_proj", "v_proj"]}, "peak_bytes": 9 << 30, "cost": "rounded <weights>"}],
        "device": {"name": "this CPU", "memory_bytes": 20 << 30}, "reason": "which does not fit",
    }  # fmt: skip
    html = train_html.plan(found, 4, EN)
    assert "It does not fit" in html
    assert "precision: nf4, lora_target: q_proj,v_proj" in html
    assert "rounded &lt;weights&gt;" in html
    assert '<u style="left:50.00%">' in html
    assert "No settings" in train_html.plan({**found, "alternatives": []}, 4, EN)
    assert "放不下" in train_html.plan(found, 4, ZH)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(5, "5 s"), (600, "10 min"), (7200, "2 h 0 min"), (400_000, "4 d 15 h")],
)
def test_times_are_told_in_two_units(seconds: float, words: str) -> None:
    assert train_html.duration(seconds, EN) == words


EVIL = "<script>x</script>"


def test_a_run_is_shown_with_its_error_its_answers_and_what_to_type(tmp_path: Path) -> None:
    steps = [
        {"event": "step", "step": i, "loss": 3 - i / 10, "learning_rate": 0.1, "tokens_per_second": 9, "memory_gib": 1, "time": 2.0 + i}
        for i in range(1, 6)
    ]  # fmt: skip
    sample = {"event": "sample", "step": 2, "prompt": EVIL, "answer": f"早 {EVIL}", "time": 4.5}
    later = {**sample, "step": 5, "answer": ""}
    warned = {"event": "warning", "step": 3, "message": EVIL, "time": 5.0}
    held = {"event": "eval", "step": 5, "loss": 1.25, "time": 8.0}
    events = [*steps, sample, later, warned, held]
    write_run(tmp_path / "runs" / "a b", *events, output=f"x\nerror: {EVIL}: gone\nMend it.\n")
    write_run(tmp_path / "runs" / "二号", *steps[:2], output="")
    runs = Runs(tmp_path / "runs")
    run, other = runs.get("a b"), runs.get("二号")
    head = train_html.head(run, EN)
    assert "gone" in head
    assert "Mend it." in head
    assert "1.2500" in head
    assert "step 5 of 9" in head
    samples = train_html.samples(run, ZH)
    assert samples.index("（空）") < samples.index("早")
    chart = train_html.loss_chart(run, [other], EN)
    assert "二号" in chart
    assert '"line c1"' in chart
    table = train_html.all_runs(runs.all(), EN)
    for html in (head, samples, chart, table, train_html.other_charts(run, EN)):
        assert "<script" not in html
    assert f"vicuna train --resume '{run.path}'" in train_html.commands(run)
    assert train_html.output(run).splitlines()[-1] == "Mend it."
    assert "No runs yet" in train_html.all_runs([], EN)
    json.dumps(runs.get("a b").settings())


def test_a_refused_resume_stays_paused_and_samples_to_come_are_announced(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"event": "step", "step": 3, "loss": 1.0})
    (run,) = Runs(tmp_path).all()
    template = "{key} was {before} in the checkpoint and is now {now}"
    error = lines([Message(template, key="batch_size", before=4, now=8), "Give the old values."])
    run = replace(run, state="paused", error=error)
    for say_, kept, what in ((EN, "Still paused", "batch_size was 4"), (ZH, "仍为暂停", "是 4")):
        html = train_html.head(run, say_)
        assert kept in html
        assert what in html
        assert "v-chip paused" in html
    assert "List questions under sample_prompts" in train_html.samples(run, EN)
    (tmp_path / "a" / "config.yaml").write_text("model: tiny\nsample_prompts: [你好]\n")
    assert "还没有回答" in train_html.samples(run, ZH)
