"""One raw record to one conversation, whatever format it is in.

The record's own keys decide, record by record, so a file may mix them:

    alpaca    {instruction, input, output}
    chat      {input: [questions], output: [answers]}: the 2023 project's
    history   {history: [{input, output} | [question, answer] ...], input, output}; saved chats
    sharegpt  {conversations: [{from, value} ...]} and its many relatives
    messages  {messages: [{role, content} ...]}: OpenAI's
    pair      {prompt, response}, {question, answer} ... under their usual names
    text      {text}: continued pre-training
    unknown   anything else; dropped

Nothing is dropped or changed without a `Problem`. Rules for single strings are in `textrules`;
rules for the order of turns are in `_converse`; of a key that stands twice in an object the last
value is kept, as every JSON reader does, and that is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from vicuna.data.textrules import (
    DUPLICATE_KEY,
    NOT_TEXT,
    PLACEHOLDER_INPUT,
    Note,
    Unusable,
    clean,
    is_placeholder_answer,
    is_placeholder_input,
    kind,
    names,
    parse_json,
    parse_list,
    shorten,
)
from vicuna.data.types import Action, Conversation, Parsed, Problem, Raw, Role, Turn

# The reasons a user reads, beside those of `textrules`. Stable; a detail may follow after ": ".
UNKNOWN_FORMAT = "unknown format"
WRAPPED = "record wrapped in a list"
NO_ANSWER = "no answer"
EMPTY_ANSWER = "empty answer"
PLACEHOLDER_ANSWER = "placeholder answer"
NO_QUESTION = "no question"
EMPTY_QUESTION = "empty question"
QUESTION_FROM_INPUT = "question taken from the input"
CHOICES = "answer choices left out"
NO_TEXT = "no text"
EMPTY_TEXT = "empty text"
EMPTY_CONVERSATION = "empty conversation"
NOT_A_TURN = "not a turn"
UNKNOWN_ROLE = "unknown role"
TOOL_ROLE = "tool call"
LATE_SYSTEM = "system turn inside the conversation"
LEADING_ANSWER = "leading assistant turn dropped"
MERGED = "turns of the same role merged"
OPEN_QUESTION = "question without an answer dropped"
MORE_ANSWERS = "more answers than questions"
CUT = "conversation cut here"
ONE_TURN = "text instead of a list, taken as one turn"

_TURN_LISTS = ("conversations", "conversation", "messages")
# These names are used for other things too: only a list that looks like turns counts.
_OTHER_TURN_LISTS = names("dialog dialogue dialogs dialogues items turns chat 对话")
_ALL_TURN_LISTS = frozenset((*_TURN_LISTS, *_OTHER_TURN_LISTS))
_SPEAKERS = names("from role speaker sender author 角色")
_WORDS = names("value content text message utterance 内容")
_TOOL_KEYS = ("tool_calls", "function_call")
_SYSTEMS = ("system", "system_prompt")
_MATERIAL = ("input", "context")
_PAIRS = tuple(
    (question, answer)
    for question, _, answer in (
        couple.partition("/")
        for couple in names(
            "prompt/response prompt/completion question/answer query/response query/answer "
            "instruction/response input/output context/target input/target source/target "
            "ask/answer q/a human/assistant user/assistant user/bot human/gpt human/bot "
            "prompt/chosen 问题/答案 问题/回答 提问/回答 指令/输出 输入/输出 问/答"
        )
    )
)
_QUESTIONS = tuple(dict.fromkeys(q for q, _ in _PAIRS))
_ANSWERS = tuple(dict.fromkeys(a for _, a in _PAIRS))
# A record with one of these and no answer is a pair without an answer rather than a riddle.
_PLAIN_QUESTIONS = names("prompt question query 问题 指令")
_KNOWN = frozenset(
    (*_ALL_TURN_LISTS, *_SPEAKERS, *_WORDS, *_TOOL_KEYS, *_SYSTEMS, *_MATERIAL, *_QUESTIONS)
    + (*_ANSWERS, "history", "instruction", "id", "generation_parameter", "info")
)

_USERS = names("human user prompter questioner usr 问 用户 人类 提问 提问者")
_ASSISTANTS = names(
    "gpt assistant bot model chatgpt gpt4 gpt-4 ai chatbot 答 助手 助理 机器人 模型 回答"
)
_ROLES: dict[str, Role] = {
    **dict.fromkeys(_USERS, "user"),
    **dict.fromkeys(_ASSISTANTS, "assistant"),
    **dict.fromkeys(("system", "developer", "系统"), "system"),
}
_TOOL_ROLES = names(
    "tool tools function function_call function_response tool_call tool_response observation"
)


class _Said(NamedTuple):
    """Something somebody said, as it stands in the record."""

    role: Role
    value: Any
    field: str
    input: Any = None
    input_field: str = ""


def parse(raw: Raw) -> Parsed:
    """What a record becomes; a bad one is dropped with a reason, nothing is ever raised."""
    problems: list[Problem] = []

    def note(field: str, reason: str, action: Action) -> None:
        problems.append(_problem(raw.line, field, reason, action))

    name = "unknown"
    try:
        record = _object(raw.value, note)
        name = _detect(record)
        if name == "text":
            conversation = Conversation(_text(record, note), raw.line, "text")
        else:
            said = list(_system(record))
            said += _READERS[name](record, note)
            conversation = Conversation(_converse(said, note), raw.line)
    except Unusable as e:
        return Parsed(None, name, [_problem(raw.line, e.field, e.reason, "dropped")])
    return Parsed(conversation, name, problems)


def _problem(line: int, field: str, reason: str, action: Action) -> Problem:
    return Problem(line, _printable(field), _printable(reason), action)


def _printable(words: str) -> str:
    """Keys and role names come from the data: they must not break a log or a table."""
    if words.isascii() and words.isprintable():
        return words
    return " ".join(words.encode("utf-8", "backslashreplace").decode().split())


# From JSON to an object with known names


def _object(value: Any, note: Note) -> dict[str, Any]:
    """The record as an object whose keys are in lower case where we know them."""
    if isinstance(value, str):
        value = parse_json(value, note)
    wrapped = 0
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
        wrapped += 1
    if isinstance(value, list) and _looks_like_turns(value):
        return {"messages": value}
    if not isinstance(value, dict):
        raise Unusable("", f"{UNKNOWN_FORMAT}: {kind(value)} where an object belongs")
    if wrapped:
        note("[0]", WRAPPED, "repaired")
    return _fold(value, note)


def _fold(record: dict[str, Any], note: Note) -> dict[str, Any]:
    if _KNOWN.issuperset(record):
        return record
    folded: dict[str, Any] = {}
    for key, value in record.items():
        lower = str(key).strip().lower()
        if lower in folded and lower in _KNOWN:
            note(lower, DUPLICATE_KEY, "repaired")
        folded[lower] = value
    return folded


# Which format


def _detect(r: dict[str, Any]) -> str:
    """The format's name, by the keys.

    Raises: Unusable where it is none of them.
    """
    turns = None if _ALL_TURN_LISTS.isdisjoint(r) else _turns_key(r)
    if turns:
        return "messages" if turns == "messages" else "sharegpt"
    if "history" in r and _as_list(r["history"]):
        return "history"
    lists = isinstance(r.get("input"), list) or isinstance(r.get("output"), list)
    if "input" in r and lists and not r.get("instruction"):
        return "chat"
    if "instruction" in r and ("output" in r or not _first(r, _ANSWERS)):
        return "alpaca"
    if _pair_keys(r) != (None, None):
        return "pair"
    if "text" in r:
        return "text"
    if _first(r, _PLAIN_QUESTIONS):
        return "pair"
    if "history" in r:
        return "history"
    raise Unusable(shorten(", ".join(map(str, r)), 60), UNKNOWN_FORMAT)


def _turns_key(r: dict[str, Any]) -> str | None:
    for key in _TURN_LISTS:
        if key in r and _as_list(r[key]) is not None:
            return key
    for key in _OTHER_TURN_LISTS:
        if key in r and _looks_like_turns(_as_list(r[key])):
            return key
    return None


def _looks_like_turns(items: list[Any] | None) -> bool:
    return bool(items) and isinstance(items[0], dict) and bool(_first(items[0], _SPEAKERS))  # type: ignore[index]


def _as_list(value: Any) -> list[Any] | None:
    """A list, also where a table's cell holds one as JSON text."""
    if isinstance(value, str) and value[:1] == "[":
        value = parse_list(value)
    return value if isinstance(value, list) else None


