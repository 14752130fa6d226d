"""Other places a run's numbers can go: wandb, swanlab, tensorboard. None is the default."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from vicuna.config import TrainSettings
from vicuna.errors import UserError
from vicuna.system_errors import install_extra
from vicuna.train.run_folder import RunFolder

_NUMBERS = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_gib", "perplexity")


class Reporters:
    """Sends step and eval events on.

    Raises: UserError where a library that was asked for is not installed.
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
                f"{name} is not installed",
                where="report_to",
                fix=f"{install_extra('report')}. Or leave out --report_to.",
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

    def log(self, kind: str, event: dict[str, Any]) -> None:
        """Send an event's numbers under `kind/name`."""
        values = {f"{kind}/{k}": event[k] for k in _NUMBERS if event.get(k) is not None}
        for send in self._send:
            send(values, event["step"])

    def close(self) -> None:
        for close in self._close:
            close()
