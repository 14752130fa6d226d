"""An adapter that does not fit says so, and base and other adapters answer on as before."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import vicuna
from kit import save_tokenizer, shake, tiny_model
from vicuna import cli
from vicuna.errors import UserError

QUESTION = "hello there"
WORDS = 600


def adapter(folder: Path, family: str = "llama", target: Any = "all-linear", **changes: Any) -> str:
    config = LoraConfig(r=4, lora_alpha=16, target_modules=target, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    peft = get_peft_model(tiny_model(family, **{"vocab_size": WORDS, **changes}), config)
    shake(peft)
    peft.save_pretrained(str(folder))
    return str(folder)


def other_names(folder: Path) -> str:
    adapter(folder)
    path = folder / "adapter_model.safetensors"
    save_file({k.replace("model.layers", "transformer.h"): v for k, v in load_file(path).items()},
              path)  # fmt: skip
    return str(folder)


def one_name_more(folder: Path) -> str:
    adapter(folder)
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    more = {k.replace("q_proj", "w_proj"): v.clone() for k, v in state.items() if "layers.1" in k}
    save_file({**state, **more}, path)
    return str(folder)


MISFITS = {
    "hidden size": (lambda f: adapter(f, hidden_size=48), "another hidden size"),
    "inner size": (lambda f: adapter(f, intermediate_size=64), "mlp"),
    "more layers": (lambda f: adapter(f, num_hidden_layers=4), "another number of layers: at least"),
    "fewer layers": (lambda f: adapter(f, num_hidden_layers=1), "another number of layers: 1 in"),
    "names": (other_names, "another architecture"),
    "one name": (one_name_more, "has no counterpart"),
    "vocabulary": (
        lambda f: adapter(f, target=["q_proj", "lm_head"], vocab_size=320), "another vocabulary",
    ),
    "heads": (lambda f: adapter(f, num_key_value_heads=2), "k_proj|v_proj"),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bases") / "base"
    tiny_model("llama", vocab_size=WORDS).save_pretrained(str(folder))
    save_tokenizer(folder)
    return str(folder)


@pytest.fixture
def good(tmp_path: Path) -> str:
    return adapter(tmp_path / "good", target=["v_proj", "up_proj"])


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def command(words: list[str]) -> Any:
    """The exit code of a command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["vicuna", *words])
        try:
            cli.main()
        except SystemExit as e:
            return e.code


def says(model: vicuna.Model) -> list[float]:
    answer = model.generate(QUESTION, max_new_tokens=4, logprobs=1).answers[0]
    return [round(t.logprob, 4) for t in answer.logprobs]


def opened(base: str, **given: Any) -> vicuna.Model:
    return vicuna.load(base, precision="fp32", template="alpaca", **given)


@pytest.mark.parametrize("kind", MISFITS)
def test_base_and_good_adapters_answer_as_before(
    base: str, good: str, tmp_path: Path, kind: str
) -> None:
    make, said = MISFITS[kind]
    bad = make(tmp_path / "bad")
    with pytest.raises(UserError, match=f"does not fit this base: .*({said})"):
        opened(base, adapter=bad)
    with opened(base) as alone, opened(base, adapter=good) as adapted:
        of_base, of_good = says(alone), says(adapted)
        assert of_base != of_good
        for model, wanted in ((alone, of_base), (adapted, of_good)):
            for _ in range(2):
                with pytest.raises(UserError, match="does not fit"):
                    model.load_adapter("bad", bad)
                assert says(model) == wanted
            with pytest.raises(UserError, match="no adapter 'bad'"):
                model.set_adapter("bad")
        # The base that refused one takes the next, and can go back.
        alone.load_adapter("good", good)
        alone.set_adapter("good")
        assert says(alone) == of_good
        alone.set_adapter({})
        assert says(alone) == of_base
        alone.drop_adapter("good")
        assert says(alone) == of_base


