"""Cards of adapters, as HTML (`templates/adapters.html`)."""

from __future__ import annotations

import time
from collections.abc import Mapping

from markupsafe import Markup

from vicuna.runs.log import RunLog
from vicuna.serve.registry import AdapterInfo
from vicuna.web.charts import Curve, curves
from vicuna.web.error_texts import localize_error
from vicuna.web.render import Translate, join, render


def cards(
    found: list[AdapterInfo], mix: Mapping[str, float], writable: bool, tr: Translate
) -> Markup:
    """A card for each adapter; those of the mix are marked and show their strength."""
    if not found:
        return render("adapters.empty", text=tr("adapters.none"))
    inner = [_card(card, mix.get(card.path), writable, tr) for card in found]
    return render("adapters.cards", inner=join(inner))


def _card(card: AdapterInfo, strength: float | None, writable: bool, tr: Translate) -> Markup:
    if card.problem:
        why = localize_error(card.problem, tr)
        return render(
            "adapters.unreadable", name=card.name, what=tr("adapters.unreadable"), why=why
        )
    return render(
        "adapters.card", name=card.name, path=card.path, strength=strength,
        facts=_facts(card, tr), loss=_loss(card, tr),
        can_delete=bool(writable and card.changed), tr=tr,
    )  # fmt: skip


def _facts(card: AdapterInfo, tr: Translate) -> list[tuple[str, str]]:
    rank = f"{card.rank} · α {card.alpha:g}" if card.rank else ""
    size = f"{card.size / 1e6:,.1f} MB" if card.size else ""
    date = time.strftime("%Y-%m-%d %H:%M", time.localtime(card.changed)) if card.changed else ""
    mixed = ", ".join(f"{name} {weight:g}" for name, weight in card.mixed)
    return [
        (tr("adapters.base"), card.base or tr("adapters.unknown")),
        (tr("adapters.rank"), rank),
        (tr("adapters.template"), card.template),
        (tr("adapters.data"), ", ".join(card.data)),
        (tr("adapters.mixed"), mixed),
        (tr("adapters.size"), size),
        (tr("adapters.date"), date),
    ]


def _loss(card: AdapterInfo, tr: Translate) -> Markup:
    """The run's loss over its updates, where it is known."""
    if card.log is None:
        return Markup()
    log = RunLog(card.log)
    try:
        log.read()
    except OSError:
        return Markup()
    held_out = [e for e in log.evaluations if e.get("loss") is not None]
    found = [
        Curve(tr("adapters.loss"), log.steps["step"], log.steps["loss"], "faint"),
        Curve(
            tr("adapters.held_out"), [e["step"] for e in held_out],
            [e["loss"] for e in held_out], "dots", 1,
        ),
    ]  # fmt: skip
    return curves(found, tr("adapters.loss"), "")
