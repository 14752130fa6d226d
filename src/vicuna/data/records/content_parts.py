"""Contents in parts, `[{"type": "text", "text": ...}]`, as one text, and the thought among them."""

from __future__ import annotations

from typing import Any

from vicuna.data.records.field_names import empty
from vicuna.data.records.parse_values import kind
from vicuna.data.records.reasons import MEDIA, NOT_TEXT, TOOL, Unusable, shorten
from vicuna.data.records.record import Record
from vicuna.messages import Message


def thinking(value: Any) -> Any:
    """A thought as one text, also where it comes in parts."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return value
    parts = []
    for part in value:
        if isinstance(part, dict):
            part = next((part[k] for k in _THOUGHT_WORDS if part.get(k)), None)
            part = thinking(part)
        if isinstance(part, str):
            parts.append(part)
    return "\n".join(parts) if parts else None


_THOUGHT_WORDS = ("thinking", "reasoning", "text", "content", "summary", "value")
_THOUGHT_PARTS = frozenset(("thinking", "reasoning", "thought", "think", "thoughts", "analysis"))
_TEXT_PARTS = frozenset(("text", "input_text", "output_text", "refusal"))


def joined(content: Any, field: str, record: Record) -> tuple[Any, Any]:
    """Content in parts as one text, and the thought among them.

    Raises: Unusable where a part is no text.
    """
    if isinstance(content, dict) and isinstance(content.get("parts"), list):
        content = content["parts"]  # Gemini's, ChatGPT's
    elif isinstance(content, dict) and ("text" in content or "type" in content):
        content = [content]
    if not isinstance(content, list):
        return content, None
    parts: list[str] = []
    thoughts: list[Any] = []
    for part in content:
        if not isinstance(part, dict):
            if type(part) is not str:
                raise Unusable(field, Message("{reason}: {type}", reason=NOT_TEXT, type=kind(part)))
            parts.append(part)
            continue
        name = part.get("type")
        if name in _THOUGHT_PARTS or part.get("thought") is True:
            thoughts.append(thinking(part))
            continue
        text = part.get("text")
        if isinstance(text, dict):
            text = text.get("value")
        if type(text) is not str or (name is not None and name not in _TEXT_PARTS):
            raise Unusable(field, _foreign(name, part))
        parts.append(text)
        for key, value in part.items():
            if key not in ("type", "text", "thought") and not empty(value) and key != "id":
                outer = field.split("[")[0]
                record.leave(f"{outer}[].{field.rsplit('.', 1)[-1]}[].{key}")
    texts = [t for t in thoughts if t]
    return "\n".join(parts), ("\n".join(texts) if texts else None)


def _foreign(name: Any, part: dict[str, Any]) -> str:
    """The reason for a part that is no text."""
    words = str(name) if name else ", ".join(map(str, part))
    lower = words.lower()
    if any(m in lower for m in ("image", "audio", "video", "file", "inline_data", "inlinedata")):
        return f"{MEDIA}: {shorten(words, 40)}"
    if "tool" in lower or "function" in lower:
        return f"{TOOL}: {shorten(words, 40)}"
    return f"{NOT_TEXT}: {shorten(words, 40) if words else kind(part)}"
