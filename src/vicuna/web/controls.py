"""The controls of an answer: modes, presets, and all of decode's settings that act in a mode.

Settings that have no effect in a mode are hidden, and not passed on: decode refuses them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from vicuna import config
from vicuna.errors import SettingsError
from vicuna.generate.settings import OF_BEAMS, OF_SAMPLING, Settings, biases_of
from vicuna.web.i18n import say, t

MODES = ("greedy", "sample", "beam", "beam-sample")
PRESETS: dict[str, dict[str, Any]] = {
    "precise": {"mode": "greedy", "repetition_penalty": 1.1},
    "balanced": {"mode": "sample", "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1},
    "creative": {"mode": "sample", "temperature": 1.0, "top_p": 0.95, "min_p": 0.05},
    "translation": {"mode": "beam", "num_beams": 4, "length_penalty": 1.0},
}
DEFAULTS: dict[str, Any] = {
    "max_new_tokens": 512,
    "min_new_tokens": 0,
    "temperature": 0.7,
    "top_k": 0,
    "top_p": 0.9,
    "min_p": 0.0,
    "typical_p": 1.0,
    "seed": None,
    "num_beams": 4,
    "num_return_sequences": 1,
    "length_penalty": 1.0,
    "early_stopping": "false",
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "no_repeat_ngram_size": 0,
    "banned_words": "",
    "logit_bias": "",
    "stop": "",
    "stop_tokens": "",
    "logprobs": 0,
}
_LISTS = ("banned_words", "logit_bias", "stop", "stop_tokens")
_WHOLE = (
    "max_new_tokens", "min_new_tokens", "top_k", "seed", "num_beams", "num_return_sequences",
    "no_repeat_ngram_size", "logprobs",
)  # fmt: skip


@dataclass(frozen=True)
class _Slider:
    low: float
    high: float
    step: float


_SLIDERS = {
    "max_new_tokens": _Slider(1, 2048, 1),
    "min_new_tokens": _Slider(0, 512, 1),
    "temperature": _Slider(0.05, 2, 0.05),
    "top_k": _Slider(0, 200, 1),
    "top_p": _Slider(0.05, 1, 0.01),
    "min_p": _Slider(0, 0.5, 0.01),
    "typical_p": _Slider(0.05, 1, 0.01),
    "num_beams": _Slider(2, 16, 1),
    "num_return_sequences": _Slider(1, 16, 1),
    "length_penalty": _Slider(-2, 4, 0.1),
    "repetition_penalty": _Slider(0.5, 3, 0.05),
    "frequency_penalty": _Slider(-2, 2, 0.1),
    "presence_penalty": _Slider(-2, 2, 0.1),
    "no_repeat_ngram_size": _Slider(0, 10, 1),
    "logprobs": _Slider(0, 10, 1),
}


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
            [(t(f"set.{p}"), p) for p in PRESETS], value="balanced", label=t("set.preset"),
            elem_id=f"{name}-preset", elem_classes="v-pills",
        )  # fmt: skip
        self.about = gr.HTML(
            f"<p class='v-fine'>{t('set.about_balanced')}</p>", elem_classes="v-bare"
        )
        self.mode = gr.Radio(
            [(t(f"set.{m}"), m) for m in MODES], value="sample", label=t("set.mode"),
            elem_id=f"{name}-mode", elem_classes="v-pills",
        )  # fmt: skip
        self._slider("max_new_tokens")
        with gr.Group(visible=True) as self.sampling:
            self._sampling()
        with gr.Group(visible=False) as self.beams:
            self._beams()
        with gr.Accordion(t("set.repeating"), open=False):
            for key in (
                "repetition_penalty", "frequency_penalty", "presence_penalty",
                "no_repeat_ngram_size",
            ):  # fmt: skip
                self._slider(key)
        with gr.Accordion(t("set.words"), open=False):
            self._slider("min_new_tokens")
            for key in _LISTS:
                self._add(key, gr.Textbox(lines=1, max_lines=4, **self._common(key)))
            if not self._several:  # where answers stand side by side there is no room to show them
                self._slider("logprobs")
        self.reset = gr.Button(t("set.reset"), size="sm", elem_id=f"{name}-reset")
        self.values = [self.mode, *self.inputs.values()]
        self.kept = [self.preset, *self.values]
        self._events()

    def _common(self, key: str) -> dict[str, Any]:
        return {
            "label": t(f"set.{key}"),
            "info": t(f"set.{key}_info"),
            "value": DEFAULTS[key],
            "elem_id": f"{self._name}-{key}",
        }

    def _add(self, key: str, component: Any) -> None:
        self.inputs[key] = component

    def _slider(self, key: str) -> None:
        s = _SLIDERS[key]
        self._add(key, gr.Slider(s.low, s.high, step=s.step, **self._common(key)))

    def _sampling(self) -> None:
        for key in ("temperature", "top_p"):
            self._slider(key)
        with gr.Accordion(t("set.more_sampling"), open=False):
            for key in ("top_k", "min_p", "typical_p"):
                self._slider(key)
            self._add("seed", gr.Number(precision=0, **self._common("seed")))
        if self._several:
            self._slider("num_return_sequences")

    def _beams(self) -> None:
        for key in ("num_beams", "length_penalty"):
            self._slider(key)
        choices = [(t(f"set.early_{v}"), v) for v in ("false", "true", "never")]
        self._add("early_stopping", gr.Dropdown(choices, **self._common("early_stopping")))

    def _events(self) -> None:
        shown = [self.sampling, self.beams]
        self.mode.change(
            visible, self.mode, shown, show_progress="hidden", api_visibility="private"
        )
        # A mode of one's own is no preset any more.
        self.mode.input(
            lambda: None, None, self.preset, show_progress="hidden", api_visibility="private",
        )  # fmt: skip
        self.preset.change(
            self._explain, self.preset, self.about, show_progress="hidden",
            api_visibility="private",
        )  # fmt: skip
        filled = [self.mode, *self.inputs.values()]
        self.preset.input(
            self._fill, self.preset, filled, trigger_mode="always_last", show_progress="hidden",
            api_visibility="private",
        )  # fmt: skip
        self.reset.click(
            self._back, None, [self.preset, *filled], show_progress="hidden",
            api_visibility="private",
        )  # fmt: skip

    def _back(self) -> list[Any]:
        return ["balanced", *self._fill("balanced")]

    def _fill(self, preset: str | None) -> list[Any]:
        chosen = {**DEFAULTS, **PRESETS.get(preset or "", PRESETS["balanced"])}
        return [chosen["mode"], *(chosen[k] for k in self.inputs)]

    def _explain(self, preset: str | None, request: gr.Request) -> str:
        """What a preset is good for; nothing where none is chosen."""
        known = preset in PRESETS
        return f"<p class='v-fine'>{say(request, f'set.about_{preset}')}</p>" if known else ""

    def settings(self, values: Sequence[Any]) -> Settings:
        """Decode's settings, from the values of `self.values`.

        Raises: SettingsError naming every mistake.
        """
        return build(dict(zip(("mode", *self.inputs), values)))


def visible(mode: str) -> list[Any]:
    """Which groups of settings have an effect in a mode: sampling, beams."""
    return [gr.update(visible="sample" in mode), gr.update(visible="beam" in mode)]


def build(chosen: dict[str, Any]) -> Settings:
    """Settings of a mode, of what has an effect in it.

    Raises: SettingsError naming every mistake.
    """
    mode = chosen.pop("mode")
    samples, beams = "sample" in mode, "beam" in mode
    given: dict[str, Any] = {"do_sample": samples}
    for key, value in chosen.items():
        if (key in OF_SAMPLING or key == "seed") and not samples:
            continue
        if (key in OF_BEAMS or key == "num_beams") and not beams:
            continue
        if key == "num_return_sequences" and mode == "greedy":
            continue
        given[key] = _value(key, value)
    settings = config.build(Settings, given)
    _bound(given)
    return settings


def _bound(given: dict[str, Any]) -> None:
    """Refuse what lies beyond a slider's ends: on a page for many, nobody takes more than these.

    Raises: SettingsError naming every mistake.
    """
    mistakes = []
    for key, slider in _SLIDERS.items():
        value = given.get(key)
        if value is not None and value < slider.low:
            mistakes.append(f"{key} is {value:g}, but must be at least {slider.low:g}")
        elif value is not None and value > slider.high:
            mistakes.append(f"{key} is {value:g}, but must be at most {slider.high:g}")
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