@pytest.mark.parametrize("kind", MISFITS)
def test_every_command_says_it(
    base: str, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = MISFITS[kind][0](tmp_path / "bad")
    records = tmp_path / "d.jsonl"
    records.write_text('{"instruction": "a", "output": "b"}\n' * 8)
    common = ["--model", base, "--template", "alpaca"]
    for words in (
        ["generate", *common, "--adapter", bad, "--precision", "fp32", QUESTION],
        ["merge", "--model", base, "--adapter", bad, "--output_dir", str(tmp_path / "m")],
        ["export", "gguf", "--model", base, "--adapter", bad, "--output", str(tmp_path / "m.gguf"),
         "--no-verify"],
        ["train", *common, "--init_adapter", bad, "--dataset", str(records), "--max_steps", "1",
         "--output_dir", str(tmp_path / "run"), "--val_size", "0"],
    ):  # fmt: skip
        assert command(words) == 2, words
        shown = " ".join(capsys.readouterr().err.split())
        assert "does not fit this base" in shown, (words, shown)
        assert "internal error" not in shown
    assert not (tmp_path / "m").exists()
    assert not (tmp_path / "m.gguf").exists()


def test_a_model_is_left_as_it_was(tmp_path: Path) -> None:
    """Also where filling fails at the last moment: nothing of PEFT stays in the base."""
    from vicuna.model import adapter as adapters

    folder = adapter(tmp_path / "one")
    files = adapters.read_adapter(folder)
    model = tiny_model("llama", vocab_size=WORDS)
    before = {n: type(m) for n, m in model.named_modules()}

    def failing(*_: Any) -> None:
        raise RuntimeError("at the last moment")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapters, "_fill", failing)
        with pytest.raises(RuntimeError):
            adapters.attach_saved(model, files)
    assert {n: type(m) for n, m in model.named_modules()} == before
    assert not hasattr(model, "peft_config")
    peft = adapters.attach_saved(model, files)
    assert isinstance(peft, PeftModel)


REFUSED = {
    "pissa": {"init_lora_weights": "pissa"}, "init_lora_weights": {"init_lora_weights": "olora"},
    "alora_invocation_tokens": {"alora_invocation_tokens": [5]}, "use_dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]}, "IA3": {"peft_type": "IA3"},
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_everywhere(
    base: str, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from vicuna.serve.registry import AdapterRegistry

    folder = adapter(tmp_path / "a")
    path = Path(folder) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | REFUSED[name]))
    with pytest.raises(UserError, match=name):
        opened(base, adapter=folder)
    with opened(base) as model:
        wanted = says(model)
        with pytest.raises(UserError, match=name):
            model.load_adapter("x", folder)
        assert says(model) == wanted
    with pytest.raises(UserError, match=name):
        AdapterRegistry([tmp_path]).add(folder)
    out = str(tmp_path / "out")
    for words in (
        ["adapter", "inspect", folder],
        ["adapter", "upgrade", folder, "--output_dir", out],
        ["merge", "--model", base, "--adapter", folder, "--output_dir", out],
        ["export", "gguf", "--model", base, "--adapter", folder, "--output", out + ".gguf"],
        ["generate", "--model", base, "--adapter", folder, QUESTION],
        ["train", "--model", base, "--init_adapter", folder, "--dataset", "x.jsonl",
         "--output_dir", out],
    ):  # fmt: skip
        assert command(words) == 2, words
        assert name in "".join(capsys.readouterr().err.split()), words


def test_on_the_page(base: str, good: str, tmp_path: Path) -> None:
    from vicuna import config
    from vicuna.generate.load import open_model
    from vicuna.serve.worker import ModelWorker

    bad = adapter(tmp_path / "bad", hidden_size=48)
    settings = {"model": base, "precision": "fp32", "template": "alpaca"}
    answering = config.build(config.AnswerSettings, settings)
    worker = ModelWorker(lambda: open_model(answering))

    def logits() -> torch.Tensor:
        engine = worker.loaded.engine
        engine.reset()
        return engine.prefill([5, 6, 7, 8])

    try:
        worker.choose("", {}).wait()
        of_base = logits()
        worker.choose("", {good: 1.0}).wait()
        of_good = logits()
        assert not torch.equal(of_base, of_good)
        for mix in ({bad: 1.0}, {good: 0.5, bad: 0.5}):
            with pytest.raises(UserError, match="another hidden size"):
                worker.choose("", mix).wait()
            assert torch.equal(logits(), of_good)
        worker.choose("", {}).wait()
        assert torch.equal(logits(), of_base)
    finally:
        worker.close()
