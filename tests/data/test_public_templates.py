"""What is taught in the chat templates of this world is what `apply_chat_template` says, whole.

The templates are read from the installed `trl` wheel (a requirement of the tests; nothing of it is
imported).
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from generate_kit import byte_level, vocabulary

from vicuna.data.conversation import Conversation, Turn
from vicuna.data.loss_mask import NO_TARGET
from vicuna.data.templates.chat_template import ChatTemplate
from vicuna.data.templates.registry import find_template
from vicuna.data.templates.renderer import Renderer
from vicuna.data.tokenizer import Tokenizer

BOS, EOS = "<s>", "</s>"
# Added tokens that tokenizers do not mark special.
TEXT = re.compile(r"</?(think|tool_call|tool_response|tools|tool|function|parameter|image)")


def folder() -> Path | None:
    spec = find_spec("trl")
    places = list(spec.submodule_search_locations or []) if spec else []
    found = [Path(p) / "chat_templates" for p in places]
    return next((p for p in found if p.is_dir()), None)


FOLDER = folder()
PATHS = sorted(FOLDER.glob("*.jinja")) if FOLDER else []
if not PATHS and os.environ.get("CI"):
    raise RuntimeError("trl is not installed: pip install --no-deps trl")
every = pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)


@lru_cache
def tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    marks: set[str] = set()
    for path in PATHS:
        text = path.read_text("utf-8")
        marks.update(
            re.findall(r"<\|[a-zA-Z_]+\|?>|<[a-zA-Z]+\|>|<｜[^｜]+｜>|</?[a-z_]+_turn>", text)
        )
    words = byte_level()
    words.add_special_tokens(sorted(m for m in marks if not TEXT.match(m)))
    words.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=BOS, eos_token=EOS, pad_token=EOS
    )


@lru_cache
def renderer(path: Path, thinking: Any = "auto") -> Renderer:
    backend = tokenizer().backend_tokenizer
    known = vocabulary(backend)
    special = {
        t["content"]: t["id"]
        for t in __import__("json").loads(backend.to_str())["added_tokens"]
        if t["special"]
    }
    known = replace(known, chat_template=path.read_text("utf-8"), special_tokens=special)
    return Renderer(find_template("auto", known).choose(thinking), Tokenizer(known))


def messages(turns: list[Turn], in_parts: bool) -> list[dict[str, Any]]:
    found = []
    for t in turns:
        content: Any = [{"type": "text", "text": t.text}] if in_parts else t.text
        message = {"role": t.role, "content": content}
        if t.thought:
            message.update(reasoning_content=t.thought, reasoning=t.thought, thinking=t.thought)
        found.append(message)
    return found


ONE = [Turn("user", "How are you? 你好吗？"), Turn("assistant", "很好。I am fine.")]
TWO = [*ONE, Turn("user", "1234 + 5 = ?\n\n算一下"), Turn("assistant", "1239")]
SYSTEM = [Turn("system", "你是诗人。Be short."), *TWO]
EDGES = [
    Turn("user", "  \n两边有空白 \"引号\" <b> & \\n 'x'\n\n  第二行 \n"),
    Turn("assistant", "\n\n好的 \n"),
    Turn("user", "再来\n"),
    Turn("assistant", "  {'a': \"b\"}  "),
]
CODE = [Turn("user", "</s 和 </thin 与 {{ x }} {% if %}"), Turn("assistant", "```\na\n\nb\n```\n")]
PLAIN = {"one": ONE, "two": TWO, "system": SYSTEM, "edges": EDGES, "code": CODE}
INLINE = [
    Turn("user", "五加二等于几？"),
    Turn("assistant", "<think>\n五加二是七。\n</think>\n\n等于七。"),
    Turn("user", "再加一呢？"),
    Turn("assistant", "<think>\n七加一是八。\n</think>\n\n等于八。"),
]
BESIDE = [
    Turn("user", "五加二等于几？"),
    Turn("assistant", "等于七。", thought="五加二是七。"),
    Turn("user", "再加一呢？"),
    Turn("assistant", "等于八。", thought="七加一是八。"),
]
THOUGHTS = {"inline": INLINE, "beside": BESIDE}


def reference(template: ChatTemplate, turns: list[Turn], **options: Any) -> list[int]:
    if template._renderings.merges and turns[0].role == "system":
        turns = [Turn("user", f"{turns[0].text}\n\n{turns[1].text}"), *turns[2:]]
    ids: list[int] = tokenizer().apply_chat_template(
        messages(turns, template._renderings.in_parts),
        chat_template=template.source,
        return_dict=False,
        **options,
    )
    return ids


def taught(r: Renderer, turns: list[Turn]) -> list[Any]:
    return r.tokenizer.encode_many(r.template.examples(Conversation(turns)), r.end_id)


@every
@pytest.mark.parametrize("case", list(PLAIN))
def test_conversations_are_taught_as_transformers_renders_them(path: Path, case: str) -> None:
    r, turns = renderer(path), PLAIN[case]
    example = taught(r, turns)[-1]
    flags = [{}, {"enable_thinking": False, "thinking": False}]
    wanted = [reference(r.template, turns, **flag) for flag in flags]
    if example.ids.tolist() not in wanted:
        assert r.template.notes, (
            tokenizer().decode(example.ids.tolist()),
            tokenizer().decode(wanted[0]),
        )


@every
@pytest.mark.parametrize("case", list(THOUGHTS))
def test_thoughts_are_taught_as_transformers_renders_them(path: Path, case: str) -> None:
    r, turns = renderer(path), THOUGHTS[case]
    example = taught(r, turns)[-1]
    flags = [{}, {"enable_thinking": True, "thinking": True}]
    wanted = [reference(r.template, turns, **flag) for flag in flags]
    learned = example.ids[1:][example.labels[:-1] != NO_TARGET].tolist()
    assert "七加一是八。" in r.tokenizer.decode(learned)
    if example.ids.tolist() not in wanted:
        assert r.template.notes, (
            tokenizer().decode(example.ids.tolist()),
            tokenizer().decode(wanted[0]),
        )
