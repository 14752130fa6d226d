"""Mistakes on the Chinese page, raised for real: no sentence is half English."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from app_kit import english_half

import architectures_kit
from kit import save_tokenizer
from vicuna import config, untrusted
from vicuna.config import TrainSettings, WebSettings
from vicuna.config.checkpointing import LEVELS
from vicuna.data import dataset
from vicuna.data.conversation import Turn
from vicuna.data.records import columns, find_files, text_stream
from vicuna.data.templates import sandbox
from vicuna.data.templates.chat_template import ChatTemplate
from vicuna.data.templates.registry import find_template
from vicuna.errors import SettingsError, UserError
from vicuna.generate.chat import check_length
from vicuna.generate.decode import decode
from vicuna.generate.processors import tokens_of
from vicuna.generate.settings import Settings, biases_of
from vicuna.memory import auto_settings, devices, plan
from vicuna.messages import Message
from vicuna.model import (
    adapter,
    adapter_base,
    adapter_fit,
    base,
    lora_delta,
    lora_targets,
    self_check,
)
from vicuna.runs import process
from vicuna.runs.manager import Runs
from vicuna.serve import registry
from vicuna.serve.queue import PER_CLIENT, FairQueue, Job
from vicuna.serve.registry import AdapterRegistry
from vicuna.train import first_state, oom, samples, setup
from vicuna.train import loop as training
from vicuna.train.checkpoint import State
from vicuna.train.micro_batch import MicroBatch
from vicuna.web import chat_files, files, sessions, train_plan
from vicuna.web.controls import build as answer_settings
from vicuna.web.data_view import DatasetQuery
from vicuna.web.error_texts import localize_error
from vicuna.web.i18n import translate
from vicuna.web.sessions import Session, Sessions, rate
from vicuna.web.state import App
from vicuna.weights import size_limits
from vicuna.weights.torch_files import load_pickled

CHINESE = partial(translate, "zh")
Say = Callable[..., None]


class Heard:
    """What was said, by whatever way; each must raise."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, work: Callable[..., Any], *values: Any, **named: Any) -> None:
        with pytest.raises(UserError) as found:
            work(*values, **named)
        self.texts += [found.value.what, found.value.fix, found.value.message]


def train(**values: Any) -> TrainSettings:
    return config.build(TrainSettings, {"dataset": ["x.jsonl"], **values})


def of_settings(say: Heard) -> None:
    ok = {"mode": "greedy", "max_new_tokens": 9}
    say(answer_settings, {**ok, "max_new_tokens": 0, "repetition_penalty": 99})
    say(answer_settings, {**ok, "repetition_penalty": 0})
    say(answer_settings, {**ok, "min_new_tokens": 10})
    say(answer_settings, {**ok, "mode": "beam", "num_beams": 2, "num_return_sequences": 3})
    say(answer_settings, {**ok, "logit_bias": "no number"})
    say(config.build, Settings, {"logit_bias": {1: float("inf")}})
    say(config.build, Settings, {"stop": [1.5]})
    for values in ({"adam_beta1": 1}, {"batch_size": "x"}, {"precision": "fp64"},
                   {"learning_rate": "x"}, {"share_prefixes": "x"}):  # fmt: skip
        say(train, **values)
    encoder: Any = SimpleNamespace(vocab_size=7, mark=lambda _: [1, 2])
    say(tokens_of, ["ab"], encoder, "stop_tokens")
    wrong = setup.mistakes(config.build(TrainSettings, {"early_stopping_patience": 2}))
    say.texts += [*wrong, *setup.mistakes(train(val_size=3, val_dataset=["y"]))]
    say(biases_of, ["x"])


def of_answers(say: Heard, session: Session, folder: Path) -> None:
    engine: Any = SimpleNamespace(context_length=4, max_rows=2)
    renderer: Any = None
    say(decode, engine, [1] * 9, Settings(), renderer)
    say(decode, engine, [1], Settings(num_beams=3), renderer)
    say(session.cut, 3)
    say(rate, session, 3, "up", folder / "up.jsonl")
    say(session.load, "{")
    say(Sessions().get, "x")
    vocabulary: Any = SimpleNamespace(chat_template=None)
    say(find_template, "nope", vocabulary)


