"""The controls of an answer: modes, presets, and all of decode's settings that act in a mode.

Settings that have no effect in a mode are hidden, and not passed on: decode refuses them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import gradio as gr

from vicuna import config
from vicuna.config.decoding import STRATEGIES, AnswerSettings, Decoding, Slider, extra
from vicuna.errors import SettingsError
from vicuna.generate.settings import Settings, biases_of
from vicuna.messages import Message
from vicuna.web.events import QUIET
from vicuna.web.i18n import label, translate
from vicuna.web.render import render

MODES = tuple(STRATEGIES)
PRESETS: dict[str, dict[str, Any]] = {
    "precise": {"mode": "greedy", "repetition_penalty": 1.1},
    "balanced": {"mode": "sample", "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1},
    "creative": {"mode": "sample", "temperature": 1.0, "top_p": 0.95, "min_p": 0.05},
    "translation": {"mode": "beam", "num_beams": 4, "length_penalty": 1.0},
}
# The mode says whether tokens are sampled.
_TABLE = {n: f for n, f in AnswerSettings.model_fields.items() if n in Decoding.model_fields}
del _TABLE["do_sample"]
_LISTS = tuple(n for n in _TABLE if isinstance(Decoding.model_fields[n].default, tuple | dict))
_WHOLE = tuple(n for n, f in _TABLE.items() if f.annotation in (int, int | None))
_SLIDERS: dict[str, Slider] = {n: extra(n)["slider"] for n in _TABLE if extra(n)["slider"]}
# A list is a text of one entry a line; a search on the page begins with four beams.
DEFAULTS: dict[str, Any] = {n: "" if n in _LISTS else f.default for n, f in _TABLE.items()}
DEFAULTS["num_beams"] = 4


class Controls:
    """The components, and settings out of their values.

    Args:
        name: of the tab; ids are `NAME-SETTING`.
        several: whether several answers may be asked for.
    """

    def __init__(self, name: str, several: bool) -> None:
        self._name, self._several = name, several
        self.inputs: dict[str, Any] = {}
        self.preset = gr.Radio(
            [(label(f"set.{p}"), p) for p in PRESETS], value="balanced", label=label("set.preset"),
            elem_id=f"{name}-preset", elem_classes="v-pills",
        )  # fmt: skip
        self.about = gr.HTML(
            render("page.fine", text=label("set.about_balanced")), elem_classes="v-bare"
        )
        self.mode = gr.Radio(
            [(label(f"set.{m}"), m) for m in MODES], value="sample", label=label("set.mode"),
            elem_id=f"{name}-mode", elem_classes="v-pills",
        )  # fmt: skip
        self._panel("main")
        with gr.Group(visible=True) as self.sampling:
            self._sampling()
        with gr.Group(visible=False) as self.beams:
            self._panel("beams")
        with gr.Accordion(label("set.repeating"), open=False):
            self._panel("repeating")
        with gr.Accordion(label("set.words"), open=False):
            self._panel("words")
            if not self._several:  # no room to show them when answers stand side by side
                self._panel("logprobs")
        self.reset = gr.Button(label("set.reset"), size="sm", elem_id=f"{name}-reset")
        self.values = [self.mode, *self.inputs.values()]
        self.kept = [self.preset, *self.values]
        self._events()

    def _common(self, key: str) -> dict[str, Any]:
        return {
            "label": label(f"set.{key}"),
            "info": label(f"set.{key}_info"),
            "value": DEFAULTS[key],
            "elem_id": f"{self._name}-{key}",
        }

    def _panel(self, name: str) -> None:
        """The components of a panel, in the order of the table."""
        for key in _TABLE:
            if extra(key)["panel"] == name:
                self.inputs[key] = self._component(key)

    def _component(self, key: str) -> Any:
        common = self._common(key)
        if key in _SLIDERS:
            low, high, step = _SLIDERS[key]
            return gr.Slider(low, high, step=step, **common)
        if key in _LISTS:
            return gr.Textbox(lines=1, max_lines=4, **common)
        if key in _WHOLE:
            return gr.Number(precision=0, **common)
        choices = [(label(f"set.{key}_{v}"), v) for v in get_args(_TABLE[key].annotation)]
        return gr.Dropdown(choices, **common)

    def _sampling(self) -> None:
        self._panel("sampling")
        with gr.Accordion(label("set.more_sampling"), open=False):
            self._panel("more_sampling")
        if self._several:
            self._panel("answers")

    def _events(self) -> None:
        shown = [self.sampling, self.beams]
        self.mode.change(visible, self.mode, shown, **QUIET)
        # A mode of one's own is no preset any more.
        self.mode.input(
            lambda: None, None, self.preset, **QUIET
        )  # fmt: skip
        self.preset.change(
            self._explain, self.preset, self.about, **QUIET
        )  # fmt: skip
        filled = [self.mode, *self.inputs.values()]
        self.preset.input(
            self._fill, self.preset, filled, trigger_mode="always_last", **QUIET
        )  # fmt: skip
        self.reset.click(
            self._back, None, [self.preset, *filled], **QUIET
        )  # fmt: skip

    def _back(self) -> list[Any]:
        return ["balanced", *self._fill("balanced")]

    def _fill(self, preset: str | None) -> list[Any]:
        chosen = {**DEFAULTS, **PRESETS.get(preset or "", PRESETS["balanced"])}
        return [chosen["mode"], *(chosen[k] for k in self.inputs)]

    def _explain(self, preset: str | None, request: gr.Request) -> str:
        """What a preset is good for; nothing where none is chosen."""
        known = preset in PRESETS
        return render("page.fine", text=translate(request, f"set.about_{preset}")) if known else ""

    def settings(self, values: Sequence[Any]) -> Settings:
        """Decode's settings, from the values of `self.values`.

        Raises: SettingsError naming every mistake.
        """
        return build(dict(zip(("mode", *self.inputs), values)))


def visible(mode: str) -> list[Any]:
    """Which groups of settings have an effect in a mode: sampling, beams."""
    return [gr.update(visible=group in STRATEGIES[mode]) for group in ("sampling", "beams")]


def build(chosen: dict[str, Any]) -> Settings:
    """Settings of a mode, of what has an effect in it.

    Raises: SettingsError naming every mistake.
    """
    mode = chosen.pop("mode")
    acting = STRATEGIES.get(mode, frozenset())
    given: dict[str, Any] = {"do_sample": "sampling" in acting}
    for key, value in chosen.items():
        group = "beams" if key == "num_beams" else extra(key)["acts"]
        if group and group not in acting:
            continue
        if key == "num_return_sequences" and not acting:
            continue
        given[key] = _value(key, value)
    settings = config.build(Settings, given)
    _bound(given)
    return settings


def _bound(given: dict[str, Any]) -> None:
    """Refuse what lies beyond a slider's ends: on a page for many, nobody takes more than these.

    Raises: SettingsError naming every mistake.
    """
    mistakes: list[str] = []
    for key, slider in _SLIDERS.items():
        value = given.get(key)
        if value is not None and value < slider.low:
            mistakes.append(
                Message(
                    "{key} is {value:g}, but must be at least {low:g}",
                    key=key,
                    value=value,
                    low=slider.low,
                )
            )
        elif value is not None and value > slider.high:
            mistakes.append(
                Message(
                    "{key} is {value:g}, but must be at most {high:g}",
                    key=key,
                    value=value,
                    high=slider.high,
                )
            )
    if mistakes:
        raise SettingsError(mistakes)


def _value(key: str, value: Any) -> Any:
    if key == "logit_bias":
        return biases_of(_lines(value))
    if key in _LISTS:
        return tuple(_lines(value))
    if key == "early_stopping":
        return {"true": True, "false": False}.get(value, value)
    if key in _WHOLE and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _lines(text: str) -> list[str]:
    """One entry a line; \\n and \\t in one stand for themselves."""
    found = [line for line in (text or "").splitlines() if line.strip()]
    return [line.replace("\\n", "\n").replace("\\t", "\t") for line in found]
