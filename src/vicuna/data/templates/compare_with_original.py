"""Whether a template and a tokenizer together teach what the base's makers would.

Tried on a few conversations when a base and a template are first met: the ids of a training example
against those of the template's own rendering of the whole conversation, which is what
`apply_chat_template` gives. Where they differ, one line says in what.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vicuna.data.conversation import Conversation, Turn
from vicuna.data.loss_mask import NO_TARGET, Example
from vicuna.data.templates.renderer import Renderer

_ASKED = Turn("user", "How are you? 你好吗？")
_TWO = [
    _ASKED,
    Turn("assistant", "很好。I am fine."),
    Turn("user", '"1234" + 5 = ?\n\n  <算> & 说\n'),
    Turn("assistant", "1239.\n\n```\n  x\n```"),
]
_THOUGHT = [*_TWO[:3], Turn("assistant", "1239。", thought="一共 1239。\n对。")]
PROBES = {
    "of two questions": _TWO,
    "with a system prompt": [Turn("system", "你是诗人。Be short."), *_TWO],
    "with a thought": _THOUGHT,
}


def differences(renderer: Renderer, thoughts: bool = False) -> list[str]:
    """In what training examples differ from the whole rendering, and why; none if in nothing.

    thoughts: ask about a conversation with a thought, and no others.
    """
    template = renderer.template.choose()  # with no notes of what was asked before
    found: dict[str, None] = {}
    for name, turns in PROBES.items():
        if thoughts != (turns is _THOUGHT):
            continue
        before = set(template.notes)
        pieces = template.examples(Conversation(turns))[-1]
        ids = renderer.tokenizer.encode(pieces, renderer.end_id).ids.tolist()
        text = template.reference(turns)
        if text is None:
            text = renderer.spelled(pieces)
        wanted = renderer.tokenizer.reference(text)
        notes = [n for n in template.notes if n not in before]
        found.update(dict.fromkeys(notes))
        if ids != wanted and not template.notes:
            found[f"a conversation {name}: {_difference(renderer, ids, wanted)}"] = None
    return list(found)


def lines_for(renderer: Renderer, examples: Sequence[Example]) -> list[str]:
    """The same for these examples: what concerns thoughts only if some of them hold one."""
    lines = differences(renderer)
    if share_of_thoughts(examples, renderer):
        lines += differences(renderer, thoughts=True)
    return [f"template {renderer.template.name}: {line}" for line in lines]


def _difference(renderer: Renderer, ids: Sequence[int], wanted: Sequence[int]) -> str:
    same = next((i for i, (a, b) in enumerate(zip(ids, wanted)) if a != b), None)
    at = min(len(ids), len(wanted)) if same is None else same

    def near(some: Sequence[int]) -> str:
        return " ".join(renderer.tokenizer.token(i) for i in some[max(0, at - 1) : at + 3])

    return (
        f"training has {near(ids)!r} and one call of the tokenizer {near(wanted)!r}, "
        "because an answer is encoded apart from what stands beside it"
        if renderer.tokenizer.decode(ids) == renderer.tokenizer.decode(wanted)
        else f"training has {near(ids)!r}, the template's own rendering {near(wanted)!r}"
    )


def share_of_thoughts(examples: Iterable[Example], renderer: Renderer) -> float:
    """The share of examples whose learned answers hold a thought."""
    close = renderer.template.thought_marks().close.strip()
    count = thoughts = 0
    for example in examples:
        in_loss = example.ids[1:][example.labels[:-1] != NO_TARGET].tolist()
        whole = example.ids.tolist() if not renderer.template.thinking_loss else in_loss
        thoughts += bool(close) and close in renderer.tokenizer.spelled(whole)
        count += 1
    return thoughts / count if count else 0.0
