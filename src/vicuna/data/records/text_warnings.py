"""What parses and still hurts: warnings about a conversation.

Runs once for each of up to 700,000 records, so each check first asks the cheapest question that can
rule it out: is this character in the text at all?
"""

from __future__ import annotations

import re

from vicuna.data.conversation import Conversation, Problem, Turn
from vicuna.data.records.reasons import (
    MOJIBAKE,
    NO_CHINESE,
    OTHER_TEMPLATE,
    PLACEHOLDER,
    SAME,
    SHIFTED,
    THOUGHT,
)
from vicuna.data.think_tags import MARK, split_thought
from vicuna.messages import Message

_CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_NAMES = ("User", "Assistant", "Human", "Bot", "USER", "ASSISTANT", "HUMAN", "用户", "助手")
_MARK = re.compile(
    r"<\|[A-Za-z_]{2,24}\|>|\[/?INST\]|<</?SYS>>|</?s>|</?(?:user|bot|human|assistant|system)>"
    r"|###? ?(?:Instruction|Response|Input|Output|Human|Assistant|User|Bot|指令|输入|输出|回答)"
    rf"(?:[:：]|[ \t]*$)|^(?:{'|'.join(_NAMES)})[:：]",
    re.MULTILINE,
)
# UTF-8 read as Latin-1 or Windows-1252: a lead byte and two continuation bytes, twice; or the
# curly quotes and dashes that English texts suffer from.
_LATIN_LEADS = "äåæçèéâãï"
_TAIL = "[\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u203a€™]"
_CURLY = "â€[™œ\u009d“˜¦]"
# UTF-8 read as GBK: these stand for the bytes of ，。 and 的 and occur nowhere else.
_GBK_LEADS = "锛銆鐨鈥"
_WRECKS = ("锟斤拷", "烫烫烫", "屯屯屯")
_MOJIBAKE = re.compile(
    "|".join(_WRECKS)
    + f"|(?:[{_LATIN_LEADS}]{_TAIL}{{2}}){{2}}|{_CURLY}"
    + f"|[{_GBK_LEADS}][^\n]{{0,30}}?[{_GBK_LEADS}]"
)
_BLANK = re.compile(
    r"[\[【{<]{1,2}\s?(?:(?:你|您|他|她)的?(?:名字|姓名|全名|地址|电话|邮箱|职位|公司)[^\]】}>\n]{0,6}"
    r"|(?:请?填写|在此|此处|插入|输入)[^\]】}>\n]{1,10}"
    r"|(?:公司|学校|客户|收件人|产品|城市|姓|发件人|经理)?(?:名称|名字|姓名|名|地址|日期)"
    r")\s?[\]】}>]{1,2}"
    r"|[\[【{]{1,2}\s?(?:(?i:your|insert|enter) [A-Za-z ]{2,24}"
    r"|(?i:name|company|date|address|first name|last name))\s?[\]】}]{1,2}"
    r"|(?<![A-Za-z0-9xX*+-])[Xx]{3,5}(?![A-Za-z0-9*+=-])"
)
# In code, braces and names between them are no form to fill in.
_CODE = re.compile(r"```|\b[fF][\"']|\.format\(|[;{]\s*\n|\bdef |=>")
_PATTERNS = ((OTHER_TEMPLATE, _MARK), (MOJIBAKE, _MOJIBAKE), (PLACEHOLDER, _BLANK))
# Where one of the three can match at all. All alternatives begin with a plain character, which lets
# `re` skip through a text at the speed of a table look-up.
_ANY = re.compile(
    "|".join(
        [*(f"{name}{colon}" for name in _NAMES for colon in ":："), "##", "xxx", "XXX"]
        + [*_WRECKS, *_LATIN_LEADS, *_GBK_LEADS, "<", r"\[", "【", r"\{"]
    )
)
# Asking "as an AI, what do you think" is common; speaking so in the first person is not.
_SHIFTED = re.compile(
    r"(?:很?抱歉|对不起)?[，, ]{0,2}(?:作为|身为|我(?:只)?是)(?:一[个名款种])?"
    r"(?:由\w{2,10}(?:开发|训练)的)?(?:大型)?"
    r"(?:AI|人工智能|语言模型|自然语言|聊天机器人)[^，,。\n]{0,12}[，,]\s*(?:我|因此我|所以我)"
    r"|(?:I'm sorry, but )?[Aa]s an (?:AI|artificial intelligence)[a-z ]{0,30}, I "
)


def warnings(conversation: Conversation) -> list[Problem]:
    """What is worth looking at in a conversation; each kind once, at the first turn that has it."""
    turns = conversation.turns
    texts = [f"{t.text}\n{t.input}" if t.input else t.text for t in turns]
    whole = "\n".join(texts)
    found: list[tuple[str, str]] = []
    if whole.isascii() or not _CHINESE.search(whole):
        found.append(("", NO_CHINESE))
    if _ANY.search(whole):
        found += _inside(turns, texts)
    if conversation.kind == "chat" and any(char in whole for char in "<[◁【"):
        found += _thought_marks(turns)
    for i, turn in enumerate(turns):
        if turn.role == "user":
            if _SHIFTED.match(texts[i]):
                found.append((_where(turns, i), SHIFTED))
                break
        elif i and texts[i] == texts[i - 1]:
            found.append((_where(turns, i), SAME))
            break
    line = conversation.line
    return [Problem(line, field, reason, "warned") for field, reason in found] if found else []


def _thought_marks(turns: list[Turn]) -> list[tuple[str, str]]:
    """The first mark of a thought in an answer that is taught as text: not in the block that the
    answer begins with, which is read unless the thought stands beside it."""
    for i, turn in enumerate(turns):
        if turn.role == "assistant":
            text = turn.text if turn.thought else split_thought(turn.text)[1]
            if match := MARK.search(text):
                return [(_where(turns, i), f"{THOUGHT}: {match[0].strip()}")]
    return []


def _where(turns: list[Turn], i: int) -> str:
    return Message("turn {index} ({role})", index=i + 1, role=turns[i].role)


def _inside(turns: list[Turn], texts: list[str]) -> list[tuple[str, str]]:
    """What the text of single turns shows, each kind once."""
    found: dict[str, tuple[str, str]] = {}
    for i, text in enumerate(texts):
        for hit in _ANY.finditer(text):
            for reason, pattern in _PATTERNS:
                if reason in found:
                    continue
                match = pattern.match(text, hit.start())
                if match and not (match[0][0] == "{" and _CODE.search(text)):
                    detail = " ".join(match[0][:24].split())
                    found[reason] = (_where(turns, i), f"{reason}: {detail}")
    return list(found.values())
