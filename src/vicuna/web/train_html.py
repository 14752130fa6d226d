"""What the tab Train shows, as HTML: a run as it is now, its curves and answers, a memory plan."""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape
from typing import Any

from vicuna import untrusted
from vicuna.paths import shell_word
from vicuna.runs import process
from vicuna.runs.manager import RECIPE, Run
from vicuna.train.plot import smooth
from vicuna.web import charts
from vicuna.web.charts import Curve
from vicuna.web.data_html import Say, note, table
from vicuna.web.error_texts import in_words

GIB = 1 << 30
WARNINGS = 8  # the newest of a run
EARLIER = 12  # older answers to a question
OUTPUT_LINES = 60
# States that need a word beside their name.
_EXPLAINED = ("starting", "pausing", "paused", "stopped", "killed")


# -- a run ---------------------------------------------------------------------------------------


def head(run: Run, say: Say) -> str:
    """State, progress, and the numbers of now."""
    log = run.log
    chip = f'<span class="v-chip {run.state}">{escape(say(f"state.{run.state}"))}</span>'
    place = ""
    if log.total:
        place = say("train.of_steps", step=log.step, total=log.total)
        left = log.seconds_left() if run.state == "running" else None
        if left is not None:
            place += f" · {say('train.left', time=duration(left, say))}"
    share = 100 * log.step / log.total if log.total else 0
    bar = (
        f'<div class="v-progress {run.state}" role="progressbar" aria-valuenow="{share:.0f}" '
        f'aria-valuemin="0" aria-valuemax="100"><i style="width:{share:.2f}%"></i></div>'
    )
    return (
        f'<section class="v-run"><div class="v-title"><h3>{escape(run.name)}</h3>{chip}'
        f"<span>{escape(place)}</span></div>{bar if log.total else ''}"
        f"{_numbers(run, say)}{_words(run, say)}</section>"
    )


def _numbers(run: Run, say: Say) -> str:
    log = run.log
    best = [e["loss"] for e in log.evaluations if e.get("loss") is not None]
    cells = [
        ("train.loss", log.now("loss"), "{:.4f}"),
        ("train.held_out", min(best, default=None), "{:.4f}"),
        ("train.tokens_per_second", log.now("tokens_per_second"), "{:,.0f}"),
        ("train.memory", log.now("memory_gib"), "{:.1f}"),
        ("train.rate", log.now("learning_rate"), "{:.2e}"),
    ]
    numbers = "".join(
        f'<div class="v-number"><b>{form.format(value)}</b><span>{escape(say(key))}</span></div>'
        for key, value, form in cells
        if value is not None
    )
    return f'<div class="v-numbers small run">{numbers}</div>' if numbers else ""


def _words(run: Run, say: Say) -> str:
    """What is to be said of the state, and what the run warned of."""
    found = ""
    if run.state in ("failed", "unreadable"):
        found += note("error", *in_words(run.words, say).split("\n", 1))
    elif run.words:
        head, *more = in_words(run.words, say).split("\n", 1)
        found += note("warn", say("train.not_resumed", words=head), *more)
    elif run.state in _EXPLAINED:
        kind = {"killed": "error", "starting": "busy", "pausing": "busy"}.get(run.state, "good")
        found += note(kind, say(f"train.{run.state}_words"))
    elif run.state == "running":
        found += f'<p class="v-fine">{escape(say("train.goes_on"))}</p>'
    if run.log.odd:
        found += note("warn", say("train.odd_lines", count=run.log.odd))
    newest = [in_words(str(w.get("message", "")), say) for w in run.log.warnings[-WARNINGS:]]
    if run.state == "failed" or (newest and newest[-1].startswith("KeyboardInterrupt")):
        newest = newest[:-1]
    return found + "".join(note("warn", words) for words in dict.fromkeys(newest))


