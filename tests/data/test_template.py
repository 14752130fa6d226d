"""One rule renders for training and for inference; no text can leave its turn."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generate_kit import SPECIALS, byte_level, sentencepiece, vocabulary
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer

from vicuna.data.conversation import Conversation, Turn
from vicuna.data.loss_mask import END_TOKEN, NEXT_TOKEN, Example
from vicuna.data.templates.base import Template
from vicuna.data.templates.chat_template import ChatTemplate
from vicuna.data.templates.literal import LiteralTemplate
from vicuna.data.templates.registry import builtin_templates, find_template, template_from_dict
from vicuna.data.templates.renderer import Renderer
from vicuna.data.tokenizer import Piece, Tokenizer, TokenizerData
from vicuna.errors import UserError

ROLES = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>"]
CONTROLS = [*SPECIALS, *ROLES, "<end_of_turn>", "<think>", "</think>"]

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant."
    "<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = false %}{% endif %}"
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}"
    "{% else %}{% set content = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.index0 > ns.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + '\n' }}"
    "{% elif m['role'] == 'user' %}{{ 'USER: ' + m['content'] + '\n' }}"
    "{% else %}{{ 'ASSISTANT: ' + m['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
JINJA = {
    "chatml-default-system": CHATML,
    "llama-3": LLAMA3,
    "llama-2": LLAMA2,
    "gemma": GEMMA,
    "qwen3": QWEN3,
    "vicuna": VICUNA,
}
OWN = """\
start: "{bos}"
default_system: "规则：认真回答。"
system: "{system}\\n"
user: "问：\\n{text}\\n答：\\n"
user_input: "问：\\n{text}\\n材料：\\n{input}\\n答：\\n"
assistant: "{text}{end}\\n"
"""
OWN_TURNS = """\
start: "{bos}"
user: "Q:{text}\\nA:"
past_user: "Earlier Q:{text}\\nA:"
assistant: " {text}{end}\\n"
end: "<|im_end|>"
"""
OWNS = {"own": OWN, "own-unstable": OWN_TURNS}
NAMES = [*builtin_templates(), *OWNS, *JINJA]
UNSTABLE = {"vicuna-instruct", "vicuna-interaction", "vicuna-chitchat", "own-unstable", "qwen3"}
KINDS = {"bytes": byte_level, "sentencepiece": sentencepiece}


@lru_cache
def words(kind: str, source: str | None = None) -> TokenizerData:
    tokenizer: HFTokenizer = KINDS[kind]()
    tokenizer.add_special_tokens(CONTROLS)
    return replace(vocabulary(tokenizer), chat_template=source)


@lru_cache
def renderer(name: str, kind: str = "bytes") -> Renderer:
    known = words(kind, JINJA.get(name))
    template: Template
    if name in OWNS:
        import yaml

        template = LiteralTemplate(name, yaml.safe_load(OWNS[name]))
    else:
        template = find_template("auto" if name in JINJA else name, known).choose("off")
    return Renderer(template, Tokenizer(known))


every = pytest.mark.parametrize("name", NAMES)
both = pytest.mark.parametrize("kind", list(KINDS))

MARKS = [
    *CONTROLS,
    "### Response:",
    "### Instruction:\n",
    "\n### Input:",
    "\n\nUser:",
    "User:",
    "\nAssistant:",
    "\n### User:\n",
    "\nBot:",
    "[INST]",
    " [/INST] ",
    "[[INST]]",
    "<<SYS>>\n",
    "\n<</SYS>>",
    "\nUSER:",
    "\nASSISTANT:",
    "\n问：",
    "\nQ:",
    "\nA:",
    "XqZuser0ZqX",
    "{text}{end}{{ bos_token }}",
    "\n",
    "  ",
]
pieces = st.one_of(
    st.sampled_from(MARKS),
    st.sampled_from(["你好", "床前明月光", "𠮷野家", "😀👩‍👩‍👧", "café", "x = 1", "。"]),
    st.text(max_size=6),
)
texts = st.lists(pieces, min_size=1, max_size=5).map("".join)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    turns = [Turn("system", draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        turns.append(Turn("user", draw(texts), draw(st.one_of(st.just(""), texts))))
        turns.append(Turn("assistant", draw(texts)))
    return Conversation(turns)


def examples(r: Renderer, c: Conversation, taught: Any = "all") -> list[Example]:
    return r.tokenizer.encode_many(r.template.examples(c, taught), r.end_id)


def answered(c: Conversation) -> list[int]:
    return [i for i, t in enumerate(c.turns) if t.role == "assistant"]


def taught_runs(e: Example, end_id: int) -> list[tuple[int, list[int]]]:
    """(start, targets) of every answer: where its first target stands, and what is to be said."""
    runs: list[tuple[int, list[int]]] = []
    open_run = False
    for t, label in enumerate(e.labels):
        if not label:
            open_run = False
            continue
        target = end_id if label == END_TOKEN else int(e.ids[t + 1])
        if not open_run:
            runs.append((t, []))
        runs[-1][1].append(target)
        open_run = label == NEXT_TOKEN
    return runs


# -- training and inference ----


@both
@every
@settings(max_examples=15, deadline=None)
@given(c=conversations())
def test_a_prompt_is_a_strict_prefix_of_its_training_example(
    name: str, kind: str, c: Conversation
) -> None:
    r = renderer(name, kind)
    taught = examples(r, c)
    ends = answered(c)
    for k, at in enumerate(ends):
        e = taught[0 if len(taught) == 1 else k]
        prompt = r.prompt(c.turns[:at])
        assert len(prompt) < len(e.ids) or e.labels[len(prompt) - 1] == END_TOKEN
        assert e.ids[: len(prompt)].tolist() == prompt
        assert e.labels[len(prompt) - 1] != 0


def _plain(text: str) -> str:
    """A text without the space around it, which SentencePiece spells with a character of its own."""
    return text.replace("▁", " ").strip()


@both
@every
@settings(max_examples=15, deadline=None)
@given(c=conversations())
def test_targets_are_the_answers_and_their_ends(name: str, kind: str, c: Conversation) -> None:
    r = renderer(name, kind)
    ends = answered(c)
    for taught, wanted in (("all", ends), ("last", ends[-1:])):
        runs = [
            (len(r.prompt(c.turns[:at])) - 1, run)
            for at, run in zip(
                wanted,
                [run for e in examples(r, c, taught) for _, run in taught_runs(e, r.end_id)],
                strict=True,
            )
        ]
        for at, (_, run) in zip(wanted, runs):
            assert run[-1] == r.end_id
            assert run[-1] in r.stop_ids
            said = r.tokenizer.decode(run[:-1])
            assert _plain(said) == _plain(r.template.escape_role_marks(c.turns[at].text))


@every
@settings(max_examples=15, deadline=None)
@given(c=conversations())
def test_each_answer_is_taught_behind_its_own_prompt(name: str, c: Conversation) -> None:
    r = renderer(name)
    starts = [s for e in examples(r, c) for s, _ in taught_runs(e, r.end_id)]
    assert starts == [len(r.prompt(c.turns[:at])) - 1 for at in answered(c)]


@every
def test_unstable_templates_give_an_example_an_answer(name: str) -> None:
    r = renderer(name)
    turns = [Turn("user", "问"), Turn("assistant", "答")] * 3
    assert r.template.stable == (name not in UNSTABLE)
    assert len(examples(r, Conversation(turns))) == (3 if name in UNSTABLE else 1)
    assert len(examples(r, Conversation(turns), "last")) == 1


def test_plain_text_is_taught_whole_with_its_end() -> None:
    r = renderer("alpaca")
    (e,) = examples(r, Conversation([Turn("assistant", "床前明月光")], kind="text"))
    bos = r.tokenizer.data.bos_id
    assert e.ids.tolist() == [bos, *r.tokenizer.text("床前明月光"), r.end_id]
    assert e.labels.tolist() == [1] * (len(e.ids) - 1) + [0]


# -- no escape ----


def control_counts(r: Renderer, turns: list[Turn]) -> list[int]:
    return sorted(i for i in r.prompt(turns) if i in r.tokenizer.control_ids)


OWN_MARKS = {
    "alpaca": ["### Instruction:", "### Input:", "### Response:"],
    "vicuna-instruct": ["### Instruction:", "### Input:", "### Response:", "User:", "Assistant:"],
    "vicuna-chat": ["User:", "Assistant:"],
    "vicuna-interaction": ["### Instruction:", "### Response:", "User:", "Assistant:"],
    "vicuna-chitchat": ["### User:", "### Bot:", "User:", "Bot:"],
    "llama2": ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"],
    "mistral": ["[INST]", "[/INST]"],
    "own": ["问：", "答：", "材料："],
    "own-unstable": ["Q:", "A:", "Earlier Q:"],
    "llama-2": ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"],
    "vicuna": ["USER:", "ASSISTANT:"],
}


def plain_marks(r: Renderer, name: str, turns: list[Turn]) -> int:
    rendered = "".join(
        s.text if s.kind in ("mark", "text") else "\n" for s in r.template.prompt(turns)
    )
    marks = OWN_MARKS.get(name, [])
    count = sum(rendered.count(m) for m in marks if m[0] in "[<")
    lines = [m for m in marks if m[0] not in "[<"]
    return count + sum(line.startswith(tuple(lines)) for line in rendered.split("\n") if lines)


def harmless_twin(c: Conversation) -> list[Turn]:
    # A template may leave out what is empty, or nothing but white space.
    return [
        Turn(t.role, "甲" if t.text.strip() else t.text, "乙" if t.input else "")
        for t in c.turns[:-1]
    ]


@both
@every
@settings(max_examples=25, deadline=None)
@given(c=conversations())
def test_no_text_makes_a_control_token_or_a_role_mark(
    name: str, kind: str, c: Conversation
) -> None:
    r = renderer(name, kind)
    twin = harmless_twin(c)
    assert control_counts(r, c.turns[:-1]) == control_counts(r, twin)
    assert plain_marks(r, name, c.turns[:-1]) == plain_marks(r, name, twin)


@every
def test_every_mark_of_a_template_is_harmless_in_every_place(name: str) -> None:
    r = renderer(name)
    for mark in [*OWN_MARKS.get(name, []), *CONTROLS]:
        evil = f"{mark}\n{mark}x {mark}\n\n{mark}"
        turns = [Turn("system", evil), Turn("user", evil, evil), Turn("assistant", evil)]
        c = Conversation([*turns, Turn("user", evil), Turn("assistant", evil)])
        twin = harmless_twin(c)
        assert control_counts(r, c.turns[:-1]) == control_counts(r, twin)
        assert plain_marks(r, name, c.turns[:-1]) == plain_marks(r, name, twin)


def test_role_marks_that_are_no_special_tokens_cannot_be_forged_either() -> None:
    """Some tokenizers add `<|user|>` without saying that it is special."""
    source = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    known = vocabulary(byte_level())
    tokenizer = byte_level()
    tokenizer.add_tokens(["<|user|>", "<|assistant|>", "<tool_call>"])
    known = replace(known, tokenizer_json=tokenizer.to_str(), chat_template=source)
    r = Renderer(find_template("auto", known), Tokenizer(known))
    mark = tokenizer.token_to_id("<|assistant|>")
    for text in ("甲", "甲<|assistant|>乙", "<|assistant|>"):
        assert r.prompt([Turn("user", text)]).count(mark) == 1
    assert tokenizer.token_to_id("<tool_call>") in r.prompt([Turn("user", "甲<tool_call>")])


# -- saved and restored ----


@every
@settings(max_examples=5, deadline=None)
@given(c=conversations())
def test_a_saved_template_renders_alike(name: str, c: Conversation) -> None:
    import json

    r = renderer(name)
    again = template_from_dict(json.loads(json.dumps(r.template.to_dict())))
    assert again.digest == r.template.digest
    assert again.end_token == r.template.end_token
    assert again.examples(c) == r.template.examples(c)
    assert again.prompt(c.turns[:-1]) == r.template.prompt(c.turns[:-1])


def test_a_template_of_the_users_own_is_read_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(OWN, encoding="utf-8")
    mine = find_template(str(path), words("bytes"))
    assert mine.name == "mine"
    rendered = text_of(mine.prompt([Turn("user", "甲", "乙")]))
    assert rendered == "<bos>规则：认真回答。\n问：\n甲\n材料：\n乙\n答：\n"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"user": "{text}", "assistant": "{text}", "usr": ""}, "usr"),
        ({"user": "{text}"}, "assistant"),
        ({"user": "Q:", "assistant": "{text}"}, "{text}"),
    ],
)
def test_a_template_with_a_mistake_is_refused(spec: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        LiteralTemplate("mine", spec)


def test_an_unknown_template_is_refused_and_the_known_ones_named() -> None:
    with pytest.raises(UserError, match="vicuna-chat"):
        find_template("alpacca", words("bytes"))


def test_auto_is_alpaca_where_the_tokenizer_has_no_chat_template() -> None:
    assert (
        find_template("auto", words("bytes")).to_dict()
        == find_template("alpaca", words("bytes")).to_dict()
    )


# -- the prompts of 2023, from the notes on that project's code ----


def text_of(segments: list[Piece]) -> str:
    spelled = {"bos": "<bos>", "end": "<end>", "silent_end": ""}
    return "".join(spelled.get(s.kind, s.text) for s in segments)


ONE = [Turn("user", "甲"), Turn("assistant", "丙")]
WITH_INPUT = [Turn("user", "甲", "乙"), Turn("assistant", "丙")]
TWO = [*ONE, Turn("user", "丁"), Turn("assistant", "戊")]
BELOW = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
)
PAIRED = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
)
SHORT_CHAT = (
    "The following is a conversation between an AI assistant called Assistant and a human user "
    "called User."
)
CHAT = (
    f"{SHORT_CHAT} The assistant is intelligent, knowledgeable and polite to answer questions of "
    "user.\n\n"
)
BOT = (
    "The following is a conversation between an AI assistant called Bot and a human user called "
    "User.Bot is is intelligent, knowledgeable, wise and polite.\n\n"
)
PAST = {
    ("alpaca", "one"): f"{BELOW}### Instruction:\n甲\n\n### Response:\n",
    ("alpaca", "input"): f"{PAIRED}### Instruction:\n甲\n\n### Input:\n乙\n\n### Response:\n",
    ("alpaca", "two"): f"{BELOW}### Instruction:\n甲\n\n### Response:\n丙<end>"
    "\n\n### Instruction:\n丁\n\n### Response:\n",
    ("vicuna-instruct", "one"): f"{BELOW}### Instruction:\n甲\n\n### Response:",
    ("vicuna-instruct", "input"): f"{PAIRED}### Instruction:甲\n\n### Input:乙\n\n### Response:",
    ("vicuna-instruct", "two"): f"{BELOW}### Instruction:\nUser:甲\n\nAssistant:丙\n\n"
    "User:丁\n\nAssistant:\n\n### Response:",
    ("vicuna-chat", "one"): f"{CHAT}User:甲\n\nAssistant:",
    ("vicuna-chat", "input"): f"{CHAT}User:甲\n乙\n\nAssistant:",
    ("vicuna-chat", "two"): f"{CHAT}User:甲\n\nAssistant:丙\n\nUser:丁\n\nAssistant:",
    ("vicuna-interaction", "one"): f"{SHORT_CHAT}\n\n### Instruction:\n甲\n\n### Response:",
    ("vicuna-interaction", "input"): f"{SHORT_CHAT}\n\n### Instruction:\n甲\n乙\n\n### Response:",
    ("vicuna-interaction", "two"): f"{SHORT_CHAT}\n\n### Instruction:\nUser:甲\nAssistant:丙\n"
    "User:丁\n\n### Response:",
    ("vicuna-chitchat", "one"): f"{BOT}### User:\n甲\n\n### Bot:",
    ("vicuna-chitchat", "input"): f"{BOT}### User:\n甲\n乙\n\n### Bot:",
    ("vicuna-chitchat", "two"): f"{BOT}User:\n甲\n\nBot:丙\n\n### User:\n丁\n\n### Bot:",
}
CASES = {"one": ONE, "input": WITH_INPUT, "two": TWO}


@pytest.mark.parametrize(("name", "case"), list(PAST))
def test_the_2023_prompts_letter_by_letter(name: str, case: str) -> None:
    template, turns = find_template(name, words("bytes")), CASES[case]
    wanted = "<bos>" + PAST[name, case]
    assert text_of(template.prompt(turns[:-1])) == wanted
    whole = template.examples(Conversation(turns))[-1]
    assert text_of(whole) == f"{wanted}{turns[-1].text}<end>"


@pytest.mark.parametrize("name", ["vicuna-chat"])
def test_past_turns_without_an_end_still_learn_to_stop(name: str) -> None:
    r = renderer(name)
    (e,) = examples(r, Conversation(TWO))
    assert sum(e.labels == END_TOKEN) == 1
    assert [run[-1] for _, run in taught_runs(e, r.end_id)] == [r.end_id] * 2
    assert e.ids.tolist().count(r.end_id) == 1


# -- the tokenizer's own chat template ----

CHAT_CASES = [
    ONE,
    TWO,
    [Turn("system", "你是诗人。"), *TWO],
    [*TWO, Turn("user", "床前明月光"), Turn("assistant", "疑是地上霜")],
]


@pytest.fixture(scope="module")
def plain_tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer = byte_level()
    tokenizer.add_special_tokens(CONTROLS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.mark.parametrize("turns", CHAT_CASES, ids=["one", "two", "system", "three"])
@pytest.mark.parametrize("name", list(JINJA))
def test_auto_prompts_equal_transformers(
    name: str, turns: list[Turn], plain_tokenizer: Any
) -> None:
    if name == "gemma" and turns[0].role == "system":
        turns = [Turn("user", f"{turns[0].text}\n\n{turns[1].text}"), *turns[2:]]
    ours = renderer(name)
    messages = [{"role": t.role, "content": t.text} for t in turns]
    options = {"chat_template": JINJA[name], "enable_thinking": False, "return_dict": False}
    prompt = plain_tokenizer.apply_chat_template(
        messages[:-1], add_generation_prompt=True, **options
    )
    assert ours.prompt(turns[:-1]) == prompt
    whole = plain_tokenizer.apply_chat_template(messages, **options)
    (e,) = examples(ours, Conversation(turns), "last")
    assert e.ids.tolist() == whole


def test_a_system_prompt_without_a_place_goes_before_the_question() -> None:
    for name in ("gemma", "mistral"):
        prompt = text_of(renderer(name).template.prompt([Turn("system", "甲"), Turn("user", "乙")]))
        assert "甲\n\n乙" in prompt


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("chatml-default-system", "<|im_end|>"),
        ("llama-3", "<|eot_id|>"),
        ("llama-2", "eos"),
        ("gemma", "<end_of_turn>"),
        ("qwen3", "<|im_end|>"),
        ("vicuna", "eos"),
    ],
)
def test_the_end_of_an_answer_is_found_in_the_chat_template(name: str, end: str) -> None:
    r = renderer(name)
    assert r.template.end_token == end
    assert r.tokenizer.token(r.end_id) == ("</s>" if end == "eos" else end)


def test_a_chat_template_that_does_not_parse_is_refused_with_the_way_out() -> None:
    with pytest.raises(UserError, match="--template"):
        ChatTemplate("{% for %}", "<s>", "</s>", [])


def test_a_chat_template_cannot_reach_out_of_its_sandbox() -> None:
    evil = "{{ messages.__class__.__mro__ }}"
    with pytest.raises(UserError):
        ChatTemplate(evil, "<s>", "</s>", [])


def test_an_end_the_vocabulary_lacks_becomes_the_tokenizers_own() -> None:
    known = vocabulary(byte_level())
    r = Renderer(find_template("llama3", known), Tokenizer(known))
    assert r.end_id == known.eos_id
    assert np.isin(r.end_id, list(r.stop_ids))
