"""What the tab Train shows, as HTML: a run as it is now, its curves and answers, a memory plan."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from vicuna import untrusted
from vicuna.paths import shell_word
from vicuna.runs import process
from vicuna.runs.manager import RECIPE, Run
from vicuna.train.progress import smooth
from vicuna.web import charts
from vicuna.web.charts import Curve
from vicuna.web.error_texts import localize_error
from vicuna.web.render import Translate, join, note, render

GIB = 1 << 30
WARNINGS = 8  # the newest of a run
EARLIER = 12  # older answers to a question
OUTPUT_LINES = 60
# States that need a word beside their name.
_EXPLAINED = ("starting", "pausing", "paused", "stopped", "killed")


# -- a run ---------------------------------------------------------------------------------------


def head(run: Run, tr: Translate) -> Markup:
    """State, progress, and the numbers of now."""
    log = run.log
    place, share = "", None
    if log.total:
        share = 100 * log.step / log.total
        place = tr("train.of_steps", step=log.step, total=log.total)
        left = log.seconds_left() if run.state == "running" else None
        if left is not None:
            place += f" · {tr('train.left', time=duration(left, tr))}"
    return render(
        "train.head", name=run.name, state=run.state, chip=_chip(run, tr), place=place,
        share=share, numbers=_numbers(run, tr), notes=_notes(run, tr),
    )  # fmt: skip


def _chip(run: Run, tr: Translate) -> Markup:
    return render("common.chip", kind=run.state, text=tr(f"state.{run.state}"))


def _numbers(run: Run, tr: Translate) -> Markup:
    log = run.log
    best = [e["loss"] for e in log.evaluations if e.get("loss") is not None]
    cells = [
        ("train.loss", log.now("loss"), "{:.4f}"),
        ("train.held_out", min(best, default=None), "{:.4f}"),
        ("train.tokens_per_second", log.now("tokens_per_second"), "{:,.0f}"),
        ("train.memory", log.now("memory_gib"), "{:.1f}"),
        ("train.rate", log.now("learning_rate"), "{:.2e}"),
    ]
    return join(
        [
            render("common.number", kind="", value=form.format(value), text=tr(key))
            for key, value, form in cells
            if value is not None
        ]
    )


def _notes(run: Run, tr: Translate) -> Markup:
    """What the state means, and what the run warned of."""
    notes = []
    if run.state in ("failed", "unreadable"):
        notes.append(note("error", *localize_error(run.error, tr).split("\n", 1)))
    elif run.error:
        head, *more = localize_error(run.error, tr).split("\n", 1)
        notes.append(note("warn", tr("train.not_resumed", words=head), *more))
    elif run.state in _EXPLAINED:
        kind = {"killed": "error", "starting": "busy", "pausing": "busy"}.get(run.state, "good")
        notes.append(note(kind, tr(f"train.{run.state}_words")))
    elif run.state == "running":
        notes.append(render("train.fine", text=tr("train.goes_on")))
    if run.log.odd:
        notes.append(note("warn", tr("train.odd_lines", count=run.log.odd)))
    newest = [localize_error(w.get("message", ""), tr) for w in run.log.warnings[-WARNINGS:]]
    if run.state == "failed" or (newest and newest[-1].startswith("KeyboardInterrupt")):
        newest = newest[:-1]
    return join([*notes, *(note("warn", text) for text in dict.fromkeys(newest))])


def duration(seconds: float, tr: Translate) -> str:
    """A time to wait, in two units at most."""
    if seconds < 90:
        return tr("time.seconds", n=round(seconds))
    minutes = round(seconds / 60)
    if minutes < 90:
        return tr("time.minutes", n=minutes)
    hours, rest = divmod(minutes, 60)
    if hours < 48:
        return tr("time.hours", h=hours, n=rest)
    return tr("time.days", d=hours // 24, h=hours % 24)


def loss_chart(run: Run, others: Sequence[Run], tr: Translate) -> Markup:
    """Loss and eval loss of a run; of several runs, a colour each."""
    runs = [run, *others]
    found = [curve for i, r in enumerate(runs) for curve in _curves(r, i, len(runs) > 1, tr)]
    end = max(r.log.total for r in runs)
    drawn = charts.curves(
        found, tr("train.chart_loss"), tr("train.update"), end, lambda v: f"{v:.4f}"
    )
    return drawn or note("empty", tr("train.no_curve"))


def _curves(run: Run, colour: int, several: bool, tr: Translate) -> list[Curve]:
    steps, losses = run.log.steps["step"], run.log.steps["loss"]
    known = [(x, y) for x, y in zip(steps, losses) if y == y]
    x, y = [p[0] for p in known], [p[1] for p in known]
    evals = [(e["step"], e["loss"]) for e in run.log.evaluations if e.get("loss") is not None]
    e_x, e_y = [p[0] for p in evals], [p[1] for p in evals]
    if several:
        dotted = f"{run.name}, {tr('train.evaluation')}"
        return [
            Curve(run.name, x, smooth(y), "line", colour),
            Curve(dotted, e_x, e_y, "dots", colour),
        ]
    return [
        Curve(tr("train.each"), x, y, "faint", 0),
        Curve(tr("train.smoothed"), x, smooth(y), "line", 0),
        Curve(tr("train.evaluation"), e_x, e_y, "dots", 1),
    ]


def other_charts(run: Run, tr: Translate) -> Markup:
    """Learning rate and speed, small."""
    steps = run.log.steps
    drawn = [
        charts.curves(
            [Curve("", steps["step"], steps[name], "line", colour)],
            tr(title),
            tr("train.update"),
            run.log.total,
        )
        for name, title, colour in (
            ("learning_rate", "train.chart_rate", 2),
            ("tokens_per_second", "train.chart_speed", 0),
        )
    ]
    return render("train.pair", inner=join(drawn)) if any(drawn) else Markup()


def samples(run: Run, tr: Translate) -> Markup:
    """The newest answer to each question, and the earlier ones folded away."""
    if not run.log.samples:
        has_prompts = bool(run.settings().get("sample_prompts"))
        return note("empty", tr("train.samples_to_come" if has_prompts else "train.no_samples"))
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for sample in run.log.samples:
        by_prompt.setdefault(str(sample.get("prompt", "")), []).append(sample)
    return join([_answers(prompt, answers, tr) for prompt, answers in by_prompt.items()])


def _answers(prompt: str, answers: Sequence[dict[str, Any]], tr: Translate) -> Markup:
    *earlier, newest = answers
    older = join([_answer(sample, tr) for sample in reversed(earlier[-EARLIER:])])
    return render(
        "train.sample", prompt=prompt, newest=_answer(newest, tr), earlier=older,
        title=tr("train.earlier"),
    )  # fmt: skip


def _answer(sample: dict[str, Any], tr: Translate) -> Markup:
    step = tr("train.steps", step=int(sample.get("step", 0)))
    text = str(sample.get("answer", ""))
    return render("train.answer", step=step, text=text, nothing=tr("train.nothing_said"))


def output(run: Run) -> str:
    """The end of what its process printed."""
    if run.state == "unreadable":
        return ""
    lines = process.tail(run.path).splitlines()[-OUTPUT_LINES:]
    return "\n".join(line.rstrip() for line in lines)


def output_size(run: Run) -> int:
    """How much it printed, in bytes: whether there is something new."""
    try:
        return (run.path / process.OUTPUT).stat().st_size
    except OSError:
        return 0


def commands(run: Run) -> str:
    """What to type in a terminal to do the same."""
    if run.state == "unreadable":
        return ""
    path = shell_word(untrusted.text(run.path))
    lines = []
    if (run.path / RECIPE).is_file():
        lines.append(f"vicuna train {shell_word(untrusted.text(run.path / RECIPE))}")
    if run.state not in ("finished", "running", "starting"):
        lines.append(f"vicuna train --resume {path}")
    if run.has_adapter:
        lines.append(f"vicuna chat --adapter {path}")
        lines.append(f"vicuna generate --adapter {path} '你好'")
    return "\n".join(lines)


def all_runs(runs: Sequence[Run], tr: Translate) -> Markup:
    """A row a run, the newest first."""
    if not runs:
        return note("empty", tr("train.no_runs"))
    names = ("run", "state", "updates", "loss", "held_out", "when")
    numbers = ("updates", "loss", "held_out")
    cells = [("n" if name in numbers else "", tr(f"train.{name}")) for name in names]
    rows = join([_row(run, tr) for run in runs])
    return render("common.table", head=render("train.run_head", cells=cells), rows=rows)


def _row(run: Run, tr: Translate) -> Markup:
    loss = run.log.now("loss")
    best = min((e["loss"] for e in run.log.evaluations if e.get("loss") is not None), default=None)
    began = run.log.first_time
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(began)) if began else ""
    cells = (
        f"{run.log.step:,} / {run.log.total:,}" if run.log.total else "",
        f"{loss:.4f}" if loss is not None else "",
        f"{best:.4f}" if best is not None else "",
    )
    return render("train.run_row", name=run.name, chip=_chip(run, tr), cells=cells, when=when)


# -- before a run --------------------------------------------------------------------------------


def mistakes(error: Exception, tr: Translate, title: str = "train.mistakes") -> Markup:
    """All that must be fixed."""
    found = getattr(error, "mistakes", None) or [error]
    lines = [localize_error(m, tr) for m in found]
    return render("train.mistakes", title=tr(title), mistakes=lines)


def plan(found: dict[str, Any], batch: int, tr: Translate) -> Markup:
    """A memory plan: whether it fits, what takes how much, what was chosen and why."""
    memory, peak = found["device"]["memory_bytes"], found["peak_bytes"]
    fits = bool(found["fits"])
    about = tr(
        "plan.about",
        peak=f"{peak / GIB:.1f}",
        memory=f"{memory / GIB:.1f}",
        device=localize_error(found["device"]["name"], tr),
    )
    chosen = found["settings"]
    lines = [
        tr("plan.settings", **{k: chosen[k] for k in _CHOSEN}),
        tr("plan.longest", batch=batch, longest=chosen["cutoff_len"]),
        localize_error(found["reason"], tr),
    ]
    messages = (*found.get("notes", ()), *found.get("warnings", ()))
    # The parts of the peak as one bar, as wide as the memory there is or the peak.
    whole = max(memory, sum(found["parts"].values())) or 1
    ranked = sorted(found["parts"].items(), key=lambda p: -p[1])
    return render(
        "train.plan", fits=fits, title=tr("plan.fits" if fits else "plan.does_not_fit"),
        about=about, lines=lines,
        parts=[
            (f"{100 * size / whole:.2f}", f"{tr(f'plan.{name}')} {size / GIB:.2f} GiB")
            for name, size in ranked
        ],
        limit=f"{100 * memory / whole:.2f}" if whole > memory else None,
        notes=join([note("warn", localize_error(message, tr)) for message in messages]),
        alternatives=Markup() if fits else _alternatives(found["alternatives"], tr),
    )  # fmt: skip


_CHOSEN = ("precision", "micro_batch_tokens", "gradient_checkpointing")


def _alternatives(others: Sequence[dict[str, Any]], tr: Translate) -> Markup:
    if not others:
        return note("warn", tr("plan.nothing_fits"))
    shown = [
        (alternative(o), f"{o['peak_bytes'] / GIB:.1f}", localize_error(o["cost"], tr))
        for o in others
    ]
    return render(
        "train.alternatives", title=tr("plan.would_fit"), alternatives=shown,
        costs=tr("plan.costs"),
    )  # fmt: skip


def alternative(other: dict[str, Any]) -> str:
    """Settings that fit, as one line."""
    pairs = other["settings"].items()
    return ", ".join(f"{k}: {','.join(v) if isinstance(v, list) else v}" for k, v in pairs)
