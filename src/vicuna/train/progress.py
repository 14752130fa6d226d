"""What is seen of a run: lines and a progress bar, the loss plot, and trackers such as wandb."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.markup import escape

from vicuna.config import TrainSettings
from vicuna.console import Console, working
from vicuna.errors import UserError
from vicuna.files import whole_file
from vicuna.system_errors import install_extra
from vicuna.train.run_folder import RunFolder, read_log


class RunConsole(Console):
    """A terminal, or plain lines in a file or pipe, and the warnings that were printed on it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"soft_wrap": True, **options})
        self.warnings: list[str] = []

    def say(self, text: str) -> None:
        """Print a text as it is, without markup; nothing if it is empty."""
        if text:
            self.print(escape(text))

    def warn(self, text: str) -> None:
        """Print a warning, and keep it for the log."""
        self.warnings.append(text)
        self.print(f"[yellow]warning:[/] {escape(text)}")

    @contextmanager
    def working(self, text: str) -> Iterator[Callable[[str], None]]:
        """A line that says what takes long; the callable changes its details."""
        with working(self, text) as say:
            yield say

    @contextmanager
    def bar(self, total: int, done: int) -> Iterator[Callable[[int, str], None]]:
        """A progress bar over steps, or lines if this is no terminal.

        Yields: a function to call with (steps done, description).
        """
        if not self.is_terminal:
            yield self._lines(total, done)
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self, transient=True) as progress:
            task = progress.add_task("starting", total=total, completed=done)
            yield lambda step, text: progress.update(task, completed=step, description=text)

    def _lines(self, total: int, done: int) -> Callable[[int, str], None]:
        every = max(1, (total - done) // 20)

        def line(step: int, text: str) -> None:
            if step == total or (step - done) % every == 0:
                self.say(f"{step}/{total}  {text}")

        return line


# -- loss.png --------------------------------------------------------------------------------------


def plot_loss(run: Path) -> Path | None:
    """Draw `loss.png` into the run folder; None if there is nothing to draw.

    Raises: UserError if the disk is full.
    """
    events = read_log(run / "log.jsonl")
    losses = [e for e in events if isinstance(e.get("loss"), (int, float)) and "step" in e]
    steps = [e for e in losses if e["event"] == "step"]
    evals = [e for e in losses if e["event"] == "eval"]
    if not steps and not evals:
        return None
    # The object interface: pyplot would keep global state and look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    x, y = [e["step"] for e in steps], [e["loss"] for e in steps]
    axes.plot(x, y, color="#9bb7d4", linewidth=0.8, label="each step")
    axes.plot(x, smooth(y), color="#1f4e79", linewidth=1.6, label="smoothed")
    if evals:
        x, y = [e["step"] for e in evals], [e["loss"] for e in evals]
        axes.plot(x, y, "o-", color="#c0504d", markersize=4, label="eval")
    axes.set_xlabel("step")
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


# -- trackers --------------------------------------------------------------------------------------

_TRACKED = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_gib", "perplexity")


class Trackers:
    """Send the numbers of steps and evaluations to the services of `report_to`; none by default.

    Raises: UserError if a library that was asked for is not installed.
    """

    def __init__(self, settings: TrainSettings, run: RunFolder) -> None:
        self._send: list[Callable[[dict[str, float], int], None]] = []
        self._close: list[Callable[[], None]] = []
        for name in settings.report_to:
            if name != "none":
                self._open(name, settings, run)

    def _open(self, name: str, settings: TrainSettings, run: RunFolder) -> None:
        module = "torch.utils.tensorboard" if name == "tensorboard" else name
        try:
            library = import_module(module)
        except ImportError as e:
            raise UserError(
                "{name} is not installed",
                name=name,
                install_extra=install_extra("report"),
                where="report_to",
                fix="{install_extra}. Or leave out --report_to.",
            ) from e
        if name == "tensorboard":
            writer = library.SummaryWriter(str(run.path / "tensorboard"))

            def scalars(values: dict[str, float], step: int) -> None:
                for key, value in values.items():
                    writer.add_scalar(key, value, step)

            self._send.append(scalars)
            self._close.append(writer.close)
            return
        config = settings.model_dump(mode="json")
        library.init(project="chinese-vicuna", name=run.path.name, config=config)
        self._send.append(lambda values, step: library.log(values, step=step))
        self._close.append(library.finish)

    def log(self, prefix: str, event: dict[str, Any]) -> None:
        """Send an event's numbers under `prefix/name`."""
        values = {f"{prefix}/{k}": event[k] for k in _TRACKED if event.get(k) is not None}
        for send in self._send:
            send(values, event["step"])

    def close(self) -> None:
        """End the services' runs."""
        for close in self._close:
            close()
