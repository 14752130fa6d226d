"""loss.png: the loss of every step, smoothed, and the held-out loss, from a run's log."""

from __future__ import annotations

from pathlib import Path

from vicuna.files import whole_file
from vicuna.train.run_folder import read_log


def plot_loss(run: Path) -> Path | None:
    """Draw `loss.png` into the run folder; None where there is nothing to draw.

    Raises: UserError where the disk is full.
    """
    events = read_log(run / "log.jsonl")
    told = [e for e in events if isinstance(e.get("loss"), (int, float)) and "step" in e]
    steps = [e for e in told if e["event"] == "step"]
    evals = [e for e in told if e["event"] == "eval"]
    if not steps and not evals:
        return None
    # The object interface: pyplot would keep global state and look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    x, y = [e["step"] for e in steps], [e["loss"] for e in steps]
    axes.plot(x, y, color="#9bb7d4", linewidth=0.8, label="each update")
    axes.plot(x, smooth(y), color="#1f4e79", linewidth=1.6, label="smoothed")
    if evals:
        held_out = [e["step"] for e in evals], [e["loss"] for e in evals]
        axes.plot(*held_out, "o-", color="#c0504d", markersize=4, label="held out")
    axes.set_xlabel("update")
    axes.set_ylabel("loss per supervised token")
    axes.set_title(run.name.encode("utf-8", "replace").decode())  # a path may be no text
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.tight_layout()
    target = run / "loss.png"
    with whole_file(target) as aside:
        figure.savefig(aside, format="png")
    return target


def smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start."""
    smoothed, average = [], 0.0
    for n, value in enumerate(values, 1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**n))
    return smoothed