def of_adapters(say: Heard, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = dict.fromkeys(("hidden_size", "num_hidden_layers", "vocab_size", "weights"), 1)
    for odd in (1, 2, 3, 0):
        theirs = {
            k: 2 if i < odd or (k == "weights" and not odd) else 1 for i, k in enumerate(mine)
        }
        found: Any = SimpleNamespace(meta={"base": {"name": "b", **theirs}}, path="p")
        say(adapter.check_base, found, mine, False)
    monkeypatch.setattr("peft.set_peft_model_state_dict", _wrong_shape)
    say(adapter._fill, None, SimpleNamespace(tensors={}, path="p"), "default")  # type: ignore[arg-type]
    say(adapter.read_adapter, str(folder / "nope"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    say(adapter.read_adapter, "nobody/nothing-there")
    (folder / "empty").mkdir()
    say(adapter.read_adapter, str(folder / "empty"))
    for kind in ('"use_dora": true', '"peft_type": "IA3"', '"modules_to_save": ["x"]',
                 '"alora_invocation_tokens": [1]', '"init_lora_weights": "pissa"'):  # fmt: skip
        _adapter(folder / "odd", kind)
        say(adapter.read_adapter, str(folder / "odd"))
    of_misfits(say, folder)
    shapes = [{"m": (torch.zeros(1, n), torch.zeros(2, 1))} for n in (2, 3)]
    parts: Any = [
        (SimpleNamespace(pairs=lambda s=s: s, lora=SimpleNamespace(largest=1)), 1) for s in shapes
    ]
    say(lora_delta.weighted_sum, parts)
    say(lora_delta.save_weighted_sum, {}, folder)
    say(lora_delta.save_weighted_sum, {}, folder / "new")
    _adapter(folder / "outside" / "a", '"r": 1')
    mine_only = AdapterRegistry([folder / "runs"])
    say(mine_only.get, "gone")
    monkeypatch.setattr(
        mine_only, "get", lambda _: registry.AdapterInfo(str(folder / "outside"), "a")
    )
    say(mine_only.delete, "a")
    at_work = registry.AdapterInfo(str(folder / "runs" / "a" / "adapter"), "a", log=folder)
    monkeypatch.setattr(mine_only, "get", lambda _: at_work)
    monkeypatch.setattr(registry, "_at_work", lambda _: True)
    say(mine_only.delete, "a")


def of_misfits(say: Heard, folder: Path) -> None:
    _adapter(folder / "fit", '"r": 1')
    files = adapter.read_adapter(str(folder / "fit"))
    (module,) = files.pairs()
    a, b = (s.shape for s in files.pairs()[module])
    layer = "model.layers.{}.mlp.up_proj"
    files.tensors = {
        f"base_model.model.{layer.format(0)}.lora_{k}.weight": t
        for k, t in zip("AB", files.pairs()[module])
    }
    wide = (b[0], a[1] + 1)
    for name in ("", "b"):
        files.base_name = name
        say(adapter_fit.check, files, {layer.format(0): wide})
    say(adapter_fit.check, files, {layer.format(n): (b[0], a[1]) for n in (0, 1)})
    say(adapter_fit.check, files, {"h.0.up": (b[0], a[1])})
    renamed = dict(zip(files.tensors, files.tensors.values()))
    more = {k.replace("layers.0", "layers.7"): t for k, t in renamed.items()}
    files.tensors = more
    say(adapter_fit.check, files, {layer.format(0): (b[0], a[1])})
    files.tensors = renamed | {k.replace("up_proj", "x"): t for k, t in renamed.items()}
    say(adapter_fit.check, files, {layer.format(0): (b[0], a[1])})
    files.tensors = {k.replace("model.layers.0.mlp.up_proj", "lm_head"): t
                     for k, t in renamed.items()}  # fmt: skip
    say(adapter_fit.check, files, {"lm_head": (b[0] + 1, a[1])})
    for name in ("/not/here", "nobody/nothing-there"):
        files.base_name = name
        say(adapter_base.named_base, files)
    (folder / "whole").mkdir()
    (folder / "whole" / "config.json").write_text("{}")
    (folder / "whole" / "model.safetensors").touch()
    say(adapter.read_adapter, str(folder / "whole"))
    _adapter(folder / "odd", '"r": 1')
    from safetensors.torch import load_file, save_file

    path = folder / "odd" / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.x.lora_B.bias": torch.ones(1)}, path)
    say(adapter.read_adapter, str(folder / "odd"))


def _wrong_shape(*_: Any, **__: Any) -> None:
    raise RuntimeError("size mismatch")


def _adapter(folder: Path, more: str) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(f'{{"peft_type": "LORA", {more}}}')
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors = {f"{name}A.weight": torch.zeros(1, 2), f"{name}B.weight": torch.zeros(2, 1)}
    save_file(tensors, folder / "adapter_model.safetensors")


def of_files(say: Heard, folder: Path, app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    say(app.inside, "/etc/passwd")
    say(files.allowed, app, " ")
    say(DatasetQuery((folder / "gone",), "m").marks)
    say(find_files.expand, str(folder / "*.nothing"))
    (folder / "bare").mkdir()
    say(find_files.expand, str(folder / "bear"))
    say(find_files.expand, str(folder / "bare" / "x.jsonl"))
    say(find_files.expand, str(folder / "bare"))
    say(text_stream.Text, folder, "klingon", [])
    (folder / "set").mkdir()
    (folder / "set" / "data.arrow").touch()
    (folder / "set" / "state.json").touch()
    say(find_files.expand, str(folder / "set" / "state.json"))
    (folder / "table.csv").write_text("问,答\n一,二\n", encoding="utf-8")
    say(columns.check, folder / "table.csv", (("output", "回答"),), ["问", "答"])
    say(columns.check, folder / "table.csv", (("instruction", "甲"),), ["甲", "乙"])
    say(columns.settled, {"outptu": "答"})
    say.texts.append(text_stream._unreadable(folder, PermissionError(13, "Permission denied")).what)
    say.texts.append(text_stream._unreadable(folder, PermissionError(13, "Permission denied")).fix)
    empty: Any = type("Empty", (), {"files": [], "__len__": lambda _: 0})()
    say(dataset.split, empty, [], 0, 1, 1, 1)
    few: Any = type("Few", (), {"column": lambda *_: [], "__len__": lambda _: 2})()
    monkeypatch.setattr(dataset, "split_validation", lambda *_: ([], []))
    say(dataset.split, few, None, [], 2, 1, 1)
    for model in ("smollm2-135x", "nothing like it/.", str(folder / "bare"), __file__):
        say(base.locate, model)
    (folder / "odd" / "adapter_model.safetensors").touch()
    say(base.locate, str(folder / "odd"))


def of_runs(say: Heard, folder: Path, app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    say(App(WebSettings(read_only=True)).may_write)
    runs = Runs(folder / "runs")
    say(runs.get, "nothing")
    say(runs.get, "../x")
    (folder / "runs" / "full").mkdir(parents=True)
    (folder / "runs" / "full" / "log.jsonl").write_text(
        '{"event": "start", "time": 1}\n{"event": "end", "time": 2, "reason": "done"}\n'
    )
    say(runs.start, {"dataset": ["x"]}, "full")
    say(runs.pause, "full")
    say(runs.resume, "full")
    working = SimpleNamespace(name="full", working=True)
    monkeypatch.setattr(runs, "working", lambda: working)
    say(runs.refuse_second)
    monkeypatch.setattr(runs, "get", lambda _: working)
    say(runs.delete, "full")
    monkeypatch.setattr(subprocess, "run", partial(_late, process.ERROR))
    say(train_plan.plan, {"dataset": ["x"]}, 64)
    monkeypatch.setattr(train_plan.dataset, "load", lambda *_: ([], None))
    monkeypatch.setattr(train_plan, "renderer_for", lambda _: None)
    say(train_plan.longest_example, train())


def _late(_: str, words: list[str], **__: Any) -> None:
    raise subprocess.TimeoutExpired(words, 1)


def of_trainings(say: Heard) -> None:
    shape: Any = SimpleNamespace(max_position_embeddings=64)
    say(plan.make, train(cutoff_len=128), shape, None)
    trainable: Any = SimpleNamespace(device=torch.device("cpu"), llama=1, checkpointing="none")
    state: Any = SimpleNamespace(
        step=3, settings={"precision": "fp32"}, micro_batch=MicroBatch(64, 64),
        nonfinite=0, nonfinite_in_a_row=9, loss_scale=1.0,
    )  # fmt: skip
    console: Any = SimpleNamespace(warn=say.texts.append)
    run: Any = SimpleNamespace(path="r", log=lambda *_, **__: None)
    batchers = [
        oom.MicroBatcher(purpose, state, 0, trainable, Any, train(), run, console)  # type: ignore[arg-type]
        for purpose in get_args(oom.Purpose)
    ]
    for batcher in batchers:
        error = batcher._does_not_fit(64)
        say.texts += [error.what, error.fix]
    batchers[0]._warn("computed again, 32 tokens at a time instead of 64")
    for precision in ("int8", "bf16"):
        say.texts.append(oom.advice(train(), trainable, precision, Path("r"), 64))
    say.texts.append(samples.out_of_time(4, 1, 3, 0.1))
    noted = State(settings={"batch_size": 64})
    say(first_state._refuse_changes, train(batch_size=8), {"batch_size": 8}, noted, False)
    say(lora_targets.find, architectures_kit.build("qwen3_moe"), ["gate_proj"])
    loop: Any = SimpleNamespace(settings=train(), state=state, console=console, folder=run)
    say(training.Training._note_finite, loop, False, 1.0)
    state.step = 0
    say.texts.append(batchers[0]._does_not_fit(64).what)


def of_plans(say: Heard) -> None:
    job = SimpleNamespace(tokens=1024, checkpointing="none", precision="bf16")
    planner: Any = SimpleNamespace(
        footprint=lambda _: SimpleNamespace(peak=3 << 30),
        device=SimpleNamespace(memory=4 << 30),
        alone="",
    )
    for way in LEVELS:
        small: Any = SimpleNamespace(**{**job.__dict__, "checkpointing": way, "tokens": 64})
        for fits in (True, False):
            say.texts.append(auto_settings._choice(planner, job, small, fits).reason)  # type: ignore[arg-type]
    say.texts.append(devices.at_hand("cpu").name)
    say.texts += [level.cost for level in LEVELS.values()]
    say.texts += [auto_settings._choice(planner, job, job, True).reason, *plan.COSTS.values()]  # type: ignore[arg-type]
    planner.alone = self_check.state_of(architectures_kit.build("qwen3_5_text"))
    say.texts.append(auto_settings._choice(planner, job, job, True).reason)  # type: ignore[arg-type]
    asked = auto_settings.StepSpec("fp32", "none", 64, 512)
    for changes in ({}, {"precision": "nf4"}, {"longest": 64}, {"target": ("q_proj", "v_proj")}):
        for way in ("none", "full"):
            other = auto_settings.replace(asked, checkpointing=way, **changes)  # type: ignore[arg-type]
            say.texts.append(plan._alternative(planner, asked, other).cost)


def of_visitors(say: Heard, folder: Path, app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    data = app.data_folders[0]
    say(app.inside, "a\0b")
    say(files.allowed, app, f"{data}/*/../x")
    say(files.allowed, app, f"{data}/**/**/**/x")
    say(check_length, [Turn("user", "x" * 99)], 1)
    queue = FairQueue()
    for _ in range(PER_CLIENT):
        queue.submit(Job("a", print))
    say(queue.submit, Job("a", print))
    (folder / "out").symlink_to("/etc")
    say(untrusted.check_links, folder / "out", [folder])
    _adapter(folder / "odd-card" / "a", '"r": "eight"')
    odd = AdapterRegistry([folder / "odd-card"]).adapters()
    say.texts.append(odd[0].problem)
    monkeypatch.setattr(chat_files, "LONGEST", 1)
    monkeypatch.setattr(sessions, "TURNS", 1)
    (folder / "talk").write_bytes(b"ab")
    say(chat_files._first_line, folder / "talk")
    (folder / "talk").write_bytes(b"\xff\xff")
    say(chat_files._first_line, folder / "talk")
    talk = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}'
    say(Session("0" * 32).load, talk)
    monkeypatch.setattr(sandbox, "COMPUTING", 0.2)
    monkeypatch.setattr(sandbox, "OUTPUT", 50)
    for source in ("{{ 1 / 0 }}", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
                   "{% endfor %}", "{{ 'a' * 99 }}", "{{ 'a' * 10 ** 10 }}",
                   "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(0) }}", "x"):  # fmt: skip
        say(ChatTemplate, source, "<s>", "</s>", ["</s>"])
    hides = (
        "{% for m in messages %}{% if messages|length < 3 or m.role == 'user' %}{{ m.content }}"
        "{% endif %}{% endfor %}"
    )
    talked = [Turn("user", "q"), Turn("assistant", "a"), Turn("user", "q")]
    say(ChatTemplate(hides, "<s>", "</s>", ["</s>"]).prompt, talked)
    base = folder / "huge"
    base.mkdir()
    for config_ in ({"vocab_size": 0}, {"hidden_size": 9999, "vocab_size": 9999},
                    {"hidden_size": 9999, "num_hidden_layers": 4000}):  # fmt: skip
        (base / "config.json").write_text(json.dumps(config_))
        say(size_limits.check_counts if "vocab_size" in config_ and not config_["vocab_size"]
            else partial(size_limits.check_against, stored=1), base)  # fmt: skip
    torch.save({"a": torch.zeros(1).expand(999)}, folder / "a.bin")
    say(load_pickled, folder / "a.bin")


@pytest.fixture
def heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whatever the code says, as it says it."""
    save_tokenizer(tmp_path / "tokenizer")
    app = App(WebSettings(adapters=[str(tmp_path / "runs")], data=[str(tmp_path / "data")]))
    say = Heard()
    of_settings(say)
    of_answers(say, Session("0" * 32), tmp_path)
    of_adapters(say, tmp_path, monkeypatch)
    of_files(say, tmp_path, app, monkeypatch)
    of_trainings(say)
    of_plans(say)
    of_runs(say, tmp_path, app, monkeypatch)
    of_visitors(say, tmp_path, app, monkeypatch)
    return [text for text in say.texts if text]


def test_what_is_really_said_has_no_english_half(heard: list[str]) -> None:
    """Beside tests/test_translations.py: what the fields hold is Chinese, too, or quoted."""
    chinese = {message: localize_error(message, CHINESE) for message in heard}
    assert {m: half for m, text in chinese.items() if (half := english_half(text))} == {}
    assert [m for m, text in chinese.items() if " " in m and not re.search("[一-鿿]", text)] == []


def test_a_message_keeps_its_lines_its_places_and_what_is_not_known() -> None:
    error = SettingsError(
        [Message("{name} is {value}, but must be at least {bound}", name="a_b", value=0, bound=1),
         "odd"]
    )  # fmt: skip
    assert localize_error(error, partial(translate, "en")) == str(error)
    assert localize_error(error, CHINESE).split("\n") == [
        "设置中有 2 处错误：", "- a_b 为 0，至少应为 1", "- odd",
    ]  # fmt: skip
    assert localize_error(UserError("no such run", where="runs"), CHINESE) == "runs：没有这个训练"
    assert localize_error("<b>", CHINESE) == "<b>"