def _first(record: dict[str, Any], names: Iterable[str]) -> str | None:
    """The first of the names that the record has."""
    for name in names:
        if name in record:
            return name
    return None


def _pair_keys(r: dict[str, Any]) -> tuple[str | None, str | None]:
    """The names of question and answer: a usual couple, or any question with any answer."""
    for question, answer in _PAIRS:
        if question in r and answer in r:
            return question, answer
    question_, answer_ = _first(r, _QUESTIONS), _first(r, _ANSWERS)
    return (question_, answer_) if question_ and answer_ else (None, None)


# What was said, format by format


def _system(r: dict[str, Any]) -> Iterator[_Said]:
    key = _first(r, _SYSTEMS)
    if key:
        yield _Said("system", r[key], key)


def _alpaca(r: dict[str, Any], _: Note) -> list[_Said]:
    return [
        _Said("user", r["instruction"], "instruction", r.get("input"), "input"),
        _Said("assistant", r.get("output"), "output"),
    ]


def _pair(r: dict[str, Any], note: Note) -> list[_Said]:
    question, answer = _pair_keys(r)
    question = question or _first(r, _PLAIN_QUESTIONS) or ""
    material = next((m for m in _MATERIAL if m in r and m != question), "")
    if "a" in r and "b" in r and answer != "a":
        note("A", CHOICES, "warned")
    if (question, answer) == ("input", "output"):
        # Also the chat format without its lists; the report keeps this to itself unless the
        # file has records of that format.
        note("input", ONE_TURN, "warned")
    return [
        _Said("user", r[question], question, r.get(material), material),
        _Said("assistant", r.get(answer or ""), answer or "answer"),
    ]


