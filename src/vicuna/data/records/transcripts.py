"""Dialogues that stand in one text: `Human: … Assistant: …` and what templates write.

A text is one only where it begins with a speaker's mark (plain text may have words before it,
which are the system prompt then) and its speakers take turns; anything else stays what it is.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from vicuna.data.conversation import Role

Transcript = list[tuple[Role, str]]


class _Family(NamedTuple):
    """A way to mark speakers.

    start: matches at a text's beginning. mark: finds every mark; its group u, a or s took part.
    plain: the marks may be ordinary words, so they count only where a dialogue is expected.
    """

    start: re.Pattern[str]
    mark: re.Pattern[str]
    plain: bool = False


_BEGIN = r"\A(?:\s|<s>|<\|begin_of_text\|>|<bos>|<chat>|\[gMASK\]|<sop>)*"


def _family(user: str, assistant: str, system: str = r"(?!)", plain: bool = False) -> _Family:
    any_ = f"(?P<u>{user})|(?P<a>{assistant})|(?P<s>{system})"
    return _Family(
        re.compile(f"{_BEGIN}(?:{user}|{system})", re.MULTILINE),
        re.compile(any_, re.MULTILINE),
        plain,
    )


def _words(names: str) -> str:
    return "|".join(re.escape(n) for n in names.split())


_COLON = r"[ \t]*[:：]"
_PLACE = r"(?:^|(?<=[\s>。？！?!.]))"
_USER = _words("Human human HUMAN User user USER 用户 人类")
_BOT = _words(
    "Assistant assistant ASSISTANT Bot bot BOT AI MOSS Moss GPT ChatGPT Belle BELLE "
    "助手 助理 机器人"
)
_COUNT = r"(?:[ \t]*\d+)?"
_REMARK = r"(?:[ \t]*[(（][^()（）\n]{0,60}[)）])?"


def _bracketed(names: str) -> str:
    """`<user>:`, `<user 1>(word count: 9):`, `[Human]:`, `<|Human|>:`, `<|user|>`."""
    count = rf"{_COUNT}"
    return (
        rf"{_PLACE}<(?:{names}){count}>{_REMARK}(?:{_COLON})?|{_PLACE}\[\|?(?:{names}){count}\|?\]{_REMARK}{_COLON}"
        rf"|<\|(?:{names}){count}\|>(?:{_COLON})?"
    )


_FAMILIES = (
    _family(r"<\|im_start\|>user\n", r"<\|im_start\|>assistant\n", r"<\|im_start\|>system\n"),
    _family(
        r"<\|start_header_id\|>user<\|end_header_id\|>",
        r"<\|start_header_id\|>assistant<\|end_header_id\|>",
        r"<\|start_header_id\|>system<\|end_header_id\|>",
    ),
    _family(r"<start_of_turn>user\n", r"<start_of_turn>model\n"),
    _family(r"\[INST\]", r"\[/INST\]"),
    _family(_bracketed(_USER), _bracketed(_BOT), r"<\|system\|>|<system>:?"),
    _family(
        rf"#{{2,3}}[ \t]*(?:{_USER}|Instruction|指令|Question|问题){_COLON}",
        rf"#{{2,3}}[ \t]*(?:{_BOT}|Response|Answer|输出|回答|答案){_COLON}",
        rf"#{{2,3}}[ \t]*(?:System|system){_COLON}",
    ),
    _family(rf"{_PLACE}(?:{_USER}){_COLON}", rf"{_PLACE}(?:{_BOT}){_COLON}", rf"^System{_COLON}"),
    _family(rf"^\[Round[ \t]*\d+\]\s*问{_COLON}", rf"^答{_COLON}"),
    _family(
        rf"^(?:\[Round[ \t]*\d+\]\s*)?(?:问|提问|问题|Q|Question){_COLON}",
        rf"^(?:答|回答|答案|A|Answer){_COLON}",
        plain=True,
    ),
)
_ENDS = re.compile(
    r"(?:\s|<eo[a-z]>|</?s>|<\|im_end\|>|<\|eot_id\|>|<end_of_turn>|<\|end\|>|<\|endoftext\|>"
    r"|<\|end_of_text\|>|<\|begin_of_text\|>|<\|end_of_sentence\|>|<eos>|</chat>"
    r"|\[Round[ \t]*\d+\])+\Z"
)
_SYS = re.compile(r"\A\s*<<SYS>>\s*(.*?)\s*<</SYS>>\s*", re.DOTALL)
# Where a preamble may stand, only marks that nobody writes in prose count.
_RENDERED = re.compile(
    r"^USER[:：]|###[ \t]*(?:Human|User|Instruction|指令)[:：]|\bUSER: .*\bASSISTANT:", re.M
)
_PREAMBLE = 1000  # characters
_ALPACA = ("Below is an instruction", "下面是一条指令", "以下是一个描述任务的指令")
# What can begin a dialogue at all: one look rules out nearly every text.
POSSIBLE = re.compile(
    r"\s*(?:[\[<#]|[Hh]uman|human|HUMAN|User|user|USER|System|用户|人类|问|提问|Q)"
)


def open_dialogue(text: str) -> Transcript | None:
    """A dialogue that waits for its next answer: what came before it; None where it is none.

    It ends with a question, or with the mark of the answer that follows.
    """
    if not POSSIBLE.match(text):
        return None
    transcript = _split(text, plain=False)
    if not transcript or "assistant" not in [role for role, _ in transcript]:
        return None
    if transcript[-1][0] == "assistant":
        if transcript[-1][1]:
            return None
        transcript.pop()
    return transcript if transcript and transcript[-1][0] == "user" else None


def whole_dialogue(text: str, expected: bool) -> Transcript | None:
    """A dialogue with its answers; None where it is none.

    Args:
        expected: the text stands where a dialogue belongs, so marks that are words count too.
    """
    transcript = None
    if POSSIBLE.match(text):
        transcript = _split(text, plain=expected)
    elif expected or _RENDERED.search(text):
        transcript = _behind_preamble(text, expected)
    if not transcript or not any(role == "assistant" and words for role, words in transcript):
        return None
    return transcript


def _behind_preamble(text: str, expected: bool) -> Transcript | None:
    for family in _FAMILIES:
        if family.plain and not expected:
            continue
        found = family.mark.search(text)
        if found and found.group("u") and 0 < found.start() <= _PREAMBLE:
            transcript = _by(family, text[found.start() :], forced=True)
            before = text[: found.start()].strip()
            if transcript and before and not before.startswith(_ALPACA):
                return [("system", before), *transcript]
            if transcript:
                return transcript
    return None


def _split(text: str, plain: bool) -> Transcript | None:
    for family in _FAMILIES:
        if (family.plain and not plain) or not family.start.match(text):
            continue
        return _by(family, text)
    return None


def _by(family: _Family, text: str, forced: bool = False) -> Transcript | None:
    """The turns between the marks of one family; None where the speakers do not take turns."""
    marks = list(family.mark.finditer(text))
    transcript: Transcript = []
    for i, mark in enumerate(marks):
        role: Role = "user" if mark["u"] else "assistant" if mark["a"] else "system"
        end = marks[i + 1].start() if i + 1 < len(marks) else len(text)
        words = _ENDS.sub("", text[mark.end() : end]).strip()
        if transcript and transcript[-1][0] == role:
            return None
        if role == "user" and (given := _SYS.match(words)):
            transcript.append(("system", given[1]))
            words = words[given.end() :]
        transcript.append((role, words))
    roles = [role for role, _ in transcript if role != "system"]
    if not roles or roles[0] != "user" or (forced and len(roles) < 2):
        return None
    # Between the questions an answer without words would make two questions meet.
    if any(not words for _, words in transcript[:-1]):
        return None
    return transcript
