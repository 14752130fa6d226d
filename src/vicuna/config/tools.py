"""The settings of `vicuna doctor` and `vicuna demo`."""

from __future__ import annotations

from vicuna.config.base import Settings, setting


class DoctorSettings(Settings):
    """The settings of `vicuna doctor`."""

    model: str = setting("smollm2-135m", "Model", "the base to look at")
    template: str = setting("auto", "Model", "the template to check it with")
    json_output: bool = setting(False, "Output", "print one JSON object (--json)")


class DemoSettings(Settings):
    """The settings of `vicuna demo`."""

    output_dir: str = setting("runs/demo", "Demo", "the run's folder; an older demo is replaced")
    quick: bool = setting(False, "Demo", "a few updates only: to see that everything works")
    seed: int = setting(42, "Demo", "decides the order of examples and the adapter's first weights")