def _chat(r: dict[str, Any], note: Note) -> Iterator[_Said]:
    questions = _one_or_many(r, "input", note)
    answers = _one_or_many(r, "output", note)
    if len(answers) > len(questions):
        raise Unusable("output", f"{MORE_ANSWERS}: {len(answers)} and {len(questions)}")
    if not answers:
        raise Unusable("output", NO_ANSWER if questions else EMPTY_CONVERSATION)
    for i, (question, answer) in enumerate(zip(questions, answers)):
        yield _Said("user", question, f"input[{i}]")
        yield _Said("assistant", answer, f"output[{i}]")
    if left := len(questions) - len(answers):
        note("input", f"{OPEN_QUESTION}: {left} of {len(questions)}", "repaired")


def _one_or_many(r: dict[str, Any], key: str, note: Note) -> list[Any]:
    value = r.get(key)
    if value is None or isinstance(value, list):
        return value or []
    if isinstance(value, (bool, dict)):
        raise Unusable(key, f"{NOT_TEXT}: {kind(value)}")
    note(key, ONE_TURN, "repaired")
    return [value]


def _turn_list(r: dict[str, Any], note: Note) -> Iterator[_Said]:
    key = _turns_key(r) or ""
    items = _as_list(r[key])
    if not items:
        raise Unusable(key, EMPTY_CONVERSATION)
    return _items(items, key, note)


def _history(r: dict[str, Any], note: Note) -> Iterator[_Said]:
    yield from _items(_as_list(r.get("history")) or [], "history", note)
    question, answer = _pair_keys(r)
    if "instruction" in r:
        question = "instruction"
    question = question or _first(r, _QUESTIONS)
    if not question or (r[question] is None and r.get(answer or "") is None):
        return
    material = "input" if question != "input" else ""
    yield _Said("user", r[question], question, r.get(material), material)
    if answer:
        yield _Said("assistant", r[answer], answer)


def _items(items: list[Any], key: str, note: Note) -> Iterator[_Said]:
    """Turns as {from, value}, as {question, answer}, or as [question, answer]."""
    for i, item in enumerate(items):
        where = f"{key}[{i}]"
        if isinstance(item, list) and len(item) == 2:
            yield _Said("user", item[0], f"{where}[0]")
            yield _Said("assistant", item[1], f"{where}[1]")
            continue
        if not isinstance(item, dict):
            raise Unusable(where, f"{NOT_A_TURN}: {kind(item)}")
        item = _fold(item, note)
        speaker = _first(item, _SPEAKERS)
        if not speaker:
            yield from _couple(item, where)
            continue
        if any(item.get(tool) for tool in _TOOL_KEYS):
            raise Unusable(where, TOOL_ROLE)
        words = _first(item, _WORDS) or "content"
        role = _role(item[speaker], f"{where}.{speaker}")
        yield _Said(role, _joined(item.get(words), f"{where}.{words}"), f"{where}.{words}")


