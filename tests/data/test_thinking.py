"""Thoughts: taught as the template renders them, asked for alike, left out where nobody wants them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
from generate_kit import byte_level, vocabulary

from vicuna.data.conversation import Conversation, Turn
from vicuna.data.loss_mask import NO_TARGET
from vicuna.data.templates.base import Template
from vicuna.data.templates.compare_with_original import differences, lines_for, share_of_thoughts
from vicuna.data.templates.registry import find_template, template_from_dict
from vicuna.data.templates.renderer import Renderer
from vicuna.data.tokenizer import Tokenizer, TokenizerData

HEAD = "{%- for m in messages -%}{%- set c = m.content -%}"
OPEN = "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}"
# What today's reasoning models do, in a few lines each.
SPLITS = (
    "{%- set t = '' -%}{%- if m.reasoning_content is string -%}{%- set t = m.reasoning_content -%}"
    "{%- elif '</think>' in c -%}{%- set t = c.split('</think>')[0].split('<think>')[-1] -%}"
    "{%- set c = c.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}"
)
TURN = "{{ '<|im_start|>' + m.role + '\n' }}"
CLOSED = "{{ '<think>\n\n</think>\n\n' }}"
WITH = "{{ '<think>\n' + t.strip('\n') + '\n</think>\n\n' }}"
END = "{{ c + '<|im_end|>\n' }}{%- endfor -%}"
SWITCH = "{%- if enable_thinking is defined and not enable_thinking -%}"
TEMPLATES = {
    # Past thoughts go, an answer without one has an empty block.
    "drops": HEAD + SPLITS + TURN + "{%- if m.role == 'assistant' and loop.last -%}" + WITH
    + "{%- endif -%}" + END + OPEN + SWITCH + CLOSED + "{%- endif -%}{%- endif -%}",
    # Past thoughts stay; thinking only if asked for.
    "keeps": HEAD + SPLITS + TURN + "{%- if t -%}" + WITH + "{%- elif m.role == 'assistant' -%}"
    + CLOSED + "{%- endif -%}" + END + OPEN
    + "{%- if not enable_thinking -%}" + CLOSED + "{%- endif -%}{%- endif -%}",
    # The prompt itself begins the thought.
    "opens": HEAD + SPLITS + TURN + "{%- if t -%}" + WITH + "{%- endif -%}" + END + OPEN
    + "{{ '<think>\n' }}{%- endif -%}",
    # The system prompt says whether there is to be a thought.
    "says": "{{ '<|im_start|>system\n/' + ('no_' if enable_thinking is false else '') "
    "+ 'think<|im_end|>\n' }}" + HEAD + SPLITS + TURN + "{%- if t -%}" + WITH + "{%- endif -%}"
    + END + OPEN + SWITCH + CLOSED + "{%- endif -%}{%- endif -%}",
    # No thoughts are known: they are words.
    "words": HEAD + TURN + END + OPEN + "{%- endif -%}",
}  # fmt: skip


@lru_cache
def words(special: bool = False) -> TokenizerData:
    tokenizer = byte_level()
    marks = ["<think>", "</think>"]
    if special:
        tokenizer.add_special_tokens(marks)
    else:
        tokenizer.add_tokens(marks)
    added = json.loads(tokenizer.to_str())["added_tokens"]
    known = {t["content"]: t["id"] for t in added if t["special"]}
    return replace(vocabulary(tokenizer), special_tokens=known)


def renderer(name: str, special: bool = False, **chosen: Any) -> Renderer:
    known = replace(words(special), chat_template=TEMPLATES.get(name))
    template = find_template("auto" if name in TEMPLATES else name, known)
    return Renderer(template.choose(**chosen), Tokenizer(known))


def rendered(r: Renderer, turns: list[Turn]) -> tuple[str, str]:
    """(what is given, what is learned) of the last example of a conversation."""
    segments = r.template.examples(Conversation(turns), "last")[-1]
    e = r.tokenizer.encode(segments, r.end_id)
    first = int((e.labels != NO_TARGET).argmax()) + 1
    return r.tokenizer.spelled(e.ids[:first]), r.tokenizer.spelled(e.ids[first:])


INLINE = Turn("assistant", "<think>\n想一想\n</think>\n\n好")
BESIDE = Turn("assistant", "好", thought="想一想")
PLAIN = Turn("assistant", "好")
ASKED = Turn("user", "你好")
ASK = "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"
SAYS = "<|im_start|>system\n/think<|im_end|>\n"
EMPTY = "<think>\n\n</think>\n\n"
THOUGHT = "<think>\n想一想\n</think>\n\n好<|im_end|>\n"
CASES = {
    ("drops", "plain"): (ASK + EMPTY, "好<|im_end|>\n"),
    ("drops", "thought"): (ASK, THOUGHT),
    ("keeps", "plain"): (ASK + EMPTY, "好<|im_end|>\n"),
    ("keeps", "thought"): (ASK, THOUGHT),
    ("opens", "plain"): (ASK, "好<|im_end|>\n"),
    ("opens", "thought"): (ASK + "<think>\n", "想一想\n</think>\n\n好<|im_end|>\n"),
    ("says", "thought"): (SAYS + ASK, THOUGHT),
    ("words", "plain"): (ASK, "好<|im_end|>\n"),
    ("words", "thought"): (ASK, THOUGHT),
}


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(("name", "kind"), list(CASES))
def test_auto_goes_by_the_record(name: str, kind: str, special: bool) -> None:
    for answer in [INLINE, BESIDE] if kind == "thought" else [PLAIN]:
        assert rendered(renderer(name, special), [ASKED, answer]) == CASES[name, kind]


def test_an_empty_block_is_given_and_not_learned_whoever_wrote_it() -> None:
    written = Turn("assistant", "<think>\n\n</think>\n\n好")
    r = renderer("drops", thinking="off")
    assert rendered(r, [ASKED, written]) == (ASK + EMPTY, "好<|im_end|>\n")


@pytest.mark.parametrize("name", [*TEMPLATES, "chatml", "alpaca"])
@pytest.mark.parametrize("answer", [INLINE, BESIDE])
def test_off_leaves_thoughts_out(name: str, answer: Turn) -> None:
    r = renderer(name, thinking="off")
    given, learned = rendered(r, [ASKED, answer])
    assert "想" not in given + learned
    assert rendered(r, [ASKED, PLAIN]) == (given, learned)
    assert r.tokenizer.spelled(r.prompt([ASKED])) == given


@pytest.mark.parametrize("name", [*TEMPLATES, "chatml", "alpaca"])
@pytest.mark.parametrize("answer", [INLINE, BESIDE])
def test_on_asks_as_answers_with_a_thought_were_taught(name: str, answer: Turn) -> None:
    r = renderer(name, thinking="on")
    given, learned = rendered(r, [ASKED, answer])
    assert r.tokenizer.spelled(r.prompt([ASKED])) == given
    assert "想一想" in learned


@pytest.mark.parametrize("name", [*TEMPLATES, "chatml", "alpaca"])
@pytest.mark.parametrize("answer", [INLINE, BESIDE])
def test_a_thought_that_is_not_to_be_learned_stands_there_all_the_same(
    name: str, answer: Turn
) -> None:
    given, learned = rendered(renderer(name), [ASKED, answer])
    masked = rendered(renderer(name, thinking_loss=False), [ASKED, answer])
    assert "".join(masked) == given + learned
    assert "想一想" in masked[0]
    assert masked[1].strip().startswith("好")


def test_past_thoughts_stay_or_go_as_the_template_does() -> None:
    turns = [ASKED, BESIDE, ASKED, BESIDE]
    for name, count in (("drops", 1), ("keeps", 2)):
        r = renderer(name)
        examples = r.template.examples(Conversation(turns))
        last = r.spelled(examples[-1])
        assert last.count("想一想") == count
        assert len(examples) == (1 if name == "keeps" else 2)
        assert r.spelled(r.template.choose("on").prompt(turns[:-1])).count("想一想") == count - 1


@pytest.mark.parametrize("name", list(TEMPLATES))
@pytest.mark.parametrize("thinking", ["auto", "on", "off"])
def test_a_prompt_is_a_prefix_of_what_was_taught_with_it(name: str, thinking: Any) -> None:
    r = renderer(name, thinking=thinking)
    turns = [Turn("system", "短"), ASKED, BESIDE, ASKED, INLINE if thinking == "on" else PLAIN]
    prompt = r.prompt(turns[:-1])
    (segments,) = r.template.examples(Conversation(turns), "last")
    ids = r.tokenizer.encode(segments, r.end_id).ids.tolist()
    wanted = thinking != "auto" or name not in ("drops", "opens", "says")
    assert not wanted or ids[: len(prompt)] == prompt


# -- remembered ----


@pytest.mark.parametrize("name", [*TEMPLATES, "alpaca"])
@pytest.mark.parametrize("thinking", ["auto", "on", "off"])
def test_a_saved_template_asks_alike(name: str, thinking: Any) -> None:
    r = renderer(name, thinking=thinking, thinking_loss=False)
    again = template_from_dict(json.loads(json.dumps(r.template.to_dict())))
    assert (again.thinking, again.thinking_loss) == (thinking, False)
    assert again.digest == renderer(name).template.digest
    assert again.prompt([ASKED]) == r.template.prompt([ASKED])


def test_a_template_saved_by_an_older_version_asks_as_it_did() -> None:
    """It was always asked with `enable_thinking` false."""
    saved = renderer("drops").template.to_dict()
    saved.pop("thinking")
    old: Template = template_from_dict(saved)
    assert renderer("drops").spelled(old.prompt([ASKED])) == ASK + EMPTY
    assert old.digest == renderer("drops").template.digest


def test_the_base_alone_is_asked_as_its_template_has_it() -> None:
    for name, wanted in (("drops", ASK), ("keeps", ASK + EMPTY), ("opens", ASK + "<think>\n")):
        r = renderer(name)
        assert r.tokenizer.spelled(r.prompt([ASKED])) == wanted


def test_the_marks_are_those_of_the_template() -> None:
    for name in ("drops", "keeps", "says", "words"):
        marks = renderer(name, thinking="on").template.thought_marks()
        assert (marks.open.strip(), marks.close.strip()) == ("<think>", "</think>")
        assert not marks.opened
    assert renderer("opens", thinking="on").template.thought_marks().opened
    assert not renderer("opens", thinking="off").template.thought_marks().opened


# -- said ----


def encoded(r: Renderer, *answers: Turn) -> list[Any]:
    rows = [s for a in answers for s in r.template.examples(Conversation([ASKED, a]))]
    return r.tokenizer.encode_many(rows, r.end_id)


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_thoughts_are_counted(name: str) -> None:
    r = renderer(name)
    assert share_of_thoughts(encoded(r, PLAIN, BESIDE, PLAIN, INLINE), r) == 0.5
    assert share_of_thoughts(encoded(r, PLAIN), r) == 0


def test_what_a_template_has_no_place_for_is_said_where_it_matters() -> None:
    r = renderer("words")
    assert differences(r) == []
    assert lines_for(r, encoded(r, PLAIN)) == []
    assert any("no place" in line for line in lines_for(r, encoded(r, BESIDE)))
    assert differences(renderer("drops"), thoughts=True) == []
    assert any("<think>" in line for line in differences(renderer("opens")))


def test_a_system_prompt_in_the_last_question_is_taught_and_said() -> None:
    """The template's own rendering of a whole conversation leaves it out."""
    source = (
        "{%- if messages[0].role == 'system' -%}{%- set s = messages[0].content -%}"
        "{%- set messages = messages[1:] -%}{%- else -%}{%- set s = '' -%}{%- endif -%}"
        "{%- for m in messages -%}{{ '<|im_start|>' + (s if loop.last and m.role == 'user' else '')"
        " + m.content + '<|im_end|>' }}{%- endfor -%}"
    )
    known = replace(words(), chat_template=source)
    r = Renderer(find_template("auto", known), Tokenizer(known))
    turns = [Turn("system", "短"), ASKED, PLAIN]
    assert rendered(r, turns)[0].startswith("<|im_start|>短你好<|im_end|>")
    assert any("follows the prompt" in note for note in r.template.notes)
    assert any("follows the prompt" in line for line in differences(r))