def duration(seconds: float, say: Say) -> str:
    """A time to wait, in two units at most."""
    if seconds < 90:
        return say("time.seconds", n=round(seconds))
    minutes = round(seconds / 60)
    if minutes < 90:
        return say("time.minutes", n=minutes)
    hours, rest = divmod(minutes, 60)
    if hours < 48:
        return say("time.hours", h=hours, n=rest)
    return say("time.days", d=hours // 24, h=hours % 24)


def loss_chart(run: Run, others: Sequence[Run], say: Say) -> str:
    """Loss and evaluation of a run; of several runs, a colour each."""
    runs = [run, *others]
    found = [curve for i, r in enumerate(runs) for curve in _curves(r, i, len(runs) > 1, say)]
    end = max(r.log.total for r in runs)
    drawn = charts.curves(
        found, say("train.chart_loss"), say("train.update"), end, lambda v: f"{v:.4f}"
    )
    return drawn or note("empty", say("train.no_curve"))


def _curves(run: Run, colour: int, several: bool, say: Say) -> list[Curve]:
    steps, losses = run.log.steps["step"], run.log.steps["loss"]
    known = [(x, y) for x, y in zip(steps, losses) if y == y]
    x, y = [p[0] for p in known], [p[1] for p in known]
    evals = [(e["step"], e["loss"]) for e in run.log.evaluations if e.get("loss") is not None]
    e_x, e_y = [p[0] for p in evals], [p[1] for p in evals]
    if several:
        dotted = f"{run.name}, {say('train.evaluation')}"
        return [
            Curve(run.name, x, smooth(y), "line", colour),
            Curve(dotted, e_x, e_y, "dots", colour),
        ]
    return [
        Curve(say("train.each"), x, y, "faint", 0),
        Curve(say("train.smoothed"), x, smooth(y), "line", 0),
        Curve(say("train.evaluation"), e_x, e_y, "dots", 1),
    ]


def other_charts(run: Run, say: Say) -> str:
    """Learning rate and speed, small."""
    steps = run.log.steps
    drawn = [
        charts.curves(
            [Curve("", steps["step"], steps[name], "line", colour)],
            say(title),
            say("train.update"),
            run.log.total,
        )
        for name, title, colour in (
            ("learning_rate", "train.chart_rate", 2),
            ("tokens_per_second", "train.chart_speed", 0),
        )
    ]
    return f'<div class="v-pair">{"".join(drawn)}</div>' if any(drawn) else ""


def samples(run: Run, say: Say) -> str:
    """The newest answer to each question, and the earlier ones folded away."""
    if not run.log.samples:
        asked = bool(run.settings().get("sample_prompts"))
        return note("empty", say("train.samples_to_come" if asked else "train.no_samples"))
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for sample in run.log.samples:
        by_prompt.setdefault(str(sample.get("prompt", "")), []).append(sample)
    return "".join(_answers(prompt, found, say) for prompt, found in by_prompt.items())


def _answers(prompt: str, found: Sequence[dict[str, Any]], say: Say) -> str:
    *earlier, newest = found
    older = ""
    if earlier:
        lines = "".join(_answer(sample, say) for sample in reversed(earlier[-EARLIER:]))
        older = f"<details><summary>{escape(say('train.earlier'))}</summary>{lines}</details>"
    question = f'<p class="question">{escape(prompt)}</p>'
    return f'<article class="v-sample">{question}{_answer(newest, say)}{older}</article>'


def _answer(sample: dict[str, Any], say: Say) -> str:
    step = escape(say("train.steps", step=int(sample.get("step", 0))))
    text = escape(str(sample.get("answer", ""))) or f"<em>{escape(say('train.nothing_said'))}</em>"
    return f'<div class="answer"><span>{step}</span><p>{text}</p></div>'


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


def all_runs(runs: Sequence[Run], say: Say) -> str:
    """A row a run, the newest first."""
    if not runs:
        return note("empty", say("train.no_runs"))
    rows = "".join(_row(run, say) for run in runs)
    names = ("run", "state", "updates", "loss", "held_out", "when")
    numbers = ("updates", "loss", "held_out")
    titles = "".join(
        f"<th{' class=n' if n in numbers else ''}>{escape(say(f'train.{n}'))}</th>" for n in names
    )
    return table(titles, rows)


def _row(run: Run, say: Say) -> str:
    loss = run.log.now("loss")
    best = min((e["loss"] for e in run.log.evaluations if e.get("loss") is not None), default=None)
    began = run.log.first_time
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(began)) if began else ""
    cells = (
        f"{run.log.step:,} / {run.log.total:,}" if run.log.total else "",
        f"{loss:.4f}" if loss is not None else "",
        f"{best:.4f}" if best is not None else "",
    )
    return (
        f"<tr><td><b>{escape(run.name)}</b></td>"
        f'<td><span class="v-chip {run.state}">{escape(say(f"state.{run.state}"))}</span></td>'
        + "".join(f'<td class="n">{cell}</td>' for cell in cells)
        + f'<td class="when">{when}</td></tr>'
    )


