"""What other projects and services write: MOSS, ChatGPT's and DeepSeek's exports, OpenAssistant.

Also the names of forms that are recognised and cannot be read, each with the way out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from vicuna.data.records.content_parts import joined, thinking
from vicuna.data.records.field_names import empty
from vicuna.data.records.reasons import (
    EMPTY_CONVERSATION,
    LABEL_STUDIO,
    MEDIA,
    ONLY_TEXT_PAIR,
    PASSAGES,
    SEGMENTS,
    TOKEN_IDS,
    TOOL,
    TREE_MESSAGE,
    Unusable,
    shorten,
)
from vicuna.data.records.record import Record, number_of, says
from vicuna.data.records.turn_lists import role_of
from vicuna.data.records.turn_order import Utterance
from vicuna.messages import Message

_MOSS_BEGIN = re.compile(r"\A\s*<\|[^|<>]{1,30}\|>\s*[:：]?\s*")
_MOSS_END = re.compile(r"(?:\s|<eo[a-z]>)+\Z")
_TURN_NAME = re.compile(r"turn_?(\d+)", re.IGNORECASE)


# A record of a form of this module, or one that it refuses, has one of these.
KEYS = (
    *("parent_id", "input_ids", "token_ids", "segments", "paragraphs", "qas", "pos"),
    *("positive_passages", "annotations", "mapping", "chat", "prompt"),
)


def refusal(values: dict[str, Any]) -> str | None:
    """The reason for a form that is known and cannot be read; None where it is none of them."""
    if "parent_id" in values and "text" in values and "role" in values:
        return TREE_MESSAGE
    if "input_ids" in values or "token_ids" in values:
        return TOKEN_IDS
    if isinstance(values.get("segments"), list):
        return SEGMENTS
    if "paragraphs" in values or "qas" in values:
        return PASSAGES
    if "query" in values and ("pos" in values or "positive_passages" in values):
        return ONLY_TEXT_PAIR
    if "annotations" in values and "data" in values:
        return LABEL_STUDIO
    return None


# MOSS


def is_moss(values: dict[str, Any]) -> bool:
    """Whether this is MOSS 003: {"chat": {"turn_1": {"Human": …, "MOSS": …}}}."""
    chat = values.get("chat")
    return isinstance(chat, dict) and any(_TURN_NAME.fullmatch(str(k)) for k in chat)


def moss(record: Record) -> Iterator[Utterance]:
    """MOSS 003; a turn that commands a tool drops the record."""
    chat = record.take("chat")
    numbered = [(int(m[1]), k) for k in chat if (m := _TURN_NAME.fullmatch(str(k)))]
    for _, key in sorted(numbered):
        turn, where = chat[key], f"chat.{key}"
        if not isinstance(turn, dict):
            raise Unusable(where, EMPTY_CONVERSATION)
        turn = {str(k).strip().lower().replace(" ", "_"): _unmarked(v) for k, v in turn.items()}
        for tool in ("commands", "tool_responses", "results"):
            if not empty(turn.get(tool)):
                raise Unusable(where, Message("{reason}: {tool}", reason=TOOL, tool=tool))
        thought = turn.get("inner_thoughts")
        yield Utterance("user", turn.get("human"), f"{where}.Human")
        yield Utterance(
            "assistant",
            turn.get("moss"),
            f"{where}.MOSS",
            thought=None if empty(thought) else thought,
        )


def _unmarked(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return _MOSS_END.sub("", _MOSS_BEGIN.sub("", value))


# Trees of messages


def is_tree(values: dict[str, Any]) -> bool:
    """Whether this is a conversation of ChatGPT's or DeepSeek's export."""
    mapping = values.get("mapping")
    return isinstance(mapping, dict) and any(isinstance(n, dict) for n in mapping.values())


def tree(record: Record) -> list[Utterance]:
    """The branch of an exported conversation that was kept: from `current_node` to the root."""
    mapping = record.take("mapping")
    record.used.update(k for k in _ABOUT if k in record.values)
    node = record.take("current_node")
    if node not in mapping:
        node = _newest(mapping)
    branch: list[tuple[str, Any]] = []
    while isinstance(mapping.get(node), dict) and len(branch) <= len(mapping):
        branch.append((node, mapping[node].get("message")))
        node = mapping[node].get("parent")
    utterances: list[Utterance] = []
    thought: list[str] = []
    for name, message in reversed(branch):
        if not isinstance(message, dict):
            continue
        for one in _message(message, f"mapping.{shorten(str(name), 40)}", record):
            if one.field == "":
                thought += [one.thought] if one.thought else []
                continue
            if one.role == "assistant" and thought:
                one = one._replace(thought="\n".join(thought))
                thought = []
            utterances.append(one)
    if not utterances:
        raise Unusable("mapping", EMPTY_CONVERSATION)
    return utterances


# What an export says about a conversation, and is no part of it.
_ABOUT = (
    *("title", "create_time", "update_time", "moderation_results", "plugin_ids", "is_archived"),
    *("conversation_template_id", "gizmo_id", "gizmo_type", "default_model_slug", "is_starred"),
    *("inserted_at", "updated_at", "voice", "async_status", "safe_urls", "blocked_urls"),
    *("disabled_tool_ids", "conversation_origin", "memory_scope", "context_scopes", "owner"),
)


def _newest(mapping: dict[str, Any]) -> str:
    """The end of the branch that was written last: the last child of each last child."""
    roots = [
        k for k, n in mapping.items() if isinstance(n, dict) and n.get("parent") not in mapping
    ]
    node = roots[-1] if roots else next(iter(mapping))
    seen: set[str] = set()
    while node not in seen:
        seen.add(node)
        children = mapping[node].get("children") if isinstance(mapping[node], dict) else None
        known = [c for c in children or [] if c in mapping]
        if not known:
            break
        node = known[-1]
    return node


def _message(message: dict[str, Any], where: str, record: Record) -> Iterator[Utterance]:
    if isinstance(message.get("fragments"), list):
        yield from _fragments(message["fragments"], where)
        return
    about = message.get("metadata") or {}
    hidden = about.get("is_visually_hidden_from_conversation")
    if (hidden or about.get("is_user_system_message")) and not _hidden_words(message):
        return
    author = message.get("author") or {}
    name = author.get("role") if isinstance(author, dict) else author
    content = message.get("content") or {}
    form = content.get("content_type", "text") if isinstance(content, dict) else "text"
    if form in ("thoughts", "reasoning_recap"):
        thoughts = content.get("thoughts") or []
        yield Utterance("assistant", None, "", thought=thinking(thoughts))
        return
    if form in ("user_editable_context", "model_editable_context"):
        profile = content.get("user_instructions") or content.get("user_profile")
        if not empty(profile):
            yield Utterance("system", profile, where)
        return
    if not empty(about.get("attachments")):
        raise Unusable(where, Message("{reason}: attachments", reason=MEDIA))
    if message.get("recipient") not in (None, "all") or form in ("code", "execution_output"):
        raise Unusable(where, TOOL)
    role = role_of(name, where)
    value, thought = joined(content, where, record)
    if role == "system" and empty(value):
        return
    if role != "user" and empty(value) and not thought:
        return  # steps without words, which the service hides as well
    in_loss = says(message.get("weight", 1)) is not False
    yield Utterance(role, value, where, thought=thought, in_loss=in_loss or role != "assistant")


def _hidden_words(message: dict[str, Any]) -> bool:
    """Whether a message that is hidden still tells the model something."""
    content = message.get("content") or {}
    return isinstance(content, dict) and content.get("content_type") == "user_editable_context"


def _fragments(fragments: list[Any], where: str) -> Iterator[Utterance]:
    """DeepSeek's: REQUEST, THINK and RESPONSE in one message."""
    for fragment in fragments:
        if not isinstance(fragment, dict):
            continue
        name, words = str(fragment.get("type", "")).upper(), fragment.get("content")
        if name == "REQUEST":
            yield Utterance("user", words, where)
        elif name == "THINK":
            yield Utterance("assistant", None, "", thought=words)
        elif name == "RESPONSE":
            yield Utterance("assistant", words, where)
        elif name in ("SEARCH", "TOOL", "READ_LINK"):
            raise Unusable(where, Message("{reason}: {name}", reason=TOOL, name=name))


# OpenAssistant


def is_assistant_tree(values: dict[str, Any]) -> bool:
    """Whether this is a tree of OpenAssistant: a prompt whose replies have replies."""
    prompt = values.get("prompt")
    return isinstance(prompt, dict) and isinstance(prompt.get("replies"), list) and "text" in prompt


def assistant_tree(record: Record) -> Iterator[Utterance]:
    """The branch of the best-ranked replies; deleted ones do not count."""
    node, where = record.take("prompt"), "prompt"
    record.used.update(("message_tree_id", "tree_state"))
    while isinstance(node, dict):
        role = role_of(node.get("role"), f"{where}.role")
        yield Utterance(role, node.get("text"), f"{where}.text")
        replies = [
            r
            for r in node.get("replies") or []
            if isinstance(r, dict) and not r.get("deleted") and r.get("review_result") is not False
        ]
        replies.sort(key=lambda r: (r.get("rank") is None, number_of(r.get("rank")) or 0.0))
        node, where = (replies[0] if replies else None), f"{where}.replies"