def test_an_answer_that_the_template_would_cut_up_is_taught_whole_and_told() -> None:
    r = renderer("drops")
    inside = Turn("assistant", "标记是 </think> 这个")
    given, learned = rendered(r, [ASKED, inside])
    assert (given, learned) == (ASK + EMPTY, "标记是 </think> 这个<|im_end|>\n")
    assert "for a thought" in r.template.oddity
    rendered(r, [ASKED, INLINE])
    assert not r.template.oddity


# -- the day ----

DAY = "{{ '<|im_start|>system\n' + strftime_now('%d %B %Y') + '<|im_end|>\n' }}" + HEAD + TURN
DAY += END + OPEN + "{%- endif -%}"


def test_the_day_is_kept_with_the_template(monkeypatch: pytest.MonkeyPatch) -> None:
    import datetime

    known = replace(words(), chat_template=DAY)
    template = find_template("auto", known)
    assert template.date == datetime.date.today().isoformat()
    saved = {**template.to_dict(), "date": "2024-02-29"}
    later = template_from_dict(saved)
    assert later.to_dict()["date"] == "2024-02-29"
    assert "29 February 2024" in Renderer(later, Tokenizer(known)).spelled(later.prompt([ASKED]))
    assert later.digest == template.digest
    assert "date" not in renderer("drops").template.to_dict()


def test_generation_marks_change_nothing() -> None:
    marked = re.sub(r"\{\{ c \+", "{% generation %}{{ c +", TEMPLATES["words"])
    marked = marked.replace("<|im_end|>\n' }}", "<|im_end|>\n' }}{% endgeneration %}", 1)
    known = replace(words(), chat_template=marked)
    r = Renderer(find_template("auto", known), Tokenizer(known))
    assert rendered(r, [ASKED, PLAIN]) == CASES["words", "plain"]
