"""Records of every format, and of every kind of damage met in the wild, become what is promised."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vicuna.data.conversation import Parsed, Problem, Raw
from vicuna.data.records import field_names, reasons
from vicuna.data.records.formats import parse

Q, A = "天空为什么是蓝的？", "因为空气把蓝光散射得更多。"
Q2, A2 = "那晚霞呢？", "路程更长，蓝光散尽了。"


def of(value: Any, line: int = 1) -> Parsed:
    return parse(Raw(line, json.dumps(value, ensure_ascii=False)))


def turns(parsed: Parsed) -> list[tuple[str, str]]:
    assert parsed.conversation is not None, parsed.problems
    return [(t.role, t.text) for t in parsed.conversation.turns]


def pair(value: Any) -> tuple[str, str]:
    (user, question), (assistant, answer) = turns(of(value))
    assert (user, assistant) == ("user", "assistant")
    return question, answer


def brief(parsed: Parsed) -> list[tuple[str, str, str]]:
    return [(p.field, p.reason.split(": ")[0], p.action) for p in parsed.problems]


def dropped(parsed: Parsed) -> tuple[str, str]:
    assert parsed.conversation is None
    (problem,) = parsed.problems
    assert problem.action == "dropped"
    return problem.field, problem.reason.split(": ")[0]


def alpaca(**changes: Any) -> dict[str, Any]:
    return {"instruction": Q, "input": "", "output": A} | changes


def said(*roles_and_words: str, key: str = "conversations") -> dict[str, Any]:
    items = zip(roles_and_words[::2], roles_and_words[1::2])
    return {key: [{"from": role, "value": words} for role, words in items]}


# Formats


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (alpaca(), "alpaca"),
        ({"input": [Q], "output": [A]}, "chat"),
        ({"history": [[Q, A]]}, "history"),
        (said("human", Q, "gpt", A), "sharegpt"),
        (said("问", Q, "答", A, key="dialog"), "sharegpt"),
        (said("USER", Q, "Assistant", A, key="items"), "sharegpt"),
        ({"conversation": [{"human": Q, "assistant": A}]}, "sharegpt"),
        (
            {"messages": [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]},
            "messages",
        ),
        ([{"role": "user", "content": Q}, {"role": "assistant", "content": A}], "messages"),
        ({"prompt": Q, "response": A}, "pair"),
        ({"question": Q, "answer": A}, "pair"),
        ({"query": Q, "response": A, "history": []}, "pair"),
        ({"context": Q, "target": A}, "pair"),
        ({"instruction": Q, "response": A}, "pair"),
        ({"input": Q, "output": A}, "pair"),
        ({"Prompt": Q, "Completion ": A}, "pair"),
        ({"问题": Q, "回答": A, "来源": "百科"}, "pair"),
    ],
)
def test_every_format_gives_the_same_conversation(value: Any, name: str) -> None:
    parsed = of(value)
    assert parsed.format == name
    assert turns(parsed) == [("user", Q), ("assistant", A)]
    assert all(p.action == "warned" for p in parsed.problems)


def test_text_is_one_assistant_turn() -> None:
    parsed = of({"text": f" {Q}\n{A}\n", "source": "百科"}, line=7)
    assert parsed.format == "text"
    assert parsed.conversation is not None
    assert (parsed.conversation.kind, parsed.conversation.line) == ("text", 7)
    assert turns(parsed) == [("assistant", f"{Q}\n{A}")]
    assert dropped(of({"text": " "})) == ("text", reasons.EMPTY_TEXT)
    assert dropped(of({"text": None})) == ("text", reasons.NO_TEXT)


def test_input_of_an_instruction_stays_apart() -> None:
    parsed = of(alpaca(input="材料"))
    assert parsed.conversation is not None
    assert parsed.conversation.turns[0].input == "材料"
    assert turns(of({"instruction": Q, "context": "材料", "response": A}))[0] == ("user", Q)
    moved = of(alpaca(instruction="", input=Q))
    assert turns(moved)[0] == ("user", Q)
    assert brief(moved) == [("input", reasons.QUESTION_FROM_INPUT, "repaired")]


def test_system_turn() -> None:
    system = ("system", "你是助手。")
    assert turns(of(alpaca(system="你是助手。")))[0] == system
    assert turns(of(said("system", "你是助手。", "human", Q, "gpt", A)))[0] == system
    assert turns(of(alpaca(system=" ")))[0] == ("user", Q)


def test_history_in_both_shapes() -> None:
    whole = [("user", Q), ("assistant", A), ("user", Q2), ("assistant", A2)]
    for earlier in ([[Q, A]], [{"input": Q, "output": A}], json.dumps([[Q, A]])):
        assert turns(of({"history": earlier, "input": Q2, "output": A2})) == whole
        assert turns(of({"history": earlier, "instruction": Q2, "input": "", "output": A2})) == (
            whole
        )
    saved = {
        "history": [{"input": Q, "output": A}, {"input": Q2, "output": A2}],
        "generation_parameter": {"temperature": 1.0},
        "info": {},
    }
    assert turns(of(saved)) == whole
    assert dropped(of({"history": [], "info": {}}))[1] == reasons.EMPTY_CONVERSATION


def test_content_in_parts_is_joined() -> None:
    parts = [{"type": "text", "text": "天空"}, {"type": "text", "text": "为何蓝？"}]
    value = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": A}]}
    assert pair(value) == ("天空\n为何蓝？", A)
    parts.append({"type": "image_url", "image_url": "x"})  # type: ignore[dict-item]
    assert dropped(of(value)) == ("messages[0].content", reasons.MEDIA)


def test_unknown_format_names_the_keys() -> None:
    assert dropped(of({"标题": "一", "url": "x"})) == ("标题, url", reasons.UNKNOWN_FORMAT)
    assert len(dropped(of({f"key{i}": i for i in range(99)}))[0]) <= 60
    for value in (3, "文", None, [], [1, 2], True):
        assert dropped(of(value))[1] == reasons.UNKNOWN_FORMAT


def test_a_single_answer_in_a_list_is_that_answer() -> None:
    assert pair(alpaca(output=[A])) == (Q, A)


# The kinds of damage, in the order of the malformed files (1 to 5, 8, 15, 16: the reader's)


def test_missing_and_null_answers() -> None:
    assert dropped(of({"instruction": Q, "input": ""})) == ("output", reasons.NO_ANSWER)
    assert dropped(of(alpaca(output=None))) == ("output", reasons.NO_ANSWER)
    assert dropped(of({"question": Q})) == ("answer", reasons.NO_ANSWER)
    assert dropped(of(alpaca(instruction=None))) == ("instruction", reasons.NO_QUESTION)
    assert of({"instruction": Q, "output": A}).problems == []
    assert of(alpaca(input=None)).problems == []
    assert dropped(parse(Raw(1, alpaca(output=float("nan"))))) == ("output", reasons.NO_ANSWER)


@pytest.mark.parametrize("number", ["42", "3.10", "-0.5e3", "9" * 5000])
def test_numbers_become_their_text(number: str) -> None:
    parsed = parse(Raw(1, f'{{"instruction": "{Q}", "output": {number}}}'))
    assert turns(parsed)[1] == ("assistant", number)
    assert brief(parsed) == [("output", reasons.NUMBER, "repaired")]


def test_numbers_of_tables_and_what_is_no_text() -> None:
    assert turns(parse(Raw(1, alpaca(output=42))))[1] == ("assistant", "42")
    for value in (True, False, {"text": A}):
        assert dropped(of(alpaca(output=value))) == ("output", reasons.NOT_TEXT)
    for value in (True, False, [A], {"text": A}):
        assert dropped(of(alpaca(input=value))) == ("input", reasons.NOT_TEXT)


def test_wrapped_records_are_unwrapped() -> None:
    parsed = of([alpaca()])
    assert turns(parsed) == [("user", Q), ("assistant", A)]
    assert brief(parsed) == [("[0]", reasons.WRAPPED, "repaired")]


def test_leading_answer_is_dropped() -> None:
    parsed = of(said("gpt", A2, "human", Q, "gpt", A))
    assert turns(parsed) == [("user", Q), ("assistant", A)]
    assert brief(parsed) == [("conversations[0].value", reasons.LEADING_ANSWER, "repaired")]


def test_neighbours_of_one_role_are_merged() -> None:
    parsed = of(said("human", Q, "human", Q2, "gpt", A, "gpt", A2))
    assert turns(parsed) == [("user", f"{Q}\n{Q2}"), ("assistant", f"{A}\n{A2}")]
    assert [p.reason for p in parsed.problems] == [reasons.MERGED] * 2


def test_open_question_is_dropped() -> None:
    parsed = of(said("human", Q, "gpt", A, "human", Q2))
    assert turns(parsed) == [("user", Q), ("assistant", A)]
    assert brief(parsed) == [("conversations[2].value", reasons.OPEN_QUESTION, "repaired")]
    assert dropped(of(said("human", Q)))[1] == reasons.NO_ANSWER


@pytest.mark.parametrize(
    ("role", "reason"),
    [
        ("bing", reasons.UNKNOWN_ROLE),
        (None, reasons.UNKNOWN_ROLE),
        ("function_call", reasons.TOOL),
        ("observation", reasons.TOOL),
        ("Tool", reasons.TOOL),
    ],
)
def test_other_roles_drop_the_record(role: Any, reason: str) -> None:
    parsed = of(said("human", Q, role, A, "gpt", A))
    assert dropped(parsed) == ("conversations[1].from", reason)


def test_tool_calls_drop_the_record() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    value = {"messages": [{"role": "user", "content": Q}, call]}
    assert dropped(of(value)) == ("messages[1]", reasons.TOOL)


def test_empty_conversations() -> None:
    assert dropped(of({"conversations": []})) == ("conversations", reasons.EMPTY_CONVERSATION)
    assert dropped(of({"input": [], "output": []})) == ("output", reasons.EMPTY_CONVERSATION)
    assert dropped(of(said("gpt", A)))[1] == reasons.NO_QUESTION
    assert dropped(of({"conversations": [Q, A]})) == ("conversations[0]", reasons.NOT_A_TURN)


def test_a_megabyte_in_one_line() -> None:
    assert of(alpaca(input="长" * 350_000)).problems == []


def test_mixed_formats_are_told_apart_record_by_record() -> None:
    values = [alpaca(), {"input": [Q], "output": [A]}, said("human", Q, "gpt", A), {"text": Q}]
    assert [of(v).format for v in values] == ["alpaca", "chat", "sharegpt", "text"]


def test_duplicate_keys_keep_the_last_value_and_say_so() -> None:
    parsed = parse(Raw(3, f'{{"instruction": "{Q}", "output": "待补充", "output": "{A}"}}'))
    assert turns(parsed)[1] == ("assistant", A)
    assert parsed.problems == [Problem(3, "output", reasons.DUPLICATE_KEY, "repaired")]


@pytest.mark.parametrize(
    "text", ['{"instruction": "\\d"}', '{"instruction": "一', "", "{", "[" * 100_000, "一二"]
)
def test_broken_json(text: str) -> None:
    field, reason = dropped(parse(Raw(1, text)))
    assert (field, reason) == ("", reasons.BROKEN_JSON)


@pytest.mark.parametrize("answer", ["", "  \n", "\u200b\ufeff", "　"])
def test_empty_answers(answer: str) -> None:
    assert dropped(of(alpaca(output=answer))) == ("output", reasons.EMPTY_ANSWER)


@pytest.mark.parametrize("answer", ["<无输出>", "<nooutput>", "TODO", "N/A", "null", " NaN "])
def test_placeholder_answers(answer: str) -> None:
    assert dropped(of(alpaca(output=answer))) == ("output", reasons.PLACEHOLDER_ANSWER)


@pytest.mark.parametrize("words", ["<无输入>", "<noinput>", "无输入", "N/A", "None", "null", "nan"])
def test_placeholder_inputs(words: str) -> None:
    parsed = of(alpaca(input=words))
    assert parsed.conversation is not None
    assert parsed.conversation.turns[0].input == ""
    assert brief(parsed) == [("input", reasons.PLACEHOLDER_INPUT, "repaired")]


@pytest.mark.parametrize("words", ["无输入法可用", "Na", "None of them", "<输入> 是标签"])
def test_only_whole_placeholders_count(words: str) -> None:
    assert of(alpaca(input=words, output=words)).problems == []


def test_literal_line_break_is_warned_of() -> None:
    parsed = of(alpaca(instruction="写一个口号。\\n\\n"))
    assert brief(parsed) == [("instruction", reasons.LITERAL_NEWLINE, "warned")]


@pytest.mark.parametrize(
    "text", [r"在 C:\new 里", r"$\nabla f$", r'用 print("好\n") 换行', "a\\\\n"]
)
def test_backslash_n_that_is_meant(text: str) -> None:
    assert of(alpaca(output=text)).problems == []


def test_lost_invisible_and_broken_characters() -> None:
    lost = of(alpaca(output="我不敢\ufffd\ufffd相信"))
    assert lost.problems == [
        Problem(1, "output", f"{reasons.LOST_CHARACTERS}: 2", "warned"),
    ]
    invisible = of(alpaca(instruction="\u200b\ufeff天\u2060空\u200c？"))
    assert turns(invisible)[0] == ("user", "天空？")
    assert invisible.problems == [
        Problem(1, "instruction", f"{reasons.ZERO_WIDTH}: 4", "repaired"),
    ]
    broken = parse(Raw(1, f'{{"instruction": "{Q}", "output": "\\ud83d骑士"}}'))
    assert dropped(broken) == ("output", reasons.LONE_SURROGATE)


def test_emoji_keep_their_joiners() -> None:
    family = "👨\u200d👩\u200d👧 和 ❤\ufe0f\u200d🔥"
    parsed = of(alpaca(output=family))
    assert turns(parsed)[1] == ("assistant", family)
    assert parsed.problems == []


def test_line_ends_and_outer_white_space_are_silent() -> None:
    parsed = of(alpaca(output=f"\r\n {A}\r\n{A2}\r{A} \n"))
    assert turns(parsed)[1] == ("assistant", f"{A}\n{A2}\n{A}")
    assert parsed.problems == []


def test_uneven_chat() -> None:
    fewer = of({"input": [Q, Q2], "output": [A]})
    assert turns(fewer) == [("user", Q), ("assistant", A)]
    assert brief(fewer) == [("input", reasons.OPEN_QUESTION, "repaired")]
    assert dropped(of({"input": [Q], "output": [A, A2]})) == ("output", reasons.MORE_ANSWERS)
    assert dropped(of({"input": [Q], "output": []})) == ("output", reasons.NO_ANSWER)
    strings = of({"input": Q, "output": A})
    assert turns(strings) == [("user", Q), ("assistant", A)]
    assert brief(strings) == [("input", reasons.ONE_TURN, "warned")]
    mixed = of({"input": [Q], "output": A})
    assert brief(mixed) == [("output", reasons.ONE_TURN, "repaired")]


@pytest.mark.parametrize("empty", ["", None, " ", "<无输出>"])
def test_a_later_empty_answer_cuts_the_chat(empty: Any) -> None:
    parsed = of({"input": [Q, Q2, Q], "output": [A, empty, A2]})
    assert turns(parsed) == [("user", Q), ("assistant", A)]
    assert brief(parsed) == [("output[1]", reasons.CUT, "repaired")]
    assert dropped(of({"input": [Q, Q2], "output": [empty, A]}))[0] == "output[0]"
    cut = of(said("human", Q, "gpt", A, "human", "", "gpt", A2))
    assert turns(cut) == [("user", Q), ("assistant", A)]


# Anything at all

KEYS = st.sampled_from(
    field_names.names(
        "instruction input output history conversations messages from value role content text "
        "prompt response question answer system tool_calls A b 问题 Input"
    )
)
WORDS = st.text(max_size=6) | st.sampled_from([Q, A, "", " ", "<无输出>", "\ud800", "\u200b", "[]"])
SCALARS = WORDS | st.none() | st.booleans() | st.integers() | st.floats()
ROLES = st.sampled_from(["human", "gpt", "user", "assistant", "system", "tool", "谁", None])
TURNS = st.lists(
    st.fixed_dictionaries({"from": ROLES, "value": WORDS | SCALARS}) | st.lists(WORDS, max_size=3),
    max_size=6,
)
VALUES = st.recursive(
    SCALARS | TURNS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(KEYS | st.text(max_size=3), inner | WORDS, max_size=5)
    ),
    max_leaves=12,
)
RECORDS = VALUES | st.dictionaries(KEYS, WORDS | TURNS | st.lists(WORDS, max_size=4), max_size=5)
# Mostly sound, so that conversations come out and the rules for turns are met in every order.
WORD = st.sampled_from([Q, A, Q2, A2, " 好\r\n", "\u200b天", ""])
MANY = st.lists(WORD, min_size=1, max_size=5)
SPOKEN = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from([*["user", "assistant"] * 4, "system"]), "content": WORD}
    ),
    max_size=7,
)
ROWS = (
    st.fixed_dictionaries({"input": MANY, "output": MANY})
    | st.fixed_dictionaries({"instruction": WORD, "input": WORD, "output": WORD, "system": WORD})
    | st.fixed_dictionaries(
        {"history": st.lists(st.tuples(WORD, WORD).map(list)), "input": WORD, "output": WORD}
    )
    | st.fixed_dictionaries({"messages": SPOKEN}, optional={"system": WORD})
)


@settings(max_examples=600, deadline=None)
@given(RECORDS | ROWS, st.booleans())
def test_any_json_gives_a_sound_conversation_or_a_reason(value: Any, as_text: bool) -> None:
    if not as_text and not isinstance(value, dict):
        return
    parsed = parse(Raw(5, json.dumps(value) if as_text else value))
    for problem in parsed.problems:
        assert problem.line == 5
        f"{problem.field}{problem.reason}".encode()
    fatal = [p for p in parsed.problems if p.action == "dropped"]
    if parsed.conversation is None:
        assert len(fatal) == 1
        return
    assert not fatal
    roles = [t.role for t in parsed.conversation.turns]
    if parsed.conversation.kind == "text":
        assert roles == ["assistant"]
    else:
        body = roles[1:] if roles[0] == "system" else roles
        assert body
        assert body == ["user", "assistant"] * (len(body) // 2)
    for turn in parsed.conversation.turns:
        assert turn.text.strip()
        f"{turn.text}{turn.input}".encode()


@settings(deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_parsed_or_dropped(text: str) -> None:
    assert parse(Raw(1, text)).format