def _couple(item: dict[str, Any], where: str) -> Iterator[_Said]:
    question, answer = _pair_keys(item)
    if not question or not answer:
        raise Unusable(where, NOT_A_TURN)
    yield _Said("user", item[question], f"{where}.{question}")
    yield _Said("assistant", item[answer], f"{where}.{answer}")


def _role(name: Any, field: str) -> Role:
    if not isinstance(name, str):
        raise Unusable(field, f"{UNKNOWN_ROLE}: {kind(name)}")
    role = _ROLES.get(name) or _ROLES.get(lower := name.strip().lower())
    if role:
        return role
    reason = TOOL_ROLE if lower in _TOOL_ROLES else UNKNOWN_ROLE
    raise Unusable(field, f"{reason}: {shorten(name, 40)}")


def _joined(content: Any, field: str) -> Any:
    """OpenAI's content in parts, as one text."""
    if not isinstance(content, list):
        return content
    parts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if type(text) is not str:
            name = part.get("type") if isinstance(part, dict) else None
            raise Unusable(field, f"{NOT_TEXT}: {shorten(name, 40) if name else kind(part)}")
        parts.append(text)
    return "\n".join(parts)


_READERS: dict[str, Callable[[dict[str, Any], Note], Iterable[_Said]]] = {
    "alpaca": _alpaca,
    "chat": _chat,
    "history": _history,
    "sharegpt": _turn_list,
    "messages": _turn_list,
    "pair": _pair,
}


# From what was said to turns


def _text(r: dict[str, Any], note: Note) -> list[Turn]:
    text = clean(r["text"], "text", note)
    if not text:
        raise Unusable("text", NO_TEXT if text is None else EMPTY_TEXT)
    return [Turn("assistant", text)]


def _converse(said: list[_Said], note: Note) -> list[Turn]:
    """Turns in order: an optional system turn, then user and assistant in strict alternation.

    No turn ever changes its role. What is in the way is merged, left out or cut off with a note:
    answers before the first question, neighbours of one role, a question at the end. From an
    answer or question without words on, the rest of the conversation is cut off; where no whole
    exchange came before it, the record is dropped.
    """
    turns: list[Turn] = []
    cut = False
    for s in said:
        turn, missing = _turn(s, note)
        last = turns[-1].role if turns else "system"
        if turn.role == "system":
            if not turn.text:
                continue
            if last != "system":
                raise Unusable(s.field, LATE_SYSTEM)
        elif turn.role == "assistant" and last == "system":
            note(s.field, LEADING_ANSWER, "repaired")
            continue
        elif fault := _fault(turn, missing):
            if all(t.role != "assistant" for t in turns):
                raise Unusable(s.field, fault)
            note(s.field, f"{CUT}: {fault}", "repaired")
            cut = True
            break
        if turns and last == turn.role:
            turns[-1] = _merged(turns[-1], turn)
            note(s.field, MERGED, "repaired")
        else:
            turns.append(turn)
    if turns and turns[-1].role == "user":
        turns.pop()
        if not turns or turns[-1].role == "system":
            raise Unusable(said[-1].field, NO_ANSWER)
        if not cut:
            note(said[-1].field, OPEN_QUESTION, "repaired")
    if not turns or turns[-1].role == "system":
        raise Unusable(said[0].field if said else "", NO_QUESTION if said else EMPTY_CONVERSATION)
    return turns


def _turn(s: _Said, note: Note) -> tuple[Turn, bool]:
    """One turn with clean text, and whether its text was missing."""
    text = clean(s.value, s.field, note)
    turn = Turn(s.role, text or "")
    if s.input is not None:
        turn.input = clean(s.input, s.input_field, note) or ""
        if turn.input and is_placeholder_input(turn.input):
            note(s.input_field, PLACEHOLDER_INPUT, "repaired")
            turn.input = ""
        if turn.input and not turn.text:
            note(s.input_field, QUESTION_FROM_INPUT, "repaired")
            turn.text, turn.input = turn.input, ""
    return turn, text is None


def _fault(turn: Turn, missing: bool) -> str:
    """Why a turn has nothing to say; "" where it has."""
    if turn.role == "user":
        return "" if turn.text else NO_QUESTION if missing else EMPTY_QUESTION
    if not turn.text:
        return NO_ANSWER if missing else EMPTY_ANSWER
    return PLACEHOLDER_ANSWER if is_placeholder_answer(turn.text) else ""


def _merged(one: Turn, two: Turn) -> Turn:
    words = (w for w in (one.input, two.input) if w)
    return Turn(one.role, f"{one.text}\n{two.text}", "\n".join(words))
