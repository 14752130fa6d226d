"""Settings of the page: what acts in a mode is passed on, the rest is not."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest

from vicuna.errors import SettingsError
from vicuna.generate.settings import OF_BEAMS, Settings
from vicuna.web import controls
from vicuna.web.controls import DEFAULTS, MODES, PRESETS, build, visible
from vicuna.web.error_texts import localize_error
from vicuna.web.i18n import catalog, translate

# What is not among the controls: the mode says it.
ELSEWHERE = {"do_sample"}


def chosen(mode: str, **changes: Any) -> dict[str, Any]:
    return {"mode": mode, **DEFAULTS, **changes}


def test_every_setting_of_decode_has_a_control_and_words() -> None:
    assert DEFAULTS.keys() == Settings.model_fields.keys() - ELSEWHERE
    for key in DEFAULTS:
        assert f"set.{key}" in catalog()
        assert f"set.{key}_info" in catalog()
    for name in (*MODES, *PRESETS):
        assert f"set.{name}" in catalog()


@pytest.mark.parametrize("mode", MODES)
def test_no_mode_is_refused_for_what_has_no_effect_in_it(mode: str) -> None:
    odd = {"temperature": 1.5, "top_k": 7, "min_p": 0.2, "length_penalty": 2.0, "seed": 3}
    assert build(chosen(mode, **odd, early_stopping="never")).strategy == mode


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_settings(preset: str) -> None:
    values = chosen("greedy") | PRESETS[preset]
    assert build(values).strategy == PRESETS[preset]["mode"]


def test_texts_become_lists_and_mistakes_are_named() -> None:
    found = build(
        chosen("beam", stop="User:\n\n\\n\\n", logit_bias="a=-1\n5=2", banned_words="坏", seed=None)
    )
    assert found.stop == ("User:", "\n\n")
    assert found.logit_bias == {"a": -1.0, "5": 2.0}
    assert found.banned_words == ("坏",)
    with pytest.raises(SettingsError, match="min_new_tokens 9 is above"):
        build(chosen("greedy", min_new_tokens=9, max_new_tokens=5))
    with pytest.raises(SettingsError, match="expected TOKEN=BIAS"):
        build(chosen("greedy", logit_bias="nonsense"))


def test_groups_are_shown_where_they_act() -> None:
    found = {mode: [u["visible"] for u in visible(mode)] for mode in MODES}
    assert found == {
        "greedy": [False, False],
        "sample": [True, False],
        "beam": [False, True],
        "beam-sample": [True, True],
    }


@pytest.mark.parametrize("key", sorted(controls._SLIDERS))
def test_a_number_beyond_a_slider_is_answered_in_the_page_s_language(key: str) -> None:
    slider = controls._SLIDERS[key]
    beams = {*OF_BEAMS, "num_beams", "num_return_sequences"}
    mode = "beam" if key in beams else "sample"
    for value in (slider.high + 10_000, slider.low - 10_000):
        with pytest.raises(SettingsError, match=key) as wrong:
            build(chosen(mode, **{key: value}))
        assert re.search("[一-鿿]", localize_error(wrong.value, partial(translate, "zh")))
    with pytest.raises(SettingsError, match=key) as wrong:
        build(chosen(mode, **{key: None}))  # the box was emptied
    assert re.search("[一-鿿]", localize_error(wrong.value, partial(translate, "zh")))
