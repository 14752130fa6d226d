"""Charts as HTML: what they show, and that nothing of a name gets out."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

from vicuna.web.charts import BANDS, POINTS, Curve, curves, histogram


def parsed(html: str) -> ElementTree.Element:
    """Well-formed, or this raises."""
    return ElementTree.fromstring(html.replace("&nbsp;", " "))


def test_nothing_to_draw_is_nothing() -> None:
    assert curves([], "t", "x") == ""
    assert curves([Curve("a", [1.0], [math.nan])], "t", "x") == ""


def test_a_curve_stays_inside_and_is_thinned_to_its_newest_point() -> None:
    n = 5000
    html = curves([Curve("a", range(n), [math.sin(i / 100) for i in range(n)])], "t", "x")
    parsed(html)
    (path,) = re.findall(r'class="line c0" d="M([^"]+)"', html)
    points = [tuple(map(float, p.split())) for p in path.split("L")]
    assert len(points) == POINTS
    assert all(0 <= x <= 1000 and 0 <= y <= 1000 for x, y in points)
    assert points[-1][0] == 1000
    assert html.count("v-band") <= BANDS + 1


def test_the_mouse_is_told_the_numbers_below_it() -> None:
    found = [Curve("one", [1, 2, 3], [3.0, 2.0, 1.0]), Curve("two", [2], [1.5], "dots", 1)]
    html = curves(found, "t", "update", number=lambda v: f"{v:.2f}")
    bands = re.findall(r'<div class="v-band.*?</div></div>', html)
    assert len(bands) == 3
    assert "one 2.00" in bands[1]
    assert "two 1.50" in bands[1]
    assert "two" not in bands[0]


def test_a_few_wild_losses_do_not_flatten_the_rest() -> None:
    wild = [2.0] * 99 + [900.0]
    html = curves(
        [Curve("raw", range(100), wild, "faint"), Curve("s", range(100), [2.0] * 100)], "t", "x"
    )
    labels = re.search(r'<div class="v-y">(.*?)</div>', html)
    assert labels is not None
    assert "900" not in labels[1]


def test_names_are_text() -> None:
    html = curves([Curve("<script>&", [1], [1.0])], "<b>", '"><i>')
    parsed(html)
    assert "<script>" not in html
    assert "<b><b>" not in html


def test_a_histogram_marks_what_lies_beyond_the_cutoff() -> None:
    html = histogram([4, 0, 2, 1], 40, 20, "<t>", "x")
    parsed(html)
    assert html.count('class="bar beyond"') == 2
    assert "left:50.00%" in html
    assert "31–40+" in html
    assert "<t>" not in html
    parsed(histogram([], 40, 20, "t", "x"))
