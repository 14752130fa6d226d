"""Every template with tokenizers that models have: token for token what one call gives.

The tokenizers lie in the folder that VICUNA_TEST_TOKENIZERS names, else in .venv/share/tokenizers;
each in a folder of its own with tokenizer.json and tokenizer_config.json.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from test_template import CHATML, LLAMA2, VICUNA

from vicuna.data.conversation import Conversation, Turn
from vicuna.data.templates.chat_template import ChatTemplate
from vicuna.data.templates.compare_with_original import differences
from vicuna.data.templates.registry import builtin_templates, find_template
from vicuna.data.templates.renderer import Renderer
from vicuna.data.tokenizer import Tokenizer
from vicuna.model.vocabulary import load_vocabulary

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("VICUNA_TEST_TOKENIZERS") or ROOT / ".venv" / "share" / "tokenizers")
FOLDERS = sorted(p.parent for p in FOLDER.glob("*/tokenizer.json")) if FOLDER.is_dir() else []
if not FOLDERS and os.environ.get("CI"):
    raise RuntimeError(f"no tokenizers in {FOLDER}")
every = pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
# An answer of theirs ends without a control token, and is encoded apart from what follows it.
SILENT = {"vicuna-instruct", "vicuna-chat", "vicuna-interaction", "vicuna-chitchat"}


@lru_cache
def reference(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


@lru_cache
def encoder(folder: Path) -> Tokenizer:
    return Tokenizer(load_vocabulary(folder))


def renderer(folder: Path, name: str) -> Renderer:
    return Renderer(find_template(name, encoder(folder).data), encoder(folder))


ANSWERS = [
    "Fine, and you? 123 你好。",
    "床前明月光，\n疑是地上霜。\n\n- a\n- b",
    "12350.",
    "```python\nx = 1\n```",
]
QUESTIONS = ["How are you?", "12345 + 5 = ?\n\n算一下", "\n  Hm \n", "'s 1。\n2:\n\n\n3 "]
TURNS = [t for q, a in zip(QUESTIONS, ANSWERS) for t in (Turn("user", q), Turn("assistant", a))]
CASES = {
    "one": TURNS[:2],
    "two": TURNS[:4],
    "many": TURNS,
    "backwards": [t for n in (3, 2, 1, 0) for t in TURNS[2 * n : 2 * n + 2]],
    "system": [Turn("system", "You are 诗人。\nBe short: 3"), *TURNS],
    "input": [Turn("user", "翻译", "Good morning, 2024!"), TURNS[1]],
}


@every
@pytest.mark.parametrize("case", list(CASES))
def test_built_in_templates_are_encoded_in_one_call(folder: Path, case: str) -> None:
    for name in builtin_templates():
        r, turns = renderer(folder, name), CASES[case]
        segments = r.template.examples(Conversation(turns))[-1]
        ids = r.tokenizer.encode(segments, r.end_id).ids.tolist()
        text = r.spelled(segments)
        whole = reference(folder)(text, add_special_tokens=False)["input_ids"]
        if name in SILENT and len(turns) > 2:
            assert r.tokenizer.spelled(ids) == r.tokenizer.spelled(whole), name
        else:
            assert ids == whole, name


@every
@pytest.mark.parametrize("case", list(CASES))
def test_the_tokenizers_own_template_is_encoded_as_transformers_does(
    folder: Path, case: str
) -> None:
    if not encoder(folder).data.chat_template:
        return
    r, turns = renderer(folder, "auto"), CASES[case]
    assert isinstance(r.template, ChatTemplate)
    messages = [
        {"role": t.role, "content": f"{t.text}\n{t.input}" if t.input else t.text} for t in turns
    ]
    segments = r.template.examples(Conversation(turns))[-1]
    ids = r.tokenizer.encode(segments, r.end_id).ids.tolist()
    wanted = reference(folder).apply_chat_template(messages, return_dict=False)
    assert ids == wanted or r.template.notes


MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + "
    "' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
OTHERS = {"llama-2": LLAMA2, "mistral": MISTRAL, "chatml": CHATML, "vicuna": VICUNA}


@every
@pytest.mark.parametrize("case", ["one", "two", "many", "backwards"])
@pytest.mark.parametrize("name", list(OTHERS))
def test_other_templates_are_encoded_as_transformers_does(
    folder: Path, name: str, case: str
) -> None:
    """Also those that put a space at the border of a mark, or no control token behind an answer."""
    if "bos_token" in OTHERS[name] and reference(folder).bos_token is None:
        return  # transformers refuses it
    known = replace(encoder(folder).data, chat_template=OTHERS[name])
    r = Renderer(find_template("auto", known), encoder(folder))
    turns = CASES[case]
    segments = r.template.examples(Conversation(turns))[-1]
    ids = r.tokenizer.encode(segments, r.end_id).ids.tolist()
    wanted = reference(folder).apply_chat_template(
        [{"role": t.role, "content": t.text} for t in turns],
        chat_template=OTHERS[name],
        return_dict=False,
    )
    if any(s.kind == "silent_end" for s in segments):
        assert r.tokenizer.spelled(ids) == r.tokenizer.spelled(wanted)
    else:
        assert ids == wanted


@every
@pytest.mark.parametrize("name", [*builtin_templates(), "auto"])
def test_a_sequence_begins_once_and_only_if_the_tokenizer_begins_it(
    folder: Path, name: str
) -> None:
    r = renderer(folder, name)
    bos = reference(folder).bos_token_id
    ids = r.prompt(TURNS[:1])
    if isinstance(r.template, ChatTemplate):
        assert ids[:2].count(bos) <= 1
        return
    begins = reference(folder)("a")["input_ids"][0] == bos and "{bos}" in builtin_templates()[
        r.template.name
    ].get("start", "")
    assert ids.count(bos) == begins


def test_a_word_behind_a_mark_is_one_token_in_sentencepiece() -> None:
    folder = next((f for f in FOLDERS if f.name == "llama2"), None)
    if folder is None:
        pytest.skip("no llama2 tokenizer")
    for name in ("llama2", "mistral"):
        r = renderer(folder, name)
        spelled = [r.tokenizer.token(i) for i in r.prompt([Turn("user", "How are you?")])]
        assert spelled[:6] == ["<s>", "▁[", "INST", "]", "▁How", "▁are"]


@every
def test_what_differs_is_said(folder: Path) -> None:
    for name in ("alpaca", "llama2", "llama3", "chatml", "mistral"):
        assert differences(renderer(folder, name)) == []
