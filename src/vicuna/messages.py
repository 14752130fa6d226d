"""Messages that can be translated: English templates with named fields.

The template is the key under which `vicuna/i18n` has the translation, so that a sentence stands
once, where it is said.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any


class Message(str):
    """A sentence in English that keeps what it was made of.

        Message("{name} is {value}, but must be at least {bound}", name="rank", value=0, bound=1)

    It is a `str`, the finished sentence, and is compared, sorted and written as one. Without
    fields the template is taken as it is, braces and all. A field may be a message itself: a
    translation translates it, too.

    Attributes:
        template: the sentence with {places} for its fields.
        fields: str, int, float or Message by name.
    """

    __slots__ = ("fields", "template")
    template: str
    fields: dict[str, Any]

    def __new__(cls, template: str, /, **fields: Any) -> Message:
        return cls.of(template.format(**fields) if fields else template, template, fields)

    @classmethod
    def of(cls, text: str, template: str, fields: Mapping[str, Any]) -> Message:
        """A message whose sentence is known already, and need not be made again."""
        message = super().__new__(cls, text)
        message.template = str(template)
        message.fields = {name: _plain(value) for name, value in fields.items()}
        return message

    def __reduce__(self) -> tuple[Any, ...]:
        return Message.of, (str(self), self.template, self.fields)

    def cleaned(self, clean: Callable[[str], str]) -> Message:
        """The message with every text of it passed through a function."""
        fields = {
            name: value.cleaned(clean)
            if isinstance(value, Message)
            else clean(value)
            if isinstance(value, str)
            else value
            for name, value in self.fields.items()
        }
        return Message.of(clean(str(self)), self.template, fields)

    @property
    def as_json(self) -> dict[str, Any]:
        """The message as plain data; `from_json` makes it again."""
        fields = {k: v.as_json if isinstance(v, Message) else v for k, v in self.fields.items()}
        return {"text": str(self), "template": self.template, "fields": fields}

    @classmethod
    def from_json(cls, data: Any) -> Message:
        """The message that `as_json` wrote.

        The data may come from a file of somebody else: the template is never filled in, only
        looked up.

        Raises: ValueError if the data are not a message.
        """
        match data:
            case {"text": str(text), "template": str(template), "fields": dict(fields)}:
                made = {
                    str(k): cls.from_json(v) if isinstance(v, dict) else v
                    for k, v in fields.items()
                }
                return cls.of(text, template, made)
        raise ValueError("not a message")


def _plain(value: Any) -> Any:
    """A field as it can be pickled, written as JSON and formatted again."""
    if isinstance(value, (str, int, float)):
        return value
    if getattr(value, "ndim", None) == 0:  # numpy's and torch's numbers
        return value.item()
    return str(value)


def message(template: str, /, **fields: Any) -> Message:
    """A message of a template and its fields; one that is made already stays as it is."""
    return template if isinstance(template, Message) else Message(template, **fields)


def lines(messages: Iterable[str], bullet: str = "") -> Message:
    """Several messages as one, each on a line of its own."""
    return joined((Message(f"{bullet}{{line}}", line=message(m)) for m in messages), "\n")


def joined(messages: Iterable[str], separator: str = ", ") -> Message:
    """Several messages in a row."""
    fields = {f"part{i}": message(m) for i, m in enumerate(messages)}
    return Message(separator.join(f"{{{name}}}" for name in fields), **fields)


def with_messages(data: dict[str, Any]) -> dict[str, Any]:
    """Plain data for JSON, with a table `messages` of the messages in it that have fields.

    In JSON a message is its English sentence; `restored` finds the message of a sentence again.
    """
    table: dict[str, Any] = {}
    _collect(data, table)
    return {**data, "messages": table} if table else data


def _collect(value: Any, table: dict[str, Any]) -> None:
    if isinstance(value, Message):
        if value.fields:
            table[str(value)] = value.as_json
    elif isinstance(value, dict):
        for inner in value.values():
            _collect(inner, table)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _collect(inner, table)


def restored(data: dict[str, Any], clean: Callable[[str], str] = str) -> dict[str, Any]:
    """The data that `with_messages` wrote, with messages in the place of their sentences.

    Args:
        clean: called with every text of a message, if the data come from somebody else.
    """
    table = data.get("messages")
    if not isinstance(table, dict):
        return data
    known: dict[str, Message] = {}
    for written in table.values():
        with contextlib.suppress(ValueError, RecursionError):
            message = Message.from_json(written).cleaned(clean)
            known[str(message)] = message

    def mend(value: Any) -> Any:
        if isinstance(value, str):
            return known.get(value, value)
        if isinstance(value, dict):
            return {k: mend(v) for k, v in value.items()}
        return [mend(v) for v in value] if isinstance(value, list) else value

    return {k: mend(v) for k, v in data.items() if k != "messages"}
