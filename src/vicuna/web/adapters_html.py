"""Cards of adapters, as HTML."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from html import escape

from vicuna.runs.log import RunLog
from vicuna.serve.registry import AdapterInfo
from vicuna.web.charts import Curve, curves
from vicuna.web.error_texts import in_words

Say = Callable[..., str]


def cards(found: list[AdapterInfo], mix: Mapping[str, float], writable: bool, say: Say) -> str:
    """A card for each adapter; those of the mix are marked and say their strength."""
    if not found:
        return f'<div class="v-note empty"><p>{say("adapters.none")}</p></div>'
    inner = "".join(_card(card, mix.get(card.path), writable, say) for card in found)
    return f'<div class="v-cards">{inner}</div>'


def _card(card: AdapterInfo, strength: float | None, writable: bool, say: Say) -> str:
    if card.problem:
        return _unreadable(card, say)
    used = strength is not None
    rows = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in _facts(card, say) if value)
    delete = (
        f'<button type="button" class="v-text-act" data-act="delete" '
        f'data-of="{escape(card.path)}">{say("adapters.delete")}</button>'
        if writable and card.changed
        else ""
    )
    return (
        f'<article class="v-card{" on" if used else ""}"><header><h3>{escape(card.name)}</h3>'
        f"{delete}</header><dl>{rows}</dl>{_loss(card, say)}"
        f"<footer>{_use(card, strength, say)}</footer>"
        "</article>"
    )


def _unreadable(card: AdapterInfo, say: Say) -> str:
    words = escape(in_words(card.problem, say))
    return (
        f'<article class="v-card"><header><h3>{escape(card.name)}</h3></header>'
        f'<div class="v-note error"><p>{say("adapters.unreadable")}</p><p>{words}</p></div>'
        "</article>"
    )


def _facts(card: AdapterInfo, say: Say) -> list[tuple[str, str]]:
    rank = f"{card.rank} · α {card.alpha:g}" if card.rank else ""
    size = f"{card.size / 1e6:,.1f} MB" if card.size else ""
    date = time.strftime("%Y-%m-%d %H:%M", time.localtime(card.changed)) if card.changed else ""
    mixed = ", ".join(f"{escape(name)} {weight:g}" for name, weight in card.mixed)
    return [
        (say("adapters.base"), escape(card.base) or say("adapters.unknown")),
        (say("adapters.rank"), rank),
        (say("adapters.template"), escape(card.template)),
        (say("adapters.data"), escape(", ".join(card.data))),
        (say("adapters.mixed"), mixed),
        (say("adapters.size"), size),
        (say("adapters.date"), date),
    ]


def _loss(card: AdapterInfo, say: Say) -> str:
    """The run's loss over its updates, where it is known."""
    if card.log is None:
        return ""
    log = RunLog(card.log)
    try:
        log.read()
    except OSError:
        return ""
    held_out = [e for e in log.evaluations if e.get("loss") is not None]
    found = [
        Curve(say("adapters.loss"), log.steps["step"], log.steps["loss"], "faint"),
        Curve(
            say("adapters.held_out"), [e["step"] for e in held_out],
            [e["loss"] for e in held_out], "dots", 1,
        ),
    ]  # fmt: skip
    return curves(found, say("adapters.loss"), "")


def _use(card: AdapterInfo, strength: float | None, say: Say) -> str:
    checked = " checked" if strength is not None else ""
    path = escape(card.path)
    now = 1.0 if strength is None else strength
    off = " disabled" if strength is None else ""
    return (
        f'<label class="v-check"><input type="checkbox" data-act="use" data-of="{path}"{checked}>'
        f"{say('adapters.use')}</label>"
        f'<label class="v-strength{off}">{say("adapters.strength")} <input type="range" min="-1" '
        f'max="2" step="0.05" value="{now:g}" data-act="strength" data-of="{path}"{off}>'
        f"<output>{now:.2f}</output></label>"
    )