# -- before a run --------------------------------------------------------------------------------


def mistakes(error: Exception, say: Say, title: str = "train.mistakes") -> str:
    """What must be mended, all of it."""
    found = getattr(error, "mistakes", None) or [str(error)]
    items = "".join(f"<li>{escape(in_words(str(m), say))}</li>" for m in found)
    return (
        f'<div class="v-note error" role="alert"><p><b>{escape(say(title))}</b></p>'
        f"<ul>{items}</ul></div>"
    )


def plan(found: dict[str, Any], batch: int, say: Say) -> str:
    """A memory plan: whether it fits, what takes how much, what was chosen and why."""
    memory, peak = found["device"]["memory_bytes"], found["peak_bytes"]
    fits = bool(found["fits"])
    title = say("plan.fits" if fits else "plan.does_not_fit")
    about = say(
        "plan.about",
        peak=f"{peak / GIB:.1f}",
        memory=f"{memory / GIB:.1f}",
        device=in_words(found["device"]["name"], say),
    )
    chosen = found["settings"]
    lines = [
        say("plan.settings", **{k: chosen[k] for k in _CHOSEN}),
        say("plan.longest", batch=batch, longest=chosen["cutoff_len"]),
        in_words(found["reason"], say),
    ]
    said = (*found.get("notes", ()), *found.get("warnings", ()))
    notes = "".join(note("warn", in_words(words, say)) for words in said)
    rest = "" if fits else _alternatives(found["alternatives"], say)
    body = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return (
        f'<section class="v-plan {"fits" if fits else "not"}"><p class="verdict"><b>{escape(title)}'
        f"</b> <span>{escape(about)}</span></p>{_parts(found['parts'], memory, say)}"
        f"<ul>{body}</ul>{notes}{rest}</section>"
    )


_CHOSEN = ("precision", "micro_batch_tokens", "gradient_checkpointing")


def _parts(parts: dict[str, int], memory: int, say: Say) -> str:
    """The parts of the peak as one bar, as wide as the memory there is or the peak."""
    whole = max(memory, sum(parts.values())) or 1
    bar, key = [], []
    ranked = sorted(parts.items(), key=lambda p: -p[1])
    for i, (name, size) in enumerate(ranked):
        words = f"{say(f'plan.{name}')} {size / GIB:.2f} GiB"
        bar.append(
            f'<i class="p{i}" style="width:{100 * size / whole:.2f}%" title="{escape(words)}"></i>'
        )
        key.append(f'<span><i class="p{i}"></i>{escape(words)}</span>')
    limit = f'<u style="left:{100 * memory / whole:.2f}%"></u>' if whole > memory else ""
    return (
        f'<div class="v-parts">{"".join(bar)}{limit}</div><div class="v-parts-key">{"".join(key)}'
        "</div>"
    )


def _alternatives(others: Sequence[dict[str, Any]], say: Say) -> str:
    if not others:
        return note("warn", say("plan.nothing_fits"))
    items = "".join(
        f"<li><code>{escape(alternative(o))}</code> <b>{o['peak_bytes'] / GIB:.1f} GiB</b>"
        f"<br><span>{escape(say('plan.costs'))}: {escape(in_words(o['cost'], say))}</span></li>"
        for o in others
    )
    return f"<p>{escape(say('plan.would_fit'))}</p><ol>{items}</ol>"


def alternative(other: dict[str, Any]) -> str:
    """Settings that fit, as one line."""
    pairs = other["settings"].items()
    return ", ".join(f"{k}: {','.join(v) if isinstance(v, list) else v}" for k, v in pairs)
