"""How byte-level BPE families cut text before merging: their name in GGUF, and in tokenizer.json.

A GGUF file names only the family (`tokenizer.ggml.pre`); a tokenizer.json spells the rule out. Both
directions are needed: to read the tokenizer of a GGUF file, and to write one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA3 = _WORDS + r"|\p{N}{1,3}" + _REST
_QWEN2 = _WORDS + r"|\p{N}" + _REST
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_LETTERS[0]}*{_LETTERS[1]}+"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_LETTERS[0]}+{_LETTERS[1]}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Family:
    """A rule. steps: regular expressions text is split by, or `digits` (each digit by itself), or
    `gpt2` (the rule built into the byte-level step). ignore_merges: a word that is a token as a
    whole is taken at once. composed: text is brought into Unicode's form NFC first."""

    name: str
    steps: tuple[str, ...]
    ignore_merges: bool = False
    composed: bool = False


FAMILIES = (
    Family("gpt-2", ("gpt2",)),
    Family("smollm", ("digits", "gpt2")),
    Family("llama-bpe", (_LLAMA3,), ignore_merges=True),
    Family("qwen2", (_QWEN2,), composed=True),
    Family("tekken", (_TEKKEN,), ignore_merges=True),
)


def by_name(name: str) -> Family | None:
    """The family that GGUF calls so, where it is known here."""
    return next((f for f in FAMILIES if f.name == name), None)


def by_rule(tokenizer: dict[str, Any]) -> Family | None:
    """The family of a tokenizer.json (parsed), where it is known here."""
    steps = _steps(tokenizer.get("pre_tokenizer"))
    return next((f for f in FAMILIES if f.steps == steps), None)


def _steps(part: dict[str, Any] | None) -> tuple[str, ...]:
    kind = (part or {}).get("type")
    if part is None or kind is None:
        return ()
    if kind == "Sequence":
        return tuple(s for inner in part["pretokenizers"] for s in _steps(inner))
    if kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
        return (str(part["pattern"].get("Regex")),)
    if kind == "Digits" and part.get("individual_digits"):
        return ("digits",)
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return ("gpt2",) if part.get("use_regex", True) else ()
    return (f"unknown {kind}",)


def rule(family: Family) -> dict[str, Any]:
    """The `pre_tokenizer` of a tokenizer.json for a family."""
    parts: list[dict[str, Any]] = []
    for step in family.steps:
        if step == "digits":
            parts.append({"type": "Digits", "individual_digits": True})
        elif step != "gpt2":
            pattern = {"Regex": step}
            parts.append(
                {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
            )
    last = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": "gpt2" in family.steps,
    }
    return {"type": "Sequence", "pretokenizers": [*parts, last]}
