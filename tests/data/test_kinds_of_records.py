"""What a key means is honoured, refused by name, or counted as unused: whole kinds, not examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vicuna.commands.data_convert import as_format, convert
from vicuna.data.conversation import Conversation, Parsed, Raw, Turn
from vicuna.data.records import field_names, reasons, text_warnings
from vicuna.data.records.formats import parse
from vicuna.errors import UserError

Q, A, BAD, Q2, A2 = "冬天冷吗？", "北方很冷。", "一点不冷。", "夏天呢？", "很热。"


def of(value: Any) -> Parsed:
    return parse(Raw(1, json.dumps(value, ensure_ascii=False)))


def turns(parsed: Parsed) -> list[Turn]:
    assert parsed.conversation is not None, parsed.problems
    return parsed.conversation.turns


def texts(value: Any) -> list[str]:
    return [t.text for t in turns(of(value))]


def taught(value: Any) -> list[str]:
    """The answers that are in the loss; none of a record that is dropped."""
    parsed = of(value)
    if parsed.conversation is None:
        assert [p.action for p in parsed.problems] == ["dropped"]
        return []
    return [t.text for t in turns(parsed) if t.role == "assistant" and t.in_loss]


def user(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def bot(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


# A record of each shape, given its own further keys; the answer is A.
SHAPES: dict[str, Any] = {
    "alpaca": lambda **k: {"instruction": Q, "input": "", "output": A, **k},
    "pair": lambda **k: {"prompt": Q, "response": A, **k},
    "chinese": lambda **k: {"问题": Q, "回答": A, **k},
    "history": lambda **k: {"history": [[Q2, A2]], "input": Q, "output": A, **k},
    "chat": lambda **k: {"input": [Q], "output": [A], **k},
    "messages": lambda **k: {"messages": [user(Q), bot(A)], **k},
    "sharegpt": lambda **k: {
        "conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}],
        **k,
    },
    "couples": lambda **k: {"conversation": [{"human": Q, "assistant": A}], **k},
    "preference": lambda **k: {"prompt": Q, "chosen": A, "rejected": BAD, **k},
    "dialogue": lambda **k: {"dialogue": f"Human: {Q}\nAssistant: {A}", **k},
    "text": lambda **k: {"text": A, **k},
}
TALKS = [name for name in SHAPES if name != "text"]
# The same for a turn.
TURNS: dict[str, Any] = {
    "messages": lambda **k: {"messages": [user(Q), bot(A, **k), user(Q2), bot(A2)]},
    "sharegpt": lambda **k: {
        "conversations": [
            {"from": "human", "value": Q},
            {"from": "gpt", "value": A, **k},
            {"from": "human", "value": Q2},
            {"from": "gpt", "value": A2},
        ]
    },
    "couples": lambda **k: {
        "conversation": [{"input": Q, "output": A, **k}, {"input": Q2, "output": A2}]
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_no_key_is_passed_over_in_silence(shape: str) -> None:
    """The walk: a key nobody knows, and every key that is known, beside a record of every shape."""
    record = SHAPES[shape]()
    plain = set(of(record).unused)
    assert set(of(SHAPES[shape](somebody="x")).unused) == plain | {"somebody"}
    for key in sorted(field_names.KNOWN - set(record) - field_names.HARMLESS):
        value = "某事某物"
        found = of(SHAPES[shape](**{key: value}))
        said = " ".join(f"{p.field} {p.reason}" for p in found.problems)
        used = found.conversation is not None and any(
            value in f"{t.text}{t.input}{t.thought}" for t in found.conversation.turns
        )
        # Used, named, counted, or the record is another one by it and says so.
        assert used or key in found.unused or key in said or found.conversation is None, key
        if found.conversation is None:
            assert found.problems, key


@pytest.mark.parametrize("shape", TURNS)
def test_no_key_of_a_turn_is_passed_over_in_silence(shape: str) -> None:
    assert [u.split(".")[-1] for u in of(TURNS[shape](somebody="x")).unused] == ["somebody"]
    part = {"type": "text", "text": A, "somebody": "x"}
    assert of({"messages": [user(Q), bot([part])]}).unused == ("messages[].content[].somebody",)


def test_marks_where_they_mean_nothing_are_counted() -> None:
    for key, value in (("train", True), ("reasoning", "想。")):
        assert of({"messages": [user(Q, **{key: value}), bot(A)]}).unused == (f"messages[].{key}",)
    for label in (0, 1, "正面"):
        parsed = of({"text": A, "label": label})
        assert (parsed.format, parsed.unused) == ("text", ("label",))


def test_empty_values_are_no_columns() -> None:
    for empty in (None, "", [], {}, "[]", "null", " "):
        for key in ("somebody", "images", "tools", "tool_calls", "rejected_response"):
            assert of(SHAPES["messages"](**{key: empty})).unused == ()
            assert taught(SHAPES["messages"](**{key: empty})) == [A]


# Masks and weights


@pytest.mark.parametrize("key", [*field_names.LEARNED, "Loss", "loss-weight", "Train On Turn"])
@pytest.mark.parametrize("shape", TURNS)
def test_an_answer_that_is_not_to_be_learned_is_not(shape: str, key: str) -> None:
    for no in (0, 0.0, False, "false", "0", "no"):
        assert taught(TURNS[shape](**{key: no})) == [A2], no
        assert [t.text for t in turns(of(TURNS[shape](**{key: no})))] == [Q, A, Q2, A2]
    for yes in (1, True, "true", 1.0):
        assert taught(TURNS[shape](**{key: yes})) == [A, A2], yes
        assert of(TURNS[shape](**{key: yes})).problems == []


@pytest.mark.parametrize("key", field_names.MASKED)
@pytest.mark.parametrize("shape", TURNS)
def test_a_masked_answer_is_not_learned(shape: str, key: str) -> None:
    for yes in (1, True, "true"):
        assert taught(TURNS[shape](**{key: yes})) == [A2], yes
    for no in (0, False, "false"):
        assert taught(TURNS[shape](**{key: no})) == [A, A2], no


@pytest.mark.parametrize("shape", TALKS)
def test_weights_masks_and_labels_of_a_record(shape: str) -> None:
    for key in (*field_names.LEARNED, *field_names.GOOD):
        assert taught(SHAPES[shape](**{key: False})) == [], key
        assert taught(SHAPES[shape](**{key: True}))[-1] == A, key
    for key in (*field_names.MASKED, *field_names.BAD):
        assert taught(SHAPES[shape](**{key: True})) == [], key
        assert taught(SHAPES[shape](**{key: False}))[-1] == A, key


def test_a_weight_in_between_is_warned_of() -> None:
    for value in (TURNS["messages"](weight=0.5), SHAPES["alpaca"](weight=2.5)):
        (problem,) = of(value).problems
        assert (problem.action, problem.reason.split(": ")[0]) == ("warned", reasons.WEIGHT)


def test_a_mask_for_each_turn_and_masks_within_an_answer() -> None:
    two = [user(Q), bot(A), user(Q2), bot(A2)]
    for mask in ([0, 1], [0, 0, 0, 1], [False, True]):
        assert taught({"messages": two, "loss_mask": mask}) == [A2]
    assert taught({"messages": two, "mask": [True, False]}) == [A2]
    for odd in ({"loss_mask": [1, 0, 1]}, {"weights": ["?", 1]}, {"no_loss_spans": [[0, 3]]}):
        assert taught({"messages": two, **odd}) == []
    assert taught({"messages": two, "mask": "User"}) == [A, A2]
    assert taught({"messages": two, "mask": "assistant"}) == []
    detail = [{"begin_offset": 0, "end_offset": 2, "train": False}]
    assert taught(TURNS["messages"](train_detail=detail)) == []


# Answers that are bad, or worse than another


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("label", False),
        ("label", "bad"),
        ("kto_tag", "False"),
        ("kto_tag", 0),
        ("is_good", "no"),
        ("rejected", True),
        ("is_correct", False),
        ("feedback", "thumbs_down"),
        ("deleted", True),
    ],
)
def test_bad_answers_are_not_taught(key: str, value: Any) -> None:
    assert taught({"prompt": Q, "completion": A, key: value}) == []
    assert taught({"messages": [user(Q), bot(A)], key: value}) == []
    assert A not in taught(TURNS["messages"](**{key: value}))


PREFERENCES = [
    {"prompt": Q, "chosen": A, "rejected": BAD},
    {"instruction": Q, "input": "", "chosen": A, "rejected": BAD},
    {"question": Q, "chosen": "好", "rejected": "坏"},
    {"prompt": [user(Q)], "chosen": [bot(A)], "rejected": [bot(BAD)]},
    {"chosen": [user(Q), bot(A)], "rejected": [user(Q), bot(BAD)]},
    {"prompt": Q, "chosen": [user(Q), bot(A)], "rejected": [user(Q), bot(BAD)]},
    {
        "conversations": [{"from": "human", "value": Q}],
        "chosen": {"from": "gpt", "value": A},
        "rejected": {"from": "gpt", "value": BAD},
    },
    {"messages": [user(Q)], "chosen": bot(A), "rejected": bot(BAD)},
    {"messages": [user(Q), bot(A)], "rejected_response": BAD},
    {"messages": [user(Q), bot("旧的。")], "chosen": bot(A), "rejected": bot(BAD)},
    {"question": Q, "response_j": A, "response_k": BAD},
    {"chosen": f"\n\nHuman: {Q}\n\nAssistant: {A}", "rejected": f"\n\nHuman: {Q}\n\nAssistant: x"},
    {"prompt": f"\n\nHuman: {Q}\n\nAssistant:", "chosen": A, "rejected": BAD},
    {"prompt": Q, "response_0": BAD, "response_1": A, "better_response_id": 1},
    {"prompt": Q, "response_a": A, "response_b": BAD, "winner": "model_a"},
    {"context": [user(Q)], "response1": BAD, "response2": A, "overall_preference": 2},
    {"prompt": Q, "chosen_response": A, "rejected_response": BAD},
    {"input": [user(Q)], "preferred_output": [bot(A)], "non_preferred_output": [bot(BAD)]},
]


@pytest.mark.parametrize("record", PREFERENCES)
def test_the_better_answer_is_taught_and_the_worse_named(record: dict[str, Any]) -> None:
    parsed = of(record)
    better = "好" if record.get("chosen") == "好" else A
    assert [t.text for t in turns(parsed)] == [Q, better]
    assert parsed.unused
    assert BAD not in taught(record)


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": Q, "output": [A, BAD]},
        {"question": Q, "answers": [{"text": BAD, "score": 1}, {"text": A, "score": 9}]},
        {"prompt": Q, "responses": [{"response": BAD, "rank": 2}, {"response": A, "rank": 1}]},
        {"instruction": Q, "completions": [{"response": A, "overall_score": "8.5"}, {"response": BAD, "overall_score": "3"}]},
        {"prompt": Q, "answers": [{"text": BAD, "is_correct": False}, {"text": A, "is_correct": True}]},
    ],
)  # fmt: skip
def test_the_best_of_a_list_is_taught(record: dict[str, Any]) -> None:
    assert taught(record) == [A]
    assert [p.action for p in of(record).problems] == ["repaired"]


def test_a_preference_without_a_winner_is_dropped_and_context_is_not_learned() -> None:
    assert taught({"prompt": Q, "response_a": A, "response_b": BAD, "winner": "tie"}) == []
    talk = {"messages": [user(Q2), bot(A2), user(Q)], "chosen": bot(A), "rejected": bot(BAD)}
    assert texts(talk) == [Q2, A2, Q, A]
    assert taught(talk) == [A]
    apart = {"prompt": [user(Q2), bot(A2), user(Q)], "completion": [bot(A)]}
    assert (texts(apart), taught(apart)) == ([Q2, A2, Q, A], [A])


JUDGED = [
    ("responses", {"scores": [1, 5]}),
    ("answers", {"ranks": [2, 1]}),
    ("completions", {"ratings": [2, 9]}),
    ("responses", {"best": 1}),
    ("responses", {"best_index": "1"}),
    ("responses", {"chosen": "B"}),
    ("responses", {"winner": A}),
    ("answer", {"score": [1, 2]}),
    ("output", {"scores": [1, 2]}),
    ("candidates", {"human_rewards": "[0.1, 0.5]"}),
    ("responses", {"is_correct": [False, True]}),
    ("responses", {"rejected": ["x", "y"], "score": [0, 1]}),
]


@pytest.mark.parametrize(("key", "beside"), JUDGED)
def test_a_list_beside_the_answers_tells_which_is_the_best(key: str, beside: Any) -> None:
    record = {"instruction" if key == "output" else "prompt": Q, key: [BAD, A], **beside}
    assert taught(record) == [A]
    assert [p.reason for p in of(record).problems] == [f"{reasons.BEST}: 2 of 2"]
    inside = {"history": [{"question": Q, "answer": [BAD, A], **beside}]}
    assert taught(inside) == [A]


@pytest.mark.parametrize(
    "beside",
    [{"marks": [1, 2]}, {"scores": [1, 2, 3]}, {"scores": [1, None]}, {"scores": ["x", "y"]}]
    + [{"best": 2}, {"winner": "neither"}],
)
def test_what_does_not_tell_the_best_drops_the_record(beside: dict[str, Any]) -> None:
    parsed = of({"prompt": Q, "responses": [A, BAD], **beside})
    assert [p.reason for p in parsed.problems] == [reasons.NO_WINNER]
    assert taught({"prompt": Q, "responses": [A, BAD]}) == [A]
    ranking = {"prompt": Q, "responses": [BAD, "热。", A], "ranking": [2, 3, 1]}
    assert taught(ranking) == []  # A by its ranks; by their order it would be the second
    assert taught({**ranking, "ranking": [3, 2, 1]}) == [A]
    assert taught({"prompt": Q, "responses": [A, BAD], "ids": [1, 2]}) == [A]


@pytest.mark.parametrize("winner", ["preferred", "better", "chosen", "winner", "preference"])
@pytest.mark.parametrize("stem", ["response", "answer", "output"])
def test_the_winner_is_a_number_a_letter_or_a_name(winner: str, stem: str) -> None:
    numbered = {"question": Q, f"{stem}_1": BAD, f"{stem}_2": A}
    for value in (2, "2", "b", "B", "second", f"{stem}_2", f"{stem} 2"):
        assert taught({**numbered, winner: value}) == [A], value
    lettered = {"question": Q, f"{stem}_a": BAD, f"{stem}_b": A}
    for value in ("b", "B", f"{stem}_b", f"{stem.title()} B", "model_b"):
        assert taught({**lettered, winner: value}) == [A], value
    assert taught({**numbered, f"{stem}_3": "好。", winner: 3}) == ["好。"]
    for value in (3, "3", "tie"):
        assert taught({**numbered, winner: value}) == []


def test_a_label_that_says_neither_good_nor_bad_is_named() -> None:
    for value in (3, 0.5, "体育"):
        parsed = of({"prompt": Q, "completion": A, "label": value})
        (problem,) = parsed.problems
        assert (problem.action, problem.reason.split(": ")[0]) == ("warned", reasons.LABEL_ODD)


# System prompts


SYSTEM = "你是老师。"


@pytest.mark.parametrize("key", field_names.SYSTEMS)
@pytest.mark.parametrize("shape", TALKS)
def test_a_system_prompt_beside_any_shape(shape: str, key: str) -> None:
    for value in (SYSTEM, [{"text": SYSTEM}], {"role": "system", "parts": [{"text": SYSTEM}]}):
        first = turns(of(SHAPES[shape](**{key: value})))[0]
        assert (first.role, first.text) == ("system", SYSTEM), value
    assert turns(of(SHAPES[shape](**{key: ""})))[0].role == "user"


def test_a_system_prompt_wherever_it_stands() -> None:
    system = {"role": "system", "content": SYSTEM}
    both = {"messages": [system, user(Q), bot(A)], "system": SYSTEM}
    for value in (
        {"messages": [user(Q), system, bot(A)]},
        {"messages": [user(Q), bot(A), system]},
        {"messages": [user(Q), bot(A)], "instruction": SYSTEM},
        both,
    ):
        assert texts(value) == [SYSTEM, Q, A]
        assert taught(value) == [A]
    late = {"messages": [user(Q), bot(A), system, user(Q2), bot(A2)]}
    assert texts(late) == [SYSTEM, Q, A, Q2, A2]
    assert taught(late) == [A2]  # the first answer was given without it
    assert of(late).problems[0].action == "repaired"


# What a text model cannot take


@pytest.mark.parametrize("key", [*field_names.MEDIA, *field_names.TOOLS])
def test_media_and_tools_drop_the_record_by_name(key: str) -> None:
    for value in (["x"], "x", [{"name": "x"}], {"bytes": "x"}):
        for record in (
            *(make(**{key: value}) for make in SHAPES.values()),
            *(make(**{key: value}) for make in TURNS.values()),
            {"messages": [user(Q, **{key: value}), bot(A)]},
        ):
            parsed = of(record)
            assert parsed.conversation is None, record
            assert parsed.problems[0].reason.split(":")[0] in (reasons.MEDIA, reasons.TOOL)


@pytest.mark.parametrize(
    "text",
    ["<image>这是什么？", "这是什么？<image>", "看：\n<image>\n几个人？", "<audio>她说什么？",
     "看<|image_pad|>吧", "<img>a.jpg</img>是谁？", "<video>\n讲了什么", "图<image_1>是？"],
)  # fmt: skip
def test_marks_of_media_drop_the_record(text: str) -> None:
    for record in ({"instruction": text, "output": A}, {"messages": [user(text), bot(A)]}):
        assert of(record).problems[0].reason.startswith(reasons.MEDIA)
    assert taught({"instruction": "翻译", "input": text, "output": A}) == []


def test_talk_about_marks_stays() -> None:
    assert taught({"instruction": "HTML 里 <video> 和 <img src=x> 怎么用？", "output": A}) == [A]


@pytest.mark.parametrize(
    "part",
    [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "input_audio", "input_audio": {}},
     {"type": "tool_use", "input": {}}, {"type": "mystery"}, {"inlineData": {"data": "x"}}, 3],
)  # fmt: skip
def test_parts_that_are_no_text_drop_the_record(part: Any) -> None:
    assert taught({"messages": [user([part, {"type": "text", "text": Q}]), bot(A)]}) == []


# Thoughts


@pytest.mark.parametrize("key", [*field_names.THOUGHTS, "Complex_CoT", "Inner Thoughts"])
def test_reasoning_is_the_thought_of_the_answer(key: str) -> None:
    for record in (
        *(SHAPES[s](**{key: "先想。"}) for s in TALKS),
        {"messages": [user(Q), bot(A, **{key: "先想。"})]},
        {"messages": [user(Q), bot(A, **{key: [{"type": "text", "text": "先想。"}]})]},
    ):
        last = turns(of(record))[-1]
        assert (last.text, last.thought) == (A, "先想。"), record
        assert not {key, key.lower()} & set(of(record).unused)
    first = turns(of(TURNS["messages"](**{key: "先想。"})))[1]
    assert (first.text, first.thought) == (A, "先想。")


def test_a_thought_in_the_answer_and_beside_it_is_one() -> None:
    """Else `thinking off` leaves one of them in, and on teaches two."""
    for inside, thought, reason in (
        ("想", "想", reasons.THOUGHT_TWICE),
        ("", "想", reasons.THOUGHT_TWICE),
        ("再想", "想\n再想", reasons.THOUGHTS_JOINED),
    ):
        answer = f"<think>\n{inside}\n</think>\n\n{A}"
        for record in (
            {"prompt": Q, "response": answer, "reasoning_content": "想"},
            {"messages": [user(Q), bot(answer, reasoning_content="想")]},
        ):
            parsed = of(record)
            assert [(t.text, t.thought) for t in turns(parsed)] == [(Q, ""), (A, thought)]
            assert [p.reason for p in parsed.problems] == [reason]


@pytest.mark.parametrize(
    "answer",
    ["<think>想不完", f"想</think>{A}", f"<thinking>想</thinking>{A}", f"◁think▷想◁/think▷{A}"]
    + [f"<reasoning>想</reasoning><answer>{A}</answer>", f"[THINK]想[/THINK]{A}"]
    + [
        f"<|begin_of_thought|>想<|end_of_thought|>{A}",
        f"<think>想</think>{A}<think>再想</think>好",
    ],
)
def test_thoughts_in_other_marks_are_warned_of(answer: str) -> None:
    conversation = of({"prompt": Q, "response": answer}).conversation
    assert conversation is not None
    reasons_ = [p.reason.split(": ")[0] for p in text_warnings.warnings(conversation)]
    assert reasons_.count(reasons.THOUGHT) == 1
    plain = of({"prompt": answer, "response": f"<think>想</think>{A}，3 < 5"}).conversation
    assert plain is not None
    assert reasons.THOUGHT not in "".join(p.reason for p in text_warnings.warnings(plain))


def test_thoughts_in_parts_and_in_turns_of_their_own() -> None:
    for thinking in (
        {"type": "thinking", "thinking": "先想。"},
        {"type": "reasoning", "text": "先想。"},
        {"type": "thinking", "thinking": [{"type": "text", "text": "先想。"}]},
    ):
        said = turns(of({"messages": [user(Q), bot([thinking, {"type": "text", "text": A}])]}))
        assert (said[1].text, said[1].thought) == (A, "先想。")
    for apart in (
        [user(Q), {"role": "thought", "content": "先想。"}, bot(A)],
        [user(Q), bot("先想。", channel="analysis"), bot(A, channel="final")],
    ):
        said = turns(of({"messages": apart}))
        assert [(t.role, t.text, t.thought) for t in said][1] == ("assistant", A, "先想。")
    assert turns(of({"messages": [user(Q), bot(A, reasoning_content="")]}))[1].thought == ""


# Multiple choice


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ({"options": ["白菜", "苹果"], "answer": "B"}, "B"),
        ({"options": ["A. 白菜", "B. 苹果"], "answer": "B"}, "B"),
        ({"option": {"A": "白菜", "B": "苹果"}, "answer": "B"}, "B"),
        ({"choices": ["白菜", "苹果"], "answer": 1}, "B"),
        ({"choices": {"text": ["白菜", "苹果"], "label": ["A", "B"]}, "answerKey": "B"}, "B"),
        ({"choices": [{"label": "A", "text": "白菜"}, {"label": "B", "text": "苹果"}], "answer": "B"}, "B"),
        ({"A": "白菜", "B": "苹果", "answer": "B"}, "B"),
        ({"option_a": "白菜", "option_b": "苹果", "answer": "B"}, "B"),
        ({"opa": "白菜", "opb": "苹果", "cop": 1}, "B"),
        ({"options": "[\"白菜\", \"苹果\"]", "answer": "苹果"}, "苹果"),
        ({"candidates": ["白菜", "苹果"], "answer": ["A", "B"]}, "AB"),
    ],
)  # fmt: skip
def test_options_belong_to_the_question(given: dict[str, Any], answer: str) -> None:
    parsed = of({"question": "哪种是水果？", **given})
    assert [t.text for t in turns(parsed)] == ["哪种是水果？\nA. 白菜\nB. 苹果", answer]
    assert parsed.unused == ()
    by_number = 1 in (given.get("answer"), given.get("cop"))
    assert [p.action for p in parsed.problems] == ["repaired"] * by_number


def test_options_of_other_shapes() -> None:
    inside = {
        "instruction": "选择。",
        "input": "哪种是水果？",
        "options": ["白菜", "苹果"],
        "output": "B",
    }
    assert turns(of(inside))[0].input == "哪种是水果？\nA. 白菜\nB. 苹果"
    there = {"question": "哪种？\nA. 白菜\nB. 苹果", "options": ["白菜", "苹果"], "answer": "B"}
    assert texts(there)[0] == "哪种？\nA. 白菜\nB. 苹果"
    assert taught({"question": Q, "options": ["甲", "乙"], "answer": 7}) == []
    assert of({"messages": [user(Q), bot(A)], "options": ["甲", "乙"]}).unused == ("options",)


# Dialogues in one text


WHOLE = [Q, A, Q2, A2]


@pytest.mark.parametrize(
    "text",
    [
        f"Human: {Q}\nAssistant: {A}\nHuman: {Q2}\nAssistant: {A2}",
        f"\n\nHuman: {Q}\n\nAssistant: {A}\n\nHuman: {Q2}\n\nAssistant: {A2}",
        f"### Human: {Q}### Assistant: {A}### Human: {Q2}### Assistant: {A2}",
        f"<s>Human: {Q}\n</s><s>Assistant: {A}\n</s><s>Human: {Q2}\n</s><s>Assistant: {A2}\n</s>",
        f"[Human]: {Q}<eoh> [MOSS]: {A}<eoa> [Human]: {Q2}<eoh> [MOSS]: {A2}<eoa>",
        f"<user>:{Q}\n<assistant>:{A}\n<user>:{Q2}\n<assistant>:{A2}",
        f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n{A}<|im_end|>\n"
        f"<|im_start|>user\n{Q2}<|im_end|>\n<|im_start|>assistant\n{A2}<|im_end|>\n",
        f"<s>[INST] {Q} [/INST] {A} </s><s>[INST] {Q2} [/INST] {A2} </s>",
        f"<|user|>\n{Q}<|end|>\n<|assistant|>\n{A}<|end|>\n<|user|>\n{Q2}<|end|>\n<|assistant|>\n{A2}",
        f"<start_of_turn>user\n{Q}<end_of_turn>\n<start_of_turn>model\n{A}<end_of_turn>\n"
        f"<start_of_turn>user\n{Q2}<end_of_turn>\n<start_of_turn>model\n{A2}<end_of_turn>",
        f"USER: {Q} ASSISTANT: {A}</s>USER: {Q2} ASSISTANT: {A2}</s>",
        f"用户：{Q}\n助手：{A}\n用户：{Q2}\n助手：{A2}",
    ],
)  # fmt: skip
def test_a_dialogue_in_one_text(text: str) -> None:
    parsed = of({"text": text})
    assert parsed.format == "dialogue"
    assert [t.text for t in turns(parsed)] == WHOLE
    cut = text[: text.rindex(A2)]
    for record in (
        {"instruction": cut, "input": "", "output": A2},
        {"prompt": cut, "response": A2},
    ):
        assert texts(record) == WHOLE, record
        assert [p.reason for p in of(record).problems] == [reasons.DIALOGUE]


def test_marks_of_refgpt_chatglm_and_questions() -> None:
    ref = f"<chat>\n<user 1>(word count: 5): {Q}\n<assistant 1>(word count: 9): {A}\n</chat>"
    assert texts({"dialogue": ref, "reference": "材料"}) == [Q, A]
    assert of({"dialogue": ref, "reference": "材料"}).unused == ("reference",)
    rounds = f"[Round 1]\n\n问：{Q}\n\n答：{A}\n\n[Round 2]\n\n问：{Q2}\n\n答："
    assert texts({"prompt": rounds, "response": A2}) == WHOLE
    assert texts({"dialogue": f"问：{Q}\n答：{A}"}) == [Q, A]


@pytest.mark.parametrize(
    "text",
    [f"总结对话：\nHuman: {Q}\nAssistant: {A}", f"Human: {Q}\nAssistant: {A}", "Human: 是什么意思？",
     "User: a\nUser: b\nAssistant:", "问：一加一？"],
)  # fmt: skip
def test_a_question_that_only_quotes_a_dialogue_stays(text: str) -> None:
    assert texts({"instruction": text, "output": A2}) == [text, A2]


def test_plain_text_stays_plain() -> None:
    for text in (
        "小说里写着 Human: 和 Assistant: 两个词。",
        "问：一加一？\n答：二。",
        "User: 只有一句",
    ):
        assert of({"text": text}).format == "text"


# Projects and services


def test_trees_of_messages() -> None:
    def node(parent: str | None, *children: str, **message: Any) -> dict[str, Any]:
        return {"parent": parent, "children": list(children), "message": message or None}

    def said(role: str, *parts: str, **more: Any) -> dict[str, Any]:
        content = {"content_type": "text", "parts": list(parts)}
        return {"author": {"role": role}, "content": content, "recipient": "all", **more}

    mapping = {
        "0": node(None, "1"),
        "1": node("0", "2", "3", **said("user", Q)),
        "2": node("1", **said("assistant", BAD)),
        "3": node("1", "4", author={"role": "assistant"},
                  content={"content_type": "thoughts", "thoughts": [{"content": "想。"}]}),
        "4": node("3", **said("assistant", A)),
    }  # fmt: skip
    for export in ({"mapping": mapping, "current_node": "4"}, {"mapping": mapping}):
        last = turns(of(export))[-1]
        assert texts(export) == [Q, A]
        assert last.thought == "想。"
    mapping["4"]["message"]["recipient"] = "browser"
    assert of({"mapping": mapping, "current_node": "4"}).problems[0].reason == reasons.TOOL
    deep = {"0": node(None, "1"), "1": {"parent": "0", "children": [], "message": {"fragments": [
        {"type": "REQUEST", "content": Q}, {"type": "THINK", "content": "想。"},
        {"type": "RESPONSE", "content": A}]}}}  # fmt: skip
    assert texts({"mapping": deep}) == [Q, A]
    reply = {"text": A, "role": "assistant", "rank": 0}
    worse = {"text": BAD, "role": "assistant", "rank": 1}
    oasst = {"prompt": {"text": Q, "role": "prompter", "replies": [worse, reply]}}
    assert texts(oasst) == [Q, A]


def test_moss_and_services() -> None:
    turn = {"Human": f"<|Human|>: {Q}<eoh>\n", "MOSS": f"<|MOSS|>: {A}<eom>\n",
            "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n",
            "Commands": "<|Commands|>: None<eoc>\n"}  # fmt: skip
    moss = {"meta_instruction": "你是助手。\n", "num_turns": 1, "chat": {"turn_1": turn}}
    assert texts(moss) == ["你是助手。", Q, A]
    turn["Commands"] = "<|Commands|>: Search(x)<eoc>\n"
    assert taught(moss) == []
    gemini = {"contents": [{"role": "user", "parts": [{"text": Q}]},
                           {"role": "model", "parts": [{"text": A}]}]}  # fmt: skip
    assert texts(gemini) == [Q, A]
    claude = {"chat_messages": [
        {"sender": "human", "text": Q, "content": [{"type": "text", "text": Q}], "files": []},
        {"sender": "assistant", "text": A, "content": [{"type": "text", "text": A}]}]}  # fmt: skip
    assert texts(claude) == [Q, A]
    assert texts([[{"prompt": Q, "response": [[A]]}, {"prompt": Q2, "response": [[A2]]}]]) == WHOLE


@pytest.mark.parametrize(
    ("record", "word"),
    [
        ({"message_id": "1", "parent_id": "0", "text": A, "role": "assistant"}, "OpenAssistant"),
        ({"input_ids": [1], "labels": [1]}, "token ids"),
        ({"segments": [{"label": True, "text": A}]}, "segments"),
        ({"title": "t", "paragraphs": []}, "SQuAD"),
    ],
)
def test_forms_that_cannot_be_read_are_named(record: Any, word: str) -> None:
    parsed = of(record)
    assert parsed.conversation is None
    assert word in parsed.problems[0].reason


def test_records_inside_a_field() -> None:
    talk = {"messages": [user(Q), bot(A)]}
    for record in (
        {"id": 1, "data": talk},
        {"id": 1, "row": {"prompt": Q, "response": A}},
        {"conversation": json.dumps(talk)},
        {"cell": json.dumps(talk["messages"])},
        {"messages": str(talk["messages"])},
        {"messages": str(talk["messages"]).replace("}, {", "}\n {")},
    ):
        assert texts(record) == [Q, A], record
        assert [p.action for p in of(record).problems] == ["repaired"]


def test_python_notation() -> None:
    parsed = parse(Raw(1, f"{{'instruction': '{Q}', 'output': '{A}', 'ok': True, 'n': None}}"))
    assert [t.text for t in turns(parsed)] == [Q, A]
    assert parsed.unused == ("ok",)
    for text in ("{'a': __import__('os')}", "{'a': " * 500, "{'a': 1"):
        assert parse(Raw(1, text)).conversation is None


# There and back


def test_converting_never_replaces_what_it_reads(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    source = data / "x.jsonl"
    source.write_text(json.dumps({"prompt": Q, "response": A}), encoding="utf-8")
    link, hard = tmp_path / "link.jsonl", tmp_path / "hard.jsonl"
    link.symlink_to(source)
    hard.hardlink_to(source)
    kept = source.read_bytes()
    for read in (source, link, data, data / "*.jsonl"):
        for written in (source, link, hard):
            with pytest.raises(UserError, match="among those to read"):
                convert([str(read), "--output", str(written), "--force"])
    assert source.read_bytes() == kept
    assert link.is_symlink()
    new = data / "new.jsonl"
    assert convert([str(source), "--output", str(new)]) == 0
    assert convert([str(source), "--output", str(new), "--force"]) == 0


@pytest.mark.parametrize("to", ["alpaca", "chat", "history", "sharegpt", "messages", "pair"])
def test_converting_keeps_what_is_meant(to: str) -> None:
    def back(conversation: Conversation) -> Conversation:
        found = of(as_format(conversation, to)).conversation
        assert found is not None
        return found

    one = [Turn("system", "你是老师。"), Turn("user", Q), Turn("assistant", A, thought="先想。")]
    two = [*one, Turn("user", Q2), Turn("assistant", A2)]
    masked = [*one[:2], Turn("assistant", A, in_loss=False), *two[3:]]
    last = [*one, Turn("user", Q2), Turn("assistant", A2, thought="再想。", in_loss=False)]
    for said in (one, two, masked, last):
        assert back(Conversation(said, 1)) == Conversation(said, 1)


# Anything at all

NAMES = st.sampled_from(
    sorted(field_names.KNOWN | {"chat", "mapping", "prompt", "turn_1", "role", "opa"})
)
WORDS = st.sampled_from([Q, A, "", "true", "0", "[]", "[1]", "{'a': 1}", "Human: a\nAssistant: b"])
VALUES = st.recursive(
    WORDS | st.none() | st.booleans() | st.integers(-2, 3) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(NAMES, VALUES, min_size=1, max_size=6), st.booleans())
def test_any_record_of_known_names_is_sound_or_dropped(value: Any, as_text: bool) -> None:
    parsed = parse(Raw(1, json.dumps(value) if as_text else value))
    fatal = [p for p in parsed.problems if p.action == "dropped"]
    assert len(fatal) == (parsed.conversation is None)
    if parsed.conversation is None:
        return
    said = parsed.conversation.turns
    assert all(isinstance(t.text, str) and t.text.strip() for t in said)
    assert all(isinstance(t.thought, str) and isinstance(t.input, str) for t in said)
    if parsed.conversation.kind == "chat":
        assert any(t.in_loss for t in said if t.role == "assistant")
